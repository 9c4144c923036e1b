"""A picture of one row for a paper: what the last token takes from each token before it, stream by stream."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from clearhead.look.view import STEPS, View

NAMED = 60
"""Tokens that still have their names under the axis."""


def row(view: View, token: int | None = None) -> list[np.ndarray[Any, np.dtype[np.float64]]]:
    """The mean over the view's layers and heads of one token's row: A, or A1, A2 and A1 − λ A2. (S,) each.

    Of what the view keeps; the rest of a row counts as zero.
    """
    token = len(view.text.ids) - 1 if token is None else token
    sizes = np.minimum(view.most, np.arange(view.first, len(view.text.ids)) + 1)
    starts, at = np.concatenate([[0], np.cumsum(sizes)]), token - view.first
    blocks = sum(map(len, view.heads))
    total = [np.zeros(len(view.text.ids)) for _ in range(1 if view.streams == 1 else 3)]
    for block in range(blocks):
        part = slice(block * starts[-1] + starts[at], block * starts[-1] + starts[at + 1])
        keys = view.keys[part].astype(int)
        taken = [weights[part] / STEPS for weights in view.weights]
        if view.gates is not None:
            gate = view.gates.reshape(blocks, -1)[block, at]
            taken = [*taken, taken[0] - gate * taken[1]]
        for sums, one in zip(total, taken, strict=True):
            sums[keys] += one / blocks
    return total


def draw(views: Sequence[View], out: Path) -> None:
    """One column a model, one panel a map."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib.figure import Figure

    rows = [row(view) for view in views]
    most = max(map(len, rows))
    figure = Figure(figsize=(7.0 * len(views), 1.9 * most + 0.8), layout="constrained")
    panels: Any = figure.subplots(most, len(views), squeeze=False)
    for column, (view, found) in enumerate(zip(views, rows, strict=True)):
        titles = ["A"] if len(found) == 1 else ["A₁", "A₂", "A₁ − λA₂"]
        for line in range(most):
            panel = panels[line][column]
            if line >= len(found):
                panel.axis("off")
                continue
            values = found[line]
            colours = np.where(values < 0, "#d65b06", "#2563cd")
            panel.bar(np.arange(len(values)), values, color=colours.tolist(), width=0.9)
            for mark in view.marks[1:]:
                panel.axvspan(mark.start - 0.5, mark.end - 0.5, color="#0f8a5f", alpha=0.15, lw=0)
            panel.set_ylabel(titles[line])
            panel.axhline(0, color="#5b6675", lw=0.6)
            panel.spines[["top", "right"]].set_visible(False)
            panel.set_xlim(-0.6, len(values) - 0.4)
            if len(values) <= NAMED and line == len(found) - 1:
                names = [view.text.text[a:b].strip() or "·" for a, b in view.text.spans]
                panel.set_xticks(range(len(names)), names, rotation=90, fontsize=7)
            elif line < len(found) - 1:
                panel.set_xticklabels([])
        panels[0][column].set_title(f"{view.name}: {view.kind}", fontsize=9)
    figure.savefig(out, dpi=160, metadata={"Date": None} if out.suffix == ".svg" else None)

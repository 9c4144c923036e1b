"""What all charts share: style and size, colours of arms, axes, reference lines and the legend."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import matplotlib
import numpy as np
from cycler import cycler
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch

from clearhead.analysis.sections import Reference, Values
from clearhead.report.palette import MUTED, PARTS, RULE, TEXT, Ink

WIDTH = 4.7
"""Inches of every chart: about 450 pixels on a page, readable at the 350 of a phone."""
WHITE = "#fffffe"
"""White on a strong colour, light or dark page: not the colour of the paper, which changes."""
LEGEND_CHARACTERS = 54
LEGEND_ROW = 0.18
"""Inches."""
NAME_HEIGHT = 0.06
"""Of the axis, what the name of a reference line takes."""
Arms = Mapping[str, Ink]
"""Arm -> its colour, in the order of the arms."""

STYLE: dict[Any, Any] = {
    "font.size": 9.0,
    "axes.labelsize": 9.0,
    "xtick.labelsize": 8.5,
    "ytick.labelsize": 8.5,
    "legend.fontsize": 8.5,
    "axes.edgecolor": RULE.light,
    "axes.labelcolor": MUTED.light,
    "axes.linewidth": 0.8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    # Whatever is drawn without a colour of its own (caps of error bars) is ink.
    "axes.prop_cycle": cycler(color=[TEXT.light]),
    "grid.color": RULE.light,
    "grid.linewidth": 0.6,
    "text.color": TEXT.light,
    "xtick.color": RULE.light,
    "ytick.color": RULE.light,
    "xtick.labelcolor": MUTED.light,
    "ytick.labelcolor": MUTED.light,
    "lines.linewidth": 1.7,
    "lines.solid_capstyle": "round",
    "legend.frameon": False,
    "svg.fonttype": "none",
    "svg.hashsalt": "clearhead",
    "pdf.fonttype": 42,
    "savefig.dpi": 200,
}


@contextmanager
def style() -> Iterator[None]:
    """Everything that is drawn inside has the report's style."""
    # `default` first: a user's matplotlibrc must not reach into the report.
    with matplotlib.rc_context(rc=dict(matplotlib.rcParamsDefault), fname=None):
        matplotlib.rcParams.update(STYLE)
        yield


def new_figure(height: float) -> Figure:
    """An empty figure of `height` inches."""
    figure = Figure(figsize=(WIDTH, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def floats(values: Values) -> list[float]:
    """Values as numbers, NaN for what is missing."""
    return [np.nan if value is None else float(value) for value in values]


def ink(arm: str | None, arms: Arms, index: int) -> Ink:
    """The colour of an arm, and of the series `index` that is no arm's."""
    return arms[arm] if arm is not None and arm in arms else PARTS[index % len(PARTS)]


def place_of(arm: str | None, arms: Arms, index: int) -> int:
    """The place of an arm among all, which its mark and its kind of line depend on."""
    return list(arms).index(arm) if arm is not None and arm in arms else index


def legend(figure: Figure, handles: Sequence[Line2D | Patch]) -> None:
    """One row above the chart, or as many as the names need; from the third on the figure grows with them."""
    if not handles:
        return
    sizes = [len(str(handle.get_label())) + 5 for handle in handles]
    columns = len(handles) if sum(sizes) <= LEGEND_CHARACTERS else max(1, LEGEND_CHARACTERS // max(sizes))
    more = math.ceil(len(handles) / columns) - 2
    figure.set_figheight(figure.get_figheight() + LEGEND_ROW * max(0, more))
    figure.legend(
        handles=handles,
        loc="outside upper left",
        ncols=columns,
        handlelength=1.4,
        columnspacing=1.1,
        borderpad=0.1,
    )


def reference_lines(axes: Axes, references: Sequence[Reference]) -> None:
    """Dashed lines with a small name, on the side of the line that has more room; no name over another's."""
    levels = sorted(reference.value for reference in references if reference.axis == "y")
    for reference in references:
        line: dict[str, Any] = {"color": MUTED.light, "linewidth": 0.9, "linestyle": (0, (3, 3)), "zorder": 1}
        if reference.axis == "x":
            axes.axvline(reference.value, **line)
            left, right = axes.transData.transform([(x, 0) for x in axes.get_xlim()])[:, 0]
            place = (axes.transData.transform((reference.value, 0))[0] - left) / (right - left)
            at, offset = (reference.value, 1.0), (-3 if place > 0.5 else 3, -1)
            frame, side, top = axes.get_xaxis_transform(), "right" if place > 0.5 else "left", "top"
        else:
            axes.axhline(reference.value, **line)
            above = next((level for level in levels if level > reference.value), math.inf)
            bottom, height = axes.get_ylim()
            crowded = above - reference.value < NAME_HEIGHT * (height - bottom)
            at, offset = (0.0, reference.value), (2, -2 if crowded else 2)
            frame, side, top = axes.get_yaxis_transform(), "left", "top" if crowded else "bottom"
        text = axes.annotate(
            reference.label,
            at,
            offset,
            xycoords=frame,
            textcoords="offset points",
            ha=side,
            va=top,
            color=MUTED.light,
        )
        text.set_fontsize(8)
        text.set_in_layout(False)


def y_axis(axes: Axes, label: str, limits: tuple[float, float] | None) -> None:
    """Names the axis; `limits` get a little room."""
    axes.set_ylabel(label)
    axes.grid(axis="x", visible=False)
    axes.tick_params(length=0)
    axes.spines["left"].set_visible(False)
    if limits is not None:
        room = 0.04 * (limits[1] - limits[0])
        axes.set_ylim(limits[0] - room, limits[1] + room)

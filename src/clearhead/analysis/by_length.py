"""What the sections of measurements by length share: which lengths all arms have, charts and tables over them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Protocol, TypeVar

import numpy as np

from clearhead.analysis.sections import LineChart, Panel, Reference, SectionTable, Series
from clearhead.analysis.statistics import Estimate

T = TypeVar("T")
Values = Mapping[str, Mapping[int, T]]
"""Arm -> seed -> the values of an evaluation."""


class PartlySkipped(Protocol):
    """Values that say which of their cells are missing, and why."""

    @property
    def skipped_cells(self) -> Mapping[str, str]: ...


Read = Callable[[str, int], Estimate | None]
"""(arm, length) -> the estimate over its seeds, None where it is missing."""


def first_values(values: Values[T]) -> T:
    """The values of any one model: what all of them have in common stands there."""
    return next(iter(next(iter(values.values())).values()))


def left_out(values: Values[PartlySkipped], unit: str = "") -> list[str]:
    """The cells that a model has no number for, a line a reason; it names the arms unless it concerns all of them."""
    reasons: dict[str, dict[str, None]] = {}
    concerned: dict[str, dict[str, None]] = {}
    for arm, seeds in values.items():
        for value in seeds.values():
            for cell, why in value.skipped_cells.items():
                reasons.setdefault(why, {})[f"{cell}{unit}"] = None
                concerned.setdefault(why, {})[arm] = None
    return [
        f"{'' if len(concerned[why]) == len(values) else ', '.join(concerned[why]) + ': '}{'; '.join(cells)}: {why}."
        for why, cells in reasons.items()
    ]


def heat_panels(
    arms: Sequence[str],
    lengths: Sequence[int],
    depths: Sequence[float],
    mean: Callable[[str, int, float], float | None],
) -> list[Panel]:
    """A panel an arm: `mean(arm, length, depth)`, empty where it is None."""
    return [
        Panel(
            arm,
            [f"{length:,}" for length in lengths],
            [f"{depth:.0%}" for depth in depths],
            [[mean(arm, length, depth) for length in lengths] for depth in depths],
            arm,
        )
        for arm in arms
    ]


def shared_lengths(values: Values[T], lengths: Callable[[T], set[int]]) -> list[int]:
    """The lengths that every model was measured at, in order."""
    return sorted(set.intersection(*(lengths(v) for seeds in values.values() for v in seeds.values())))


def every_length(values: Values[T], lengths: Callable[[T], set[int]]) -> list[int]:
    """The lengths that any model was measured at, in order."""
    return sorted(set.union(*(lengths(v) for seeds in values.values() for v in seeds.values())))


def length_chart(
    slug: str,
    title: str,
    y_label: str,
    arms: Sequence[str],
    lengths: Sequence[int],
    read: Read,
    *,
    trained: int | None,
    caption: str = "",
    y_range: tuple[float, float] | None = None,
    references: Sequence[Reference] = (),
) -> LineChart:
    """A line an arm over the lengths, with its interval as a band and the training length as a mark."""
    series = []
    for arm in arms:
        points = [read(arm, length) for length in lengths]
        y, low, high = (
            [None if point is None else getattr(point, part) for point in points]
            for part in ("value", "low", "high")
        )
        series.append(Series(arm, list(lengths), y, low, high, arm))
    marks = [*references]
    if trained is not None and min(lengths) <= trained < max(lengths):
        marks.append(Reference("training length", trained, "x"))
    return LineChart(
        slug, title, "length (tokens)", y_label, series, caption,
        log_x=True, markers=True, y_range=y_range, references=marks,
    )  # fmt: skip


def length_table(
    title: str,
    arms: Sequence[str],
    lengths: Sequence[int],
    cell: Callable[[str, int], str | None],
    caption: str = "",
) -> SectionTable:
    """A row a length, a column an arm."""
    rows: list[list[str | None]] = [
        [f"{length:,} tokens", *(cell(arm, length) for arm in arms)] for length in lengths
    ]
    return SectionTable(title, ["length", *arms], rows, caption)


def times(length: int, trained: int | None) -> str:
    """`2,048 tokens, 16 times the training length`."""
    if not trained or length == trained:
        return f"{length:,} tokens" + (", the training length" if trained else "")
    return f"{length:,} tokens, {length / trained:.3g} times the training length"


def bucket_edges(positions: int, buckets: int) -> list[int]:
    """Edges of at most `buckets` ranges over 0..positions, as even as possible in log position."""
    raw = np.geomspace(1, positions, min(buckets, positions)).round().astype(int)
    return [0, *sorted(set(raw.tolist()))]

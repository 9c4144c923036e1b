"""Bar charts: bars side by side, or one bar cut into its parts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from clearhead.analysis.sections import BarChart, BarSeries
from clearhead.report.drawing.frame import (
    WHITE,
    Arms,
    floats,
    ink,
    legend,
    new_figure,
    place_of,
    reference_lines,
    y_axis,
)
from clearhead.report.palette import ARMS, MUTED, PAPER, PARTS, RULE, TEXT


def _error(values: Sequence[float], series: BarSeries) -> list[list[float]] | None:
    if series.low is None or series.high is None:
        return None
    low, high = floats(series.low), floats(series.high)
    below = [max(0.0, value - bound) for value, bound in zip(values, low, strict=True)]
    above = [max(0.0, bound - value) for value, bound in zip(values, high, strict=True)]
    return [below, above]


def _filling(series: BarSeries, arms: Arms, index: int) -> dict[str, Any]:
    """Colour of a bar, hatched from the ninth arm on, where the colours begin anew."""
    anew = place_of(series.arm, arms, index) >= len(ARMS)
    return {
        "facecolor": ink(series.arm, arms, index).light,
        "edgecolor": PAPER.light,
        "linewidth": 0.0,
        "hatch": "////" if anew else None,
    }


def draw_bars(chart: BarChart, arms: Arms) -> Figure:
    """Bars side by side; with a single group every bar is named below it and no legend is needed."""
    figure = new_figure(2.9)
    axes = figure.add_subplot()
    count = max(1, len(chart.series))
    width = 0.8 / count
    single = len(chart.groups) == 1
    for index, series in enumerate(chart.series):
        values = floats(series.values)
        x = np.arange(len(values)) + (index - (count - 1) / 2) * width
        axes.bar(
            x,
            values,
            width * (0.72 if single else 0.9),
            **_filling(series, arms, index),
            yerr=_error(values, series),
            error_kw={"ecolor": TEXT.light, "elinewidth": 1.0, "capsize": 2.5, "capthick": 1.0},
        )
        for place, value in zip(x, values, strict=True):
            if np.isnan(value):
                axes.annotate(
                    "–", (place, 0), (0, 3), textcoords="offset points", ha="center", color=MUTED.light
                )
    y_axis(axes, chart.y_label, chart.y_range)
    axes.axhline(0, color=RULE.light, linewidth=0.8)
    if single:
        axes.set_xticks([(i - (count - 1) / 2) * width for i in range(count)], [s.name for s in chart.series])
        axes.tick_params(axis="x", labelcolor=TEXT.light)
    else:
        axes.set_xticks(range(len(chart.groups)), chart.groups)
        legend(
            figure,
            [Patch(**_filling(s, arms, i), label=s.name) for i, s in enumerate(chart.series)],
        )
    reference_lines(axes, chart.references)
    return figure


def draw_stack(chart: BarChart) -> Figure:
    """One horizontal bar per group, cut into its parts; parts that are wide enough carry their number."""
    figure = new_figure(0.95 + 0.4 * len(chart.groups))
    axes = figure.add_subplot()
    rows = np.arange(len(chart.groups))
    left = np.zeros(len(rows))
    handles = []
    for index, series in enumerate(chart.series):
        values = np.nan_to_num(np.asarray(floats(series.values)))
        color = PARTS[index % len(PARTS)].light
        axes.barh(rows, values, 0.66, left=left, color=color, edgecolor=PAPER.light, linewidth=0.8)
        handles.append(Patch(color=color, label=series.name))
        for row, (start, value) in enumerate(zip(left, values, strict=True)):
            if value >= 0.08:
                text = WHITE if index == 0 else TEXT.light
                axes.text(
                    start + value / 2, row, f"{value:.2f}", ha="center", va="center", color=text, fontsize=8
                )
        left = left + values
    axes.set_yticks(rows, chart.groups)
    axes.invert_yaxis()
    axes.tick_params(length=0)
    axes.tick_params(axis="y", labelcolor=TEXT.light)
    axes.grid(axis="y", visible=False)
    axes.set_xlabel(chart.y_label)
    axes.set_xlim(0, max(1.0, float(left.max(initial=1.0))))
    for side in ("left", "bottom"):
        axes.spines[side].set_visible(False)
    legend(figure, handles)
    return figure

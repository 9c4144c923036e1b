"""Heat maps: panels of cells whose strength of colour is their value."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from clearhead.analysis.sections import HeatMap, Panel
from clearhead.report.drawing.frame import WHITE, new_figure
from clearhead.report.palette import HEAT, MUTED, RULE, TEXT

INK_ON_HEAT = 0.55


def draw_heat(chart: HeatMap) -> Figure:
    """Panels side by side, two in a row (one when they are wide); a cell's strength of colour is its value."""
    columns = 1 if len(chart.panels) == 1 or max(len(panel.columns) for panel in chart.panels) > 6 else 2
    lines = -(-len(chart.panels) // columns)
    height = max(len(panel.rows) for panel in chart.panels) * 0.23 + 0.62
    figure = new_figure(lines * height)
    grid = figure.subplots(lines, columns, squeeze=False)
    place: Callable[[float], float] = lambda value: (value - chart.low) / (chart.high - chart.low)  # noqa: E731
    for index, axes in enumerate(grid.flat):
        if index >= len(chart.panels):
            axes.set_axis_off()
            continue
        _draw_panel(axes, chart.panels[index], place)
        if index % columns == 0:
            axes.set_ylabel(chart.y_label)
        else:
            axes.set_yticklabels([])
        if index // columns == lines - 1:
            axes.set_xlabel(chart.x_label)
    return figure


def _draw_panel(axes: Axes, panel: Panel, place: Callable[[float], float]) -> None:
    axes.set_title(panel.title, fontsize=9, loc="left", color=TEXT.light, pad=4)
    for row, values in enumerate(panel.values):
        for column, value in enumerate(values):
            strength = 0.0 if value is None else float(np.clip(place(value), 0, 1))
            axes.add_patch(
                Rectangle(
                    (column - 0.5, row - 0.5), 1, 1, facecolor="none", edgecolor=RULE.light, linewidth=0.6
                )
            )
            axes.add_patch(
                Rectangle(
                    (column - 0.47, row - 0.47), 0.94, 0.94, facecolor=HEAT.light, alpha=strength, linewidth=0
                )
            )
            text = "–" if value is None else f"{value:.2f}"
            color = WHITE if strength > INK_ON_HEAT else MUTED.light if value is None else TEXT.light
            axes.text(column, row, text, ha="center", va="center", fontsize=8, color=color)
    axes.set_xlim(-0.5, len(panel.columns) - 0.5)
    axes.set_ylim(len(panel.rows) - 0.5, -0.5)
    axes.set_xticks(range(len(panel.columns)), panel.columns)
    axes.set_yticks(range(len(panel.rows)), panel.rows)
    axes.tick_params(length=0)
    axes.grid(visible=False)
    for spine in axes.spines.values():
        spine.set_visible(False)

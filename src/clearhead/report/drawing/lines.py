"""Line charts: one series a line, with its band and marks, linear or logarithmic in x."""

from __future__ import annotations

import numpy as np
from matplotlib.figure import Figure

from clearhead.analysis.sections import LineChart
from clearhead.report.drawing.axes import FEW_TICKS, log_axis, log_values
from clearhead.report.drawing.frame import (
    Arms,
    floats,
    ink,
    legend,
    new_figure,
    place_of,
    reference_lines,
    y_axis,
)
from clearhead.report.palette import ARMS, MARKERS


def draw_lines(chart: LineChart, arms: Arms) -> Figure:
    figure = new_figure(3.05)
    axes = figure.add_subplot()
    handles = []
    for index, series in enumerate(chart.series):
        color = ink(series.arm, arms, index).light
        place = place_of(series.arm, arms, index)
        marker = MARKERS[place % len(MARKERS)] if chart.markers and series.drawn != "line" else None
        x, y = np.asarray(series.x, dtype=float), np.asarray(floats(series.y))
        style = "steps-post" if chart.step else "default"
        if series.low is not None and series.high is not None and not chart.bands_left_out:
            low, high = floats(series.low), floats(series.high)
            axes.fill_between(
                x, low, high, step="post" if chart.step else None, color=color, alpha=0.13, linewidth=0
            )
        (line,) = axes.plot(
            x,
            y,
            color=color,
            drawstyle=style,
            # The colours begin anew with the ninth arm.
            linestyle="none"
            if series.drawn == "points"
            else "solid"
            if place < len(ARMS)
            else (0, (2.2, 1.6)),
            marker=marker,
            markersize=4.5,
            markeredgewidth=0,
            label=series.name,
        )
        if series.drawn != "line":
            handles.append(line)
    y_axis(axes, chart.y_label, chart.y_range)
    axes.set_xlabel(chart.x_label)
    axes.margins(x=0.02)
    values = sorted({float(x) for series in chart.series for x in series.x})
    if chart.log_x:
        log_axis(axes, values)
    elif chart.markers and len(values) <= FEW_TICKS:
        axes.set_xticks(values)
    if chart.log_y:
        log_values(axes)
    reference_lines(axes, chart.references)
    legend(figure, handles)
    return figure

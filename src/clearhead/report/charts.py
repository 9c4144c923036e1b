"""Chart values drawn with matplotlib: inline SVG that follows the page's colours, PDF and PNG for a paper.

Figures are made object by object on the Agg canvas; no global figure state, no display, no network. An SVG keeps its
text as text and refers to the page's CSS variables for colour, so it reads in light and dark and can be searched.
"""

from __future__ import annotations

import io
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from cycler import cycler
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch, Rectangle

from clearhead.analysis.sections import (
    BarChart,
    BarSeries,
    Chart,
    HeatMap,
    LineChart,
    Panel,
    Reference,
    Values,
)
from clearhead.data.writing import writing
from clearhead.report.axes import FEW_TICKS, log_axis, log_values
from clearhead.report.palette import ARMS, HEAT, MARKERS, MUTED, PAPER, PARTS, RULE, TEXT, Ink, all_inks

WIDTH = 4.7
"""Inches of every chart: about 450 pixels on a page, readable at the 350 of a phone."""
INK_ON_HEAT = 0.55
WHITE = "#fffffe"
"""White on a strong colour, light or dark page: not the colour of the paper, which changes."""
LEGEND_CHARACTERS = 54
LEGEND_ROW = 0.18
"""Inches."""

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

Arms = Mapping[str, Ink]


@contextmanager
def _style() -> Iterator[None]:
    # `default` first: a user's matplotlibrc must not reach into the report.
    with matplotlib.rc_context(rc=dict(matplotlib.rcParamsDefault), fname=None):
        matplotlib.rcParams.update(STYLE)
        yield


def render(chart: Chart, arms: Arms, folder: Path) -> str:
    """Draw a chart, write `folder/<slug>.pdf` and `.png`, and return the SVG to put into the page."""
    with _style():
        figure = draw(chart, arms)
        # The layout is the slow part: solve it once for the three files.
        figure.draw_without_rendering()
        figure.set_layout_engine("none")
        folder.mkdir(parents=True, exist_ok=True)
        # No dates in the files: the same results give the same bytes.
        for kind, metadata in (("pdf", {"CreationDate": None}), ("png", {})):
            # To memory first: on a full disk matplotlib's own writers fail with something else.
            drawn = io.BytesIO()
            figure.savefig(drawn, format=kind, facecolor=PAPER.light, metadata=metadata)
            with writing(folder / f"{chart.slug}.{kind}"):
                (folder / f"{chart.slug}.{kind}").write_bytes(drawn.getvalue())
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    return to_page(buffer.getvalue(), chart.slug, f"{chart.title}. {chart.caption}".strip())


def draw(chart: Chart, arms: Arms) -> Figure:
    """The matplotlib figure of a chart."""
    if isinstance(chart, LineChart):
        return _draw_lines(chart, arms)
    if isinstance(chart, BarChart):
        return _draw_stack(chart) if chart.stacked else _draw_bars(chart, arms)
    return _draw_heat(chart)


def to_page(svg: str, slug: str, label: str) -> str:
    """An SVG file as an element of the page: page colours, page font, unique ids, an accessible name, no fixed size."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    for ink in all_inks():
        svg = re.sub(re.escape(ink.light), f"var(--{ink.name})", svg, flags=re.IGNORECASE)
    svg = re.sub(r"font-family: [^;\"]*", "font-family: inherit", svg)
    svg = re.sub(r"(font: (?:[\w.]+ )*[\d.]+px) [^;\"]*", r"\1 var(--font)", svg)
    svg = re.sub(r'\bid="([^"]+)"', rf'id="{slug}-\1"', svg)
    svg = re.sub(r"url\(#([^)]+)\)", rf"url(#{slug}-\1)", svg)
    svg = re.sub(r'xlink:href="#([^"]+)"', rf'href="#{slug}-\1"', svg)
    opening, rest = svg.split(">", 1)
    opening = re.sub(r' (?:width|height|xmlns:xlink|xmlns|version)="[^"]*"', "", opening)
    return f'{opening} role="img" aria-label="{_attribute(label)}">{rest.strip()}'


def _attribute(text: str) -> str:
    return text.replace("&", "&amp;").replace('"', "&quot;").replace("<", "&lt;")


def _figure(height: float) -> Figure:
    figure = Figure(figsize=(WIDTH, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def _floats(values: Values) -> list[float]:
    return [np.nan if value is None else float(value) for value in values]


def _ink(arm: str | None, arms: Arms, index: int) -> Ink:
    return arms[arm] if arm is not None and arm in arms else PARTS[index % len(PARTS)]


def _place(arm: str | None, arms: Arms, index: int) -> int:
    return list(arms).index(arm) if arm is not None and arm in arms else index


def _legend(figure: Figure, handles: Sequence[Line2D | Patch]) -> None:
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


NAME_HEIGHT = 0.06
"""Of the axis, what the name of a reference line takes."""


def _references(axes: Axes, references: Sequence[Reference]) -> None:
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


def _y_axis(axes: Axes, label: str, limits: tuple[float, float] | None) -> None:
    axes.set_ylabel(label)
    axes.grid(axis="x", visible=False)
    axes.tick_params(length=0)
    axes.spines["left"].set_visible(False)
    if limits is not None:
        room = 0.04 * (limits[1] - limits[0])
        axes.set_ylim(limits[0] - room, limits[1] + room)


def _draw_lines(chart: LineChart, arms: Arms) -> Figure:
    figure = _figure(3.05)
    axes = figure.add_subplot()
    handles = []
    for index, series in enumerate(chart.series):
        color = _ink(series.arm, arms, index).light
        place = _place(series.arm, arms, index)
        marker = MARKERS[place % len(MARKERS)] if chart.markers and series.drawn != "line" else None
        x, y = np.asarray(series.x, dtype=float), np.asarray(_floats(series.y))
        style = "steps-post" if chart.step else "default"
        if series.low is not None and series.high is not None and not chart.bands_left_out:
            low, high = _floats(series.low), _floats(series.high)
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
    _y_axis(axes, chart.y_label, chart.y_range)
    axes.set_xlabel(chart.x_label)
    axes.margins(x=0.02)
    values = sorted({float(x) for series in chart.series for x in series.x})
    if chart.log_x:
        log_axis(axes, values)
    elif chart.markers and len(values) <= FEW_TICKS:
        axes.set_xticks(values)
    if chart.log_y:
        log_values(axes)
    _references(axes, chart.references)
    _legend(figure, handles)
    return figure


def _error(values: Sequence[float], series: BarSeries) -> list[list[float]] | None:
    if series.low is None or series.high is None:
        return None
    low, high = _floats(series.low), _floats(series.high)
    below = [max(0.0, value - bound) for value, bound in zip(values, low, strict=True)]
    above = [max(0.0, bound - value) for value, bound in zip(values, high, strict=True)]
    return [below, above]


def _draw_bars(chart: BarChart, arms: Arms) -> Figure:
    """Bars side by side; with a single group every bar is named below it and no legend is needed."""
    figure = _figure(2.9)
    axes = figure.add_subplot()
    count = max(1, len(chart.series))
    width = 0.8 / count
    single = len(chart.groups) == 1
    for index, series in enumerate(chart.series):
        values = _floats(series.values)
        x = np.arange(len(values)) + (index - (count - 1) / 2) * width
        axes.bar(
            x,
            values,
            width * (0.72 if single else 0.9),
            color=_ink(series.arm, arms, index).light,
            yerr=_error(values, series),
            error_kw={"ecolor": TEXT.light, "elinewidth": 1.0, "capsize": 2.5, "capthick": 1.0},
        )
        for place, value in zip(x, values, strict=True):
            if np.isnan(value):
                axes.annotate(
                    "–", (place, 0), (0, 3), textcoords="offset points", ha="center", color=MUTED.light
                )
    _y_axis(axes, chart.y_label, chart.y_range)
    axes.axhline(0, color=RULE.light, linewidth=0.8)
    if single:
        axes.set_xticks([(i - (count - 1) / 2) * width for i in range(count)], [s.name for s in chart.series])
        axes.tick_params(axis="x", labelcolor=TEXT.light)
    else:
        axes.set_xticks(range(len(chart.groups)), chart.groups)
        _legend(
            figure,
            [Patch(color=_ink(s.arm, arms, i).light, label=s.name) for i, s in enumerate(chart.series)],
        )
    _references(axes, chart.references)
    return figure


def _draw_stack(chart: BarChart) -> Figure:
    """One horizontal bar per group, cut into its parts; parts that are wide enough carry their number."""
    figure = _figure(0.95 + 0.4 * len(chart.groups))
    axes = figure.add_subplot()
    rows = np.arange(len(chart.groups))
    left = np.zeros(len(rows))
    handles = []
    for index, series in enumerate(chart.series):
        values = np.nan_to_num(np.asarray(_floats(series.values)))
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
    _legend(figure, handles)
    return figure


def _draw_heat(chart: HeatMap) -> Figure:
    """Panels side by side, two in a row (one when they are wide); a cell's strength of colour is its value."""
    columns = 1 if len(chart.panels) == 1 or max(len(panel.columns) for panel in chart.panels) > 6 else 2
    lines = -(-len(chart.panels) // columns)
    height = max(len(panel.rows) for panel in chart.panels) * 0.23 + 0.62
    figure = _figure(lines * height)
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

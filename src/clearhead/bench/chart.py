"""A run's ratios as one chart: a row a case, a mark a peer, quartiles as bars."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

from clearhead.report.drawing.frame import STYLE
from clearhead.report.palette import ARMS, MARKERS, MUTED, PAPER, TEXT, Ink

WIDTH = 7.2
ROW = 0.42
Entry = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class _Panel:
    """One axis of ratios; `value` gives (median, q1, q3) of an entry, or None where it does not belong here."""

    label: str
    value: Callable[[Entry], tuple[float, float, float] | None]


def draw(entries: Sequence[Entry], beside: Path) -> tuple[Path, Path]:
    """Write the chart of `entries` (lines of results) as .png and .svg beside `beside`; returns both paths."""
    found = beside.with_suffix(".png"), beside.with_suffix(".svg")
    # `default` first: a user's matplotlibrc must not reach into the chart.
    with matplotlib.rc_context(rc=dict(matplotlib.rcParamsDefault), fname=None):
        matplotlib.rcParams.update(STYLE)
        figure = _figure(entries)
        figure.savefig(found[0], facecolor=PAPER.light)
        figure.savefig(found[1], facecolor=PAPER.light, metadata={"Date": None, "Creator": None})
    return found


def _time(entry: Entry) -> tuple[float, float, float] | None:
    ratio = entry["ratio"]
    return (ratio["median"], ratio["q1"], ratio["q3"]) if ratio and entry["time_ms"] else None


def _memory(entry: Entry) -> tuple[float, float, float] | None:
    return (entry["ratio"]["median"],) * 3 if entry["ratio"] and entry["extra_bytes"] is not None else None


def _reads(entry: Entry) -> tuple[float, float, float] | None:
    found = entry["over_reading_kv"]
    return (found["median"], found["q1"], found["q3"]) if found else None


PANELS = (
    _Panel("time over the reference's (quartiles of the ratios by round)", _time),
    _Panel("peak memory over the reference's", _memory),
    _Panel("time over reading K and V once at the speed of a copy (quartiles by round)", _reads),
)


def _figure(entries: Sequence[Entry]) -> Figure:
    panels = [panel for panel in PANELS if any(panel.value(entry) for entry in entries)]
    rows = [_names(panel, entries) for panel in panels]
    looks = _looks([entry for entry in entries if any(panel.value(entry) for panel in panels)])
    figure = Figure(
        figsize=(WIDTH, 0.9 + sum(0.6 + ROW * len(names) for names in rows)), layout="constrained"
    )
    FigureCanvasAgg(figure)
    ratios = [1 + len(names) for names in rows]
    grid = figure.subplots(len(panels), 1, squeeze=False, height_ratios=ratios)
    for axes, panel, names in zip(grid[:, 0], panels, rows, strict=True):
        _draw(axes, panel, names, entries, looks)
    handles = [
        Line2D([], [], color=ink.light, marker=marker, linestyle="", markersize=5, label=peer)
        for peer, (ink, marker) in looks.items()
    ]
    figure.legend(handles=handles, loc="outside upper left", ncols=4, handlelength=1.2, columnspacing=1.2)
    return figure


def _names(panel: _Panel, entries: Sequence[Entry]) -> list[str]:
    return list(dict.fromkeys(entry["case"]["name"] for entry in entries if panel.value(entry)))


def _looks(entries: Sequence[Entry]) -> dict[str, tuple[Ink, str]]:
    """Colour and mark by peer; references, of which each case has one, are grey."""
    references = list(dict.fromkeys(entry["reference"] for entry in entries))
    others = [peer for peer in dict.fromkeys(entry["peer"] for entry in entries) if peer not in references]
    drawn = dict.fromkeys(references, (ARMS[0], MARKERS[0]))
    for index, peer in enumerate(others):
        place = 1 + index % (len(ARMS) - 1)
        drawn[peer] = ARMS[place], MARKERS[(index + 1) % len(MARKERS)]
    return drawn


def _draw(
    axes: Axes,
    panel: _Panel,
    names: Sequence[str],
    entries: Sequence[Entry],
    looks: Mapping[str, tuple[Ink, str]],
) -> None:
    for entry in entries:
        value = panel.value(entry)
        if value is None:
            continue
        # Peers of a case a little above each other, so that equal ones stay visible.
        name = entry["case"]["name"]
        peers = [other["peer"] for other in entries if other["case"]["name"] == name]
        y = names.index(name) + 0.6 * ((peers.index(entry["peer"]) + 0.5) / len(peers) - 0.5)
        ink, marker = looks[entry["peer"]]
        median, low, high = value
        axes.plot([low, high], [y, y], color=ink.light, linewidth=1.2)
        axes.plot([median], [y], color=ink.light, marker=marker, markersize=5, markeredgewidth=0)
    axes.axvline(1.0, color=MUTED.light, linewidth=0.9, linestyle=(0, (3, 3)), zorder=1)
    axes.set_xscale("log")
    axes.xaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.set_yticks(range(len(names)), names)
    axes.tick_params(which="both", length=0)
    axes.tick_params(axis="y", labelcolor=TEXT.light)
    axes.set_ylim(len(names) - 0.5, -0.5)
    axes.grid(axis="y", visible=False)
    axes.set_xlabel(panel.label)

"""What an evaluation hands to the report: sentences, charts and tables as plain values, nothing about drawing.

Numbers are `float | None`; `None` is a missing value and stays visible as one. Every curve, bar or panel that
belongs to an arm carries the arm's name, so that an arm has one colour throughout a report.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

from clearhead.analysis.statistics import Estimate

Values = Sequence[float | None]


MOST_BANDS = 6
"""Lines of one chart that are drawn with their intervals."""


@dataclass(frozen=True)
class Series:
    """One curve; `low` and `high` span a band around it. A "line" alone has no markers and no place in the legend."""

    name: str
    x: Sequence[float]
    y: Values
    low: Values | None = None
    high: Values | None = None
    arm: str | None = None
    drawn: Literal["both", "points", "line"] = "both"


@dataclass(frozen=True)
class Reference:
    """A dashed line across a chart: a chance level (`axis="y"`) or the training length (`axis="x"`)."""

    label: str
    value: float
    axis: Literal["x", "y"] = "y"


@dataclass(frozen=True)
class LineChart:
    slug: str
    title: str
    x_label: str
    y_label: str
    series: Sequence[Series]
    caption: str = ""
    log_x: bool = False
    log_y: bool = False
    step: bool = False
    markers: bool = False
    y_range: tuple[float, float] | None = None
    references: Sequence[Reference] = ()

    @property
    def bands_left_out(self) -> bool:
        """Intervals as bands over one another cannot be read, nor what lies under them."""
        return len(self.series) > MOST_BANDS and any(series.low is not None for series in self.series)


@dataclass(frozen=True)
class BarSeries:
    """One colour of a grouped chart: a value per group, with error bars where `low` and `high` are given."""

    name: str
    values: Values
    low: Values | None = None
    high: Values | None = None
    arm: str | None = None


@dataclass(frozen=True)
class BarChart:
    """Grouped bars, or one stacked bar per group (parts of a whole, drawn horizontally)."""

    slug: str
    title: str
    y_label: str
    groups: Sequence[str]
    series: Sequence[BarSeries]
    caption: str = ""
    stacked: bool = False
    y_range: tuple[float, float] | None = None
    references: Sequence[Reference] = ()


@dataclass(frozen=True)
class Panel:
    """One heat map: `values[row][column]` in 0..1 and the sides' ticks; rows run from top to bottom."""

    title: str
    columns: Sequence[str]
    rows: Sequence[str]
    values: Sequence[Values]
    arm: str | None = None


@dataclass(frozen=True)
class HeatMap:
    slug: str
    title: str
    x_label: str
    y_label: str
    panels: Sequence[Panel]
    caption: str = ""
    low: float = 0.0
    high: float = 1.0


Chart = LineChart | BarChart | HeatMap


@dataclass(frozen=True)
class SectionTable:
    """Cells are text; `None` is shown as missing. The first column names the row."""

    title: str
    headers: Sequence[str]
    rows: Sequence[Sequence[str | None]]
    caption: str = ""


@dataclass(frozen=True)
class Headline:
    """One arm's number for the first screen. `text` overrides the number (a median that was not reached)."""

    arm: str
    estimate: Estimate | None
    verdict: str = ""
    text: str = ""
    detail: str = ""


@dataclass(frozen=True)
class Section:
    """One question of the report and everything that answers it.

    `answer` is a plain sentence with its uncertainty; `measure` names the number in `headlines`, with ↑ or ↓ for
    what is better (it heads a column of the summary's table); `digits` are its decimals. `missing` marks a section
    without results.
    """

    slug: str
    title: str
    question: str
    answer: str
    measure: str = ""
    digits: int = 2
    headlines: Sequence[Headline] = ()
    charts: Sequence[Chart] = ()
    tables: Sequence[SectionTable] = ()
    notes: Sequence[str] = field(default_factory=tuple)
    missing: bool = False

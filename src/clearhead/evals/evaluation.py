"""What an evaluation is: its options, how it measures a trained model, and its section of the report.

One evaluation is one file with a subclass of `Evaluation` and one line in `registry.EVALUATIONS`. `run`
returns plain JSON values; `section` reads the values of all arms and seeds back from disk. The two never meet in
memory, so a report can be made on another machine, long after, from the files alone.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, Any, ClassVar, Generic, TypeVar

from pydantic import BaseModel, ConfigDict

from clearhead.analysis.sections import (
    BarChart,
    BarSeries,
    Chart,
    Headline,
    HeatMap,
    LineChart,
    Panel,
    Reference,
    Section,
    Series,
    Table,
)
from clearhead.evals.subject import Subject
from clearhead.runs.results import ArmResults, RunResults, SeedResults, load_run

if TYPE_CHECKING:
    pass

__all__ = [
    "ArmResults",
    "BarChart",
    "BarSeries",
    "Chart",
    "Evaluation",
    "EvaluationConfig",
    "Headline",
    "HeatMap",
    "LineChart",
    "Panel",
    "Reference",
    "RunResults",
    "Section",
    "SeedResults",
    "Series",
    "Subject",
    "Table",
    "load_run",
]


class EvaluationConfig(BaseModel):
    """Base of an evaluation's options: unknown names are errors."""

    model_config = ConfigDict(extra="forbid", frozen=True)


C = TypeVar("C", bound=EvaluationConfig)


class Evaluation(ABC, Generic[C]):
    """One measurement. `name` is its key in the registry and in `[evaluate.<name>]` of a recipe."""

    name: ClassVar[str]
    Config: type[C]
    tells_overflow: ClassVar[bool] = False
    """Whether its values say themselves where the model's logits were no numbers."""

    @abstractmethod
    def run(self, subject: Subject, config: C) -> dict[str, Any]:
        """Measure one trained model. Returns JSON values; `{"skipped": reason}` when it cannot be measured."""

    @abstractmethod
    def section(self, run: RunResults) -> Section:
        """The report's section from the values of all arms and seeds; missing ones are shown as missing."""

    def remark(self, values: dict[str, Any]) -> str:
        """A line for the terminal about what was measured, such as what it has cost; empty where there is none."""
        return ""

    def missing(self, run: RunResults, title: str, question: str) -> Section:
        """The section of an evaluation that has no values at all, with the reason when there is one."""
        reasons = run.skipped(self.name)
        answer = "Not measured: " + "; ".join(reasons) + "." if reasons else "No results yet."
        return Section(self.name, title, question, answer, missing=True)

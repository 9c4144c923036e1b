"""What an evaluation is: its options, its values, how it measures a trained model, and its section of the report.

One evaluation is one file with a subclass of `Evaluation` (most are a `CellEvaluation` of `evals.cells`) and one line
in `registry.EVALUATIONS`. `run` returns plain JSON values; `section` reads the values of all arms and seeds back from
disk, as the same typed `Result`. The two never meet in memory, so a report can be made on another machine, long after,
from the files alone.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, ClassVar, Generic, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError

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
    SectionTable,
    Series,
)
from clearhead.evals.asking.sample_log import Say
from clearhead.evals.reasons import Unmeasured
from clearhead.evals.subject import Subject
from clearhead.runs.results import ArmResults, RunResults, SeedResults, Skipped, load_run

__all__ = [
    "ArmResults",
    "BarChart",
    "BarSeries",
    "Chart",
    "Evaluation",
    "EvaluationConfig",
    "EvaluationResult",
    "Headline",
    "HeatMap",
    "LineChart",
    "Panel",
    "Reference",
    "RunResults",
    "Say",
    "Section",
    "SectionTable",
    "SeedResults",
    "Series",
    "Skipped",
    "Subject",
    "Unmeasured",
    "load_run",
]


class EvaluationConfig(BaseModel):
    """Base of an evaluation's options: unknown names are errors."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class EvaluationResult(BaseModel):
    """Base of an evaluation's values and of their parts, in the order in which they are written.

    Keys that other versions have written are passed over; a field that earlier ones have not needs a default. What has
    its default by itself is not written.
    """

    model_config = ConfigDict(extra="ignore", frozen=True)

    def values(self) -> dict[str, Any]:
        """As JSON values."""
        return self.model_dump(exclude_unset=True, by_alias=True)


C = TypeVar("C", bound=EvaluationConfig)
R = TypeVar("R", bound=EvaluationResult)


class Evaluation(ABC, Generic[C, R]):
    """One measurement. `name` is its key in the registry and in `[evaluate.<name>]` of a recipe."""

    name: ClassVar[str]
    Config: type[C]
    Result: type[R]
    tasks: ClassVar[tuple[str, ...]] = ("causal",)
    """The tasks whose models it can be asked of; those of others have no value, and the reason says why."""
    tells_overflow: ClassVar[bool] = False
    """Whether its values say themselves where the model's logits were no numbers."""

    @abstractmethod
    def result(self, subject: Subject, config: C, progress: Say | None = None) -> R:
        """Measure one trained model. Raises Unmeasured, with the reason, when it cannot be."""

    def run(self, subject: Subject, config: C, progress: Say | None = None) -> dict[str, Any]:
        """`result` as JSON values; those of `Skipped` when the model cannot be measured."""
        if (reason := self.not_asked(subject)) is not None:
            return Skipped(reason).values()
        try:
            return self.result(subject, config, progress).values()
        except Unmeasured as reason:
            return Skipped(str(reason)).values()

    def not_asked(self, subject: Subject) -> str | None:
        """Why this cannot be asked of a model that was trained for something else; None if it can."""
        if subject.task in self.tasks:
            return None
        from clearhead.models.tasks import TASKS

        asked = " or ".join(TASKS[task].what for task in self.tasks if task in TASKS)
        return f"{self.name} asks {asked}; this model is {TASKS[subject.task].what}"

    @abstractmethod
    def section(self, run: RunResults) -> Section:
        """The report's section from the values of all arms and seeds; missing ones are shown as missing."""

    def remark(self, values: dict[str, Any]) -> str:
        """A line for the terminal about what was measured, such as what it has cost; empty where there is none."""
        return ""

    def results(self, run: RunResults) -> dict[str, dict[int, R]]:
        """Arm name -> seed -> what was measured, as `RunResults.values`.

        Raises ValueError, naming arm, seed and field, for values that are not those of this evaluation.
        """
        return {
            arm: {seed: self.read(values, f"{arm}, seed {seed}") for seed, values in seeds.items()}
            for arm, seeds in run.values(self.name).items()
        }

    def read(self, values: Mapping[str, Any], where: str = "the result") -> R:
        """Values from disk as what they are. Raises ValueError as `results`."""
        try:
            return self.Result.model_validate(values)
        except ValidationError as error:
            detail = error.errors()[0]
            key = ".".join(map(str, detail["loc"]))
            raise ValueError(
                f"{where}: results/{self.name}.json holds no values of {self.name} ({key}: {detail['msg'].lower()}); "
                "delete it and evaluate again"
            ) from None

    def missing(self, run: RunResults, title: str, question: str) -> Section:
        """The section of an evaluation that has no values at all, with the reason when there is one."""
        reasons = run.skipped(self.name)
        answer = "Not measured: " + "; ".join(reasons) + "." if reasons else "No results yet."
        return Section(self.name, title, question, answer, missing=True)

"""What the results of both evaluations of learning in context share."""

from __future__ import annotations

from typing import Any, Generic, TypeVar

from clearhead.evals.evaluation import EvaluationResult
from clearhead.evals.in_context.scoring import Score


class AskedSet(EvaluationResult):
    """What the report says of a set. majority: the share of its most frequent label. form: of a demonstration."""

    set: str
    labels: int
    majority: float
    pool: int
    asked: int
    form: str
    repeated: int
    ambiguous: int


class InSet(EvaluationResult):
    set: str


class LabelledAnswer(EvaluationResult):
    """One answer, word for word."""

    index: int
    asked: str
    label: str
    answer: str
    right: bool


S = TypeVar("S", bound=AskedSet)
E = TypeVar("E", bound=LabelledAnswer)


class InContextResult(EvaluationResult, Generic[S, E]):
    """left_out: why sets or parts of them are not there."""

    sets: list[S]
    left_out: dict[str, str]
    examples: list[E]
    score: Score
    bos: str | None
    rope_parameters: dict[str, Any] | None

    def of(self, name: str) -> S | None:
        """A set's values, None where it was not measured."""
        return next((one for one in self.sets if one.set == name), None)

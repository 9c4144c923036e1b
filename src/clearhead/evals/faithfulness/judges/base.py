"""What a judge is: it reads a document and what a model said of it, and decides whether it is free of hallucination."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Generic, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError

from clearhead.registry import did_you_mean, resolve
from clearhead.runs.secrets import redacted

Task = Literal["summarisation", "qa"]


class JudgeError(ValueError):
    """A judge cannot work: one sentence that says what to change. What it has judged so far is kept."""


class JudgeConfig(BaseModel):
    """Base of a judge's options (`judge_options`): unknown names are errors."""

    model_config = ConfigDict(extra="forbid", frozen=True)


C = TypeVar("C", bound=JudgeConfig)


@dataclass(frozen=True)
class Case:
    """One answer to judge. references: right answers, or a summary written by a person. question: of the task qa."""

    task: Task
    document: str
    references: tuple[str, ...]
    proposed: str
    question: str = ""


@dataclass(frozen=True)
class Judgement:
    """faithful: free of hallucination; None where the judge did not decide. reason: its words, or why it did not."""

    faithful: bool | None
    reason: str


class Judge(ABC, Generic[C]):
    """One way of judging. `name` is its key in the registry.

    A judge answers for the cases alone: nothing of the model that is judged, or of the order, may change a verdict.
    """

    name: ClassVar[str]
    Config: type[C]

    def __init__(self, config: C) -> None:
        self.config = config

    @abstractmethod
    def prepare(self) -> None:
        """Everything that can go wrong before a case is read goes wrong here (JudgeError), before time is spent."""

    @abstractmethod
    def judge(self, cases: Sequence[Case]) -> Iterator[tuple[int, Judgement]]:
        """(index in `cases`, verdict) as they are reached, every index once. Raises JudgeError to end the run."""

    @abstractmethod
    def described(self) -> str:
        """A clause for the report: who judged, and how."""

    def usage(self) -> dict[str, Any]:
        """What judging has cost so far; empty where it costs nothing but time."""
        return {}

    def spent(self) -> str:
        """`usage` as a sentence; empty where there is nothing to say."""
        return ""


def make_judge(name: str, options: dict[str, Any]) -> Judge[Any]:
    """The judge `name` with checked options; ValueError with the nearest name for what is not known."""
    kind: type[Judge[Any]] = resolve("judges", name)
    try:
        return kind(kind.Config.model_validate(options))
    except ValidationError as error:
        detail = error.errors()[0]
        key = ".".join(map(str, detail["loc"]))
        if detail["type"] == "extra_forbidden":
            known = list(kind.Config.model_fields)
            raise ValueError(
                f"the judge {name!r} has no option {key!r}: {did_you_mean(key, known)}"
            ) from None
        where = f"judge_options.{key}: " if key else "judge_options: "
        raise ValueError(redacted(f"{where}{detail['msg'].removeprefix('Value error, ')}")) from None

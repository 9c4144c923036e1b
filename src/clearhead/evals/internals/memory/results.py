"""What the evaluation keeps of each cache."""

from __future__ import annotations

from pydantic import Field

from clearhead.evals.evaluation import EvaluationResult


class MemoryCell(EvaluationResult):
    """One cache. nats: of the rest of each text. correct: one character an answer, by the number of facts.

    bytes: of the cache behind a prompt, over all its tokens in 16 bits.
    """

    form: str
    bits: int | None = None
    policy: str | None = None
    rank: str | None = None
    budget: float | None = None
    bytes: float
    nats: list[float]
    correct: dict[str, str]


class MemoryResult(EvaluationResult):
    """cells: the whole cache first. skipped_cells: why others have no values. bytes: of the rest of each text."""

    cells: list[MemoryCell]
    skipped_cells: dict[str, str] = Field(default={})
    length: int
    prompt: int
    n: int
    documents: list[str]
    bytes: list[int]

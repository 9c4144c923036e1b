"""Many-shot in-context learning: is a text's label told from ever more demonstrations in the context?

After Bertsch et al. (In-Context Learning with Long-Context Models, arXiv 2405.00200), as in the Differential
Transformer paper (arXiv 2410.05258, section 3.5): 1, 2, 4, ... demonstrations until the context is full, the label
decoded among the set's labels alone (`in_context.scoring`). Which texts are asked and which
demonstrate is drawn before anything is tokenized (`in_context.rounds`). There are a few draws of
demonstrations, among which the asked texts are dealt; of one draw, 4 demonstrations are the first 4 of the 8, so all
its prompts begin with one text, which is read once.

Every answer is a line of `results/many_shot.jsonl`; an interrupted evaluation goes on after the last one.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from pydantic import Field, field_validator

from clearhead.analysis.sections import Section
from clearhead.evals.asking.sample_log import Row
from clearhead.evals.cells import LeftOut, Measured
from clearhead.evals.in_context.labelled import PUBLISHED, Example
from clearhead.evals.in_context.many_shot.section import (
    ManyShotAnswer,
    ManyShotResult,
    ManyShotSet,
    Point,
    many_shot_section,
)
from clearhead.evals.in_context.rounds import in_rounds
from clearhead.evals.in_context.shared import (
    Block,
    BlocksCell,
    InContextConfig,
    InContextEvaluation,
    LabelledTask,
    marks,
    shown,
    task_values,
)
from clearhead.evals.subject import Subject
from clearhead.runs.results import RunResults


class ManyShotConfig(InContextConfig):
    """sets: see `InContextConfig`; by default the four published ones.

    shots: numbers of demonstrations, and "full" for as many as fit into `length` (default: the powers of two below
        that, and "full").
    draws: of demonstrations, among which the asked texts are dealt; `items` gives each text its own.
    """

    sets: list[str] = Field(default=list(PUBLISHED), min_length=1)
    shots: list[int | Literal["full"]] | None = Field(default=None, min_length=1)
    draws: int = Field(default=5, ge=1)

    @field_validator("shots")
    @classmethod
    def _countable(cls, value: list[int | str] | None) -> list[int | str] | None:
        if any(isinstance(shots, int) and shots < 0 for shots in value or ()):
            raise ValueError("a number of demonstrations is 0 or more, or 'full'")
        return value


@dataclass(frozen=True, kw_only=True)
class Shots(BlocksCell):
    """A number of demonstrations, a block a draw. full: whether as many as fit."""

    shots: int
    full: bool


class ManyShot(InContextEvaluation[ManyShotConfig, ManyShotResult, Shots]):
    name = "many_shot"
    Config = ManyShotConfig
    Result = ManyShotResult
    keys = ("set", "shots", "draw", "index")

    def cells_of(self, config: ManyShotConfig, task: LabelledTask, length: int) -> Iterator[Shots | LeftOut]:
        draws = range(min(config.draws, len(task.asked)))
        orders = [in_rounds(task.pool, config.seed, draw) for draw in draws]
        full = min(most(task, order, length) for order in orders)
        wanted = numbers(config.shots, full)
        if not wanted:
            yield LeftOut(task.name, f"not one demonstration and a question fit into {length} tokens")
        for shots in wanted:
            name = f"{task.name}, {shots} demonstrations"
            if shots > len(task.pool):
                yield LeftOut(name, f"the set has {len(task.pool)} texts to demonstrate with")
                continue
            dealt = [range(draw, len(task.asked), len(orders)) for draw in draws]
            blocks = tuple(
                Block.of(task, (task.name, shots, draw), draw, orders[draw][:shots], dealt[draw])
                for draw in draws
            )
            needed = max(block.tokens for block in blocks) + task.trie.longest
            if needed > length:
                reason = f"a prompt and its answer have up to {needed} tokens, more than length {length}"
                yield LeftOut(name, reason)
                continue
            yield Shots(name=name, length=needed, task=task, blocks=blocks, shots=shots, full=shots == full)

    def gather(
        self, subject: Subject, config: ManyShotConfig, measured: Measured[Shots, list[Row]]
    ) -> ManyShotResult:
        sets: dict[str, tuple[LabelledTask, list[Point]]] = {}
        for cell, rows in measured.pairs:
            tokens = max(block.tokens for block in cell.blocks)
            point = Point(shots=cell.shots, full=cell.full, tokens=tokens, n=len(rows), correct=marks(rows))
            sets.setdefault(cell.task.name, (cell.task, []))[1].append(point)
        return ManyShotResult(
            sets=[ManyShotSet(**task_values(task), points=points) for task, points in sets.values()],
            left_out=measured.skipped,
            examples=[ManyShotAnswer.model_validate(row) for row in shown(measured.rows)],
            score=config.score,
            bos=measured.pairs[0][0].task.tokenizer.bos_token,
            rope_parameters=config.rope_parameters,
            length=config.length_for(subject),
            draws=config.draws,
            n=sum(point.n for _, points in sets.values() for point in points),
        )

    def section(self, run: RunResults) -> Section:
        title, question = (
            "Many-shot learning in context",
            "Does it learn from many demonstrations in its context?",
        )
        values = self.results(run)
        if not values:
            return self.missing(run, title, question)
        return many_shot_section(self.name, title, question, run, values)


def numbers(shots: Sequence[int | str] | None, full: int) -> list[int]:
    """Numbers of demonstrations in order, `full` of which fit."""
    if shots is None:
        return [*(2**k for k in range(full.bit_length()) if 2**k < full), *([full] if full else [])]
    return sorted({full if number == "full" else int(number) for number in shots})


def most(task: LabelledTask, order: Sequence[Example], length: int) -> int:
    """As many of `order` as fit into `length` tokens with the longest asked text and label of the set."""
    form, tokenizer = task.form, task.tokenizer
    bos = str(tokenizer.bos_token or "")
    alone = [form.demonstrations([example]) for example in order]
    sizes = [len(ids) for ids in tokenizer(alone, add_special_tokens=False)["input_ids"]]
    longest = max(range(len(task.asked)), key=lambda i: len(task.tails[i]))
    used = np.cumsum(sizes) + len(task.tails[longest]) + task.trie.longest + (1 if bos else 0)
    # Tokens may join where demonstrations meet, so the sum of their sizes only says where to begin.
    count = int((used <= length).sum())

    def fits(number: int) -> bool:
        block = Block.of(task, (), 0, order[:number], [longest])
        return block.tokens + task.trie.longest <= length

    while count and not fits(count):
        count -= 1
    while count < len(order) and fits(count + 1):
        count += 1
    return count

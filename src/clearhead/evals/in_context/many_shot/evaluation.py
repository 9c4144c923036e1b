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

from collections.abc import Sequence
from typing import Literal

import numpy as np
from pydantic import Field, field_validator

from clearhead.analysis.sections import Section
from clearhead.evals.asking.sample_log import SampleLog
from clearhead.evals.evaluation import Evaluation, Say
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
    InContextConfig,
    LabelledTask,
    answered,
    marks,
    measure,
    over_sets,
    task_values,
)
from clearhead.evals.reasons import Unmeasured, unless
from clearhead.evals.subject import Subject
from clearhead.runs.results import RunResults

KEYS = ("set", "shots", "draw")


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


class ManyShot(Evaluation[ManyShotConfig, ManyShotResult]):
    name = "many_shot"
    Config = ManyShotConfig
    Result = ManyShotResult

    def result(self, subject: Subject, config: ManyShotConfig, progress: Say | None = None) -> ManyShotResult:
        """Raises RecordError for a set that cannot be used: that is no property of the model."""

        def one(task: LabelledTask, log: SampleLog, left_out: dict[str, str]) -> list[Point] | None:
            return self._points(subject, config, task, log, left_out) or None

        found = over_sets(subject, config, self.name, KEYS, one, progress)
        return ManyShotResult(
            sets=[ManyShotSet(**task_values(task), points=points) for task, points in found.sets],
            left_out=found.left_out,
            examples=[ManyShotAnswer.model_validate(row) for row in found.examples],
            score=config.score,
            bos=found.bos,
            rope_parameters=config.rope_parameters,
            length=config.length_for(subject),
            draws=config.draws,
            n=sum(point.n for _, points in found.sets for point in points),
        )

    def _points(
        self,
        subject: Subject,
        config: ManyShotConfig,
        task: LabelledTask,
        log: SampleLog,
        skipped: dict[str, str],
    ) -> list[Point]:
        """Accuracy by number of demonstrations; why points are left out goes to `skipped`."""
        length = config.length_for(subject)
        draws = range(min(config.draws, len(task.asked)))
        orders = [in_rounds(task.pool, config.seed, draw) for draw in draws]
        full = min(most(task, order, length) for order in orders)
        wanted = numbers(config.shots, full)
        blocks: dict[int, list[Block]] = {}
        for shots in wanted:
            try:
                blocks[shots] = self._blocks(subject, task, orders, shots, length)
            except Unmeasured as reason:
                skipped[f"{task.name}, {shots} demonstrations"] = str(reason)
        if not wanted:
            skipped[task.name] = f"not one demonstration and a question fit into {length} tokens"
        failed = measure(subject, config, task, [[b[draw] for b in blocks.values()] for draw in draws], log)
        points = []
        for shots, made in blocks.items():
            reasons = [failed[block.key] for block in made if block.key in failed]
            if reasons:
                skipped[f"{task.name}, {shots} demonstrations"] = reasons[0]
                continue
            rows, tokens = answered(log, made), max(block.tokens for block in made)
            points.append(
                Point(shots=shots, full=shots == full, tokens=tokens, n=len(rows), correct=marks(rows))
            )
        return points

    def _blocks(
        self,
        subject: Subject,
        task: LabelledTask,
        orders: Sequence[Sequence[Example]],
        shots: int,
        length: int,
    ) -> list[Block]:
        """The prompts of a number of demonstrations, a block a draw. Raises Unmeasured where they cannot be asked."""
        if shots > len(task.pool):
            raise Unmeasured(f"the set has {len(task.pool)} texts to demonstrate with")
        made = [
            Block.of(task, (task.name, shots, draw), order[:shots], range(draw, len(task.asked), len(orders)))
            for draw, order in enumerate(orders)
        ]
        needed = max(block.tokens for block in made) + task.trie.longest
        if needed > length:
            raise Unmeasured(f"a prompt and its answer have up to {needed} tokens, more than length {length}")
        unless(subject.too_long(needed))
        return made

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
        block = Block.of(task, (), order[:number], [longest])
        return block.tokens + task.trie.longest <= length

    while count and not fits(count):
        count -= 1
    while count < len(order) and fits(count + 1):
        count += 1
    return count

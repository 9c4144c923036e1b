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
from typing import Any, Literal

import numpy as np
from pydantic import Field, field_validator

from clearhead.analysis.sections import Section
from clearhead.evals.asking.sample_log import SampleLog
from clearhead.evals.evaluation import Evaluation
from clearhead.evals.in_context.labelled import PUBLISHED, Example
from clearhead.evals.in_context.many_shot.section import many_shot_section
from clearhead.evals.in_context.rounds import in_rounds
from clearhead.evals.in_context.shared import (
    Block,
    InContextConfig,
    Task,
    answered,
    marks,
    measure,
    over_sets,
)
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


class ManyShot(Evaluation[ManyShotConfig]):
    name = "many_shot"
    Config = ManyShotConfig

    def run(self, subject: Subject, config: ManyShotConfig) -> dict[str, Any]:
        """Raises RecordError for a set that cannot be used: that is no property of the model."""

        def one(task: Task, log: SampleLog, left_out: dict[str, str]) -> dict[str, Any] | None:
            points = self._points(subject, config, task, log, left_out)
            return {"points": points} if points else None

        measured = over_sets(subject, config, self.name, KEYS, one)
        if "skipped" in measured:
            return measured
        n = sum(point["n"] for values in measured["sets"] for point in values["points"])
        return {**measured, "length": config.length_for(subject), "draws": config.draws, "n": n}

    def _points(
        self, subject: Subject, config: ManyShotConfig, task: Task, log: SampleLog, skipped: dict[str, str]
    ) -> list[dict[str, Any]]:
        """Accuracy by number of demonstrations; why points are left out goes to `skipped`."""
        length = config.length_for(subject)
        draws = range(min(config.draws, len(task.asked)))
        orders = [in_rounds(task.pool, config.seed, draw) for draw in draws]
        full = min(most(task, order, length) for order in orders)
        blocks: dict[int, list[Block]] = {}
        for shots in numbers(config.shots, full):
            where = f"{task.name}, {shots} demonstrations"
            if shots > len(task.pool):
                skipped[where] = f"the set has {len(task.pool)} texts to demonstrate with"
                continue
            made = [
                Block.of(
                    task,
                    (task.name, shots, draw),
                    orders[draw][:shots],
                    range(draw, len(task.asked), len(draws)),
                )
                for draw in draws
            ]
            needed = max(block.tokens for block in made) + task.trie.longest
            if needed > length:
                skipped[where] = (
                    f"a prompt and its answer have up to {needed} tokens, more than length {length}"
                )
            elif reason := subject.too_long(needed):
                skipped[where] = reason
            else:
                blocks[shots] = made
        if not blocks and not numbers(config.shots, full):
            skipped[task.name] = f"not one demonstration and a question fit into {length} tokens"
        failed = measure(subject, config, task, [[b[draw] for b in blocks.values()] for draw in draws], log)
        points = []
        for shots, made in blocks.items():
            reasons = [failed[block.key] for block in made if block.key in failed]
            if reasons:
                skipped[f"{task.name}, {shots} demonstrations"] = reasons[0]
                continue
            rows = answered(log, made)
            points.append(
                {
                    "shots": shots,
                    "full": shots == full,
                    "tokens": max(block.tokens for block in made),
                    "n": len(rows),
                    "correct": marks(rows),
                }
            )
        return points

    def section(self, run: RunResults) -> Section:
        title, question = (
            "Many-shot learning in context",
            "Does it learn from many demonstrations in its context?",
        )
        values = run.values(self.name)
        if not values:
            return self.missing(run, title, question)
        return many_shot_section(self.name, title, question, run, values)


def numbers(shots: Sequence[int | str] | None, full: int) -> list[int]:
    """Numbers of demonstrations in order, `full` of which fit."""
    if shots is None:
        return [*(2**k for k in range(full.bit_length()) if 2**k < full), *([full] if full else [])]
    return sorted({full if number == "full" else int(number) for number in shots})


def most(task: Task, order: Sequence[Example], length: int) -> int:
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

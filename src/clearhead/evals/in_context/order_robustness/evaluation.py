"""Order robustness: how far apart are the best and the worst order of the same demonstrations?

As in the Differential Transformer paper (arXiv 2410.05258, section 3.5): the demonstrations stay, their order is drawn
ten times, in two formats, `random` and `by_class` (the classes take turns); the margin is the accuracy of the best
permutation minus that of the worst. All permutations and all models are asked the same texts. Sets, prompts and
decoding are those of `in_context.many_shot`; interval and noise level: `analysis.margins`.
"""

from __future__ import annotations

from pydantic import Field

from clearhead.analysis.sections import Section
from clearhead.evals.asking.sample_log import SampleLog
from clearhead.evals.evaluation import Evaluation, Say
from clearhead.evals.in_context.many_shot.evaluation import most
from clearhead.evals.in_context.order_robustness.section import (
    OrderAnswer,
    OrderedSet,
    OrderResult,
    order_section,
)
from clearhead.evals.in_context.rounds import Order, in_rounds, permuted
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

KEYS = ("set", "order", "permutation")
LEAST = 64
"""Demonstrations unless `shots` says otherwise, or one of each label where there are more labels."""


class OrderRobustnessConfig(InContextConfig):
    """sets: see `InContextConfig`; by default TREC. items: texts asked under every permutation.

    shots: demonstrations, every label as evenly as possible (default: 64, or one of each label if those are more, or as
        many as fit into `length`).
    permutations: of each format. orders: the formats.
    """

    sets: list[str] = Field(default=["trec"], min_length=1)
    items: int = Field(default=100, ge=1)
    shots: int | None = Field(default=None, ge=2)
    permutations: int = Field(default=10, ge=2)
    orders: list[Order] = Field(default=["random", "by_class"], min_length=1)


class OrderRobustness(Evaluation[OrderRobustnessConfig, OrderResult]):
    name = "order_robustness"
    Config = OrderRobustnessConfig
    Result = OrderResult

    def result(
        self, subject: Subject, config: OrderRobustnessConfig, progress: Say | None = None
    ) -> OrderResult:
        """Raises RecordError for a set that cannot be used: that is no property of the model."""

        def one(task: LabelledTask, log: SampleLog, left_out: dict[str, str]) -> OrderedSet:
            return self._measured(subject, config, task, log)

        found = over_sets(subject, config, self.name, KEYS, one, progress)
        return OrderResult(
            sets=[values for _, values in found.sets],
            left_out=found.left_out,
            examples=[OrderAnswer.model_validate(row) for row in found.examples],
            score=config.score,
            bos=found.bos,
            rope_parameters=config.rope_parameters,
            n=sum(values.asked for _, values in found.sets),
        )

    def _measured(
        self, subject: Subject, config: OrderRobustnessConfig, task: LabelledTask, log: SampleLog
    ) -> OrderedSet:
        """Outcomes by format and permutation. Raises ValueError with the reason when they cannot be had."""
        blocks, shots = self._blocks(config, task, config.length_for(subject))
        needed = max(block.tokens for block in blocks) + task.trie.longest
        unless(subject.too_long(needed))
        if failed := measure(subject, config, task, [[block] for block in blocks], log):
            raise Unmeasured(next(iter(failed.values())))
        orders: dict[str, list[str]] = {}
        for block in blocks:
            orders.setdefault(str(block.key[1]), []).append(marks(answered(log, [block])))
        return OrderedSet(**task_values(task), shots=shots, tokens=needed, orders=orders)

    def _blocks(
        self, config: OrderRobustnessConfig, task: LabelledTask, length: int
    ) -> tuple[list[Block], int]:
        """The prompts of every permutation, and the number of their demonstrations. Raises ValueError as above."""
        ordered = in_rounds(task.pool, config.seed, 0)
        shots = config.shots
        if shots is None:
            shots = min(max(LEAST, len(task.trie.labels)), most(task, ordered, length))
        if shots < 2:
            raise ValueError(f"no two demonstrations and a question fit into {length} tokens")
        if shots > len(ordered):
            raise ValueError(f"shots is {shots}, but the set has {len(ordered)} texts to demonstrate with")
        while True:
            blocks = [
                Block.of(
                    task,
                    (task.name, order, permutation),
                    permuted(ordered[:shots], order, config.seed, permutation),
                    range(len(task.asked)),
                )
                for order in dict.fromkeys(config.orders)
                for permutation in range(config.permutations)
            ]
            needed = max(block.tokens for block in blocks) + task.trie.longest
            if needed <= length:
                return blocks, shots
            if config.shots is not None or shots == 2:
                raise ValueError(
                    f"a prompt and its answer have up to {needed} tokens, more than length {length}"
                )
            # In another order tokens may join otherwise where demonstrations meet.
            shots -= 1

    def section(self, run: RunResults) -> Section:
        title, question = "Order robustness", "Does the order of the demonstrations matter?"
        values = self.results(run)
        if not values:
            return self.missing(run, title, question)
        return order_section(self.name, title, question, run, values)

"""Order robustness: how far apart are the best and the worst order of the same demonstrations?

As in the Differential Transformer paper (arXiv 2410.05258, section 3.5): the demonstrations stay, their order is drawn
ten times, in two formats, `random` and `by_class` (the classes take turns); the margin is the accuracy of the best
permutation minus that of the worst. All permutations and all models are asked the same texts. Sets, prompts and
decoding are those of `in_context.many_shot`; interval and noise level: `analysis.margins`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from pydantic import Field

from clearhead.analysis.sections import Section
from clearhead.evals.asking.sample_log import Row
from clearhead.evals.cells import Measured
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


@dataclass(frozen=True, kw_only=True)
class Permutations(BlocksCell):
    """A set under all orders of `shots` demonstrations, a block each."""

    shots: int
    needed: int


class OrderRobustness(InContextEvaluation[OrderRobustnessConfig, OrderResult, Permutations]):
    name = "order_robustness"
    Config = OrderRobustnessConfig
    Result = OrderResult
    keys = ("set", "order", "permutation", "index")

    def cells_of(self, config: OrderRobustnessConfig, task: LabelledTask, length: int) -> list[Permutations]:
        blocks, shots = self._blocks(config, task, length)
        needed = max(block.tokens for block in blocks) + task.trie.longest
        return [
            Permutations(
                name=task.name, length=needed, task=task, blocks=tuple(blocks), shots=shots, needed=needed
            )
        ]

    def _blocks(
        self, config: OrderRobustnessConfig, task: LabelledTask, length: int
    ) -> tuple[list[Block], int]:
        """The prompts of every permutation, and the number of their demonstrations. Raises ValueError as `cells_of`."""
        ordered = in_rounds(task.pool, config.seed, 0)
        shots = config.shots
        if shots is None:
            shots = min(max(LEAST, len(task.trie.labels)), most(task, ordered, length))
        if shots < 2:
            raise ValueError(f"no two demonstrations and a question fit into {length} tokens")
        if shots > len(ordered):
            raise ValueError(f"shots is {shots}, but the set has {len(ordered)} texts to demonstrate with")
        kinds = [
            (order, number) for order in dict.fromkeys(config.orders) for number in range(config.permutations)
        ]
        while True:
            blocks = [
                Block.of(
                    task,
                    (task.name, order, number),
                    family,
                    permuted(ordered[:shots], order, config.seed, number),
                    range(len(task.asked)),
                )
                for family, (order, number) in enumerate(kinds)
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

    def gather(
        self,
        subject: Subject,
        config: OrderRobustnessConfig,
        measured: Measured[Permutations, list[Row]],
    ) -> OrderResult:
        sets = [ordered_set(cell, rows) for cell, rows in measured.pairs]
        return OrderResult(
            sets=sets,
            left_out=measured.skipped,
            examples=[OrderAnswer.model_validate(row) for row in shown(measured.rows)],
            score=config.score,
            bos=measured.pairs[0][0].task.tokenizer.bos_token,
            rope_parameters=config.rope_parameters,
            n=sum(values.asked for values in sets),
        )

    def section(self, run: RunResults) -> Section:
        title, question = "Order robustness", "Does the order of the demonstrations matter?"
        values = self.results(run)
        if not values:
            return self.missing(run, title, question)
        return order_section(self.name, title, question, run, values)


def ordered_set(cell: Permutations, rows: Sequence[Row]) -> OrderedSet:
    """Outcomes by format and permutation."""
    orders: dict[str, list[str]] = {}
    for block in cell.blocks:
        _, order, number = block.key
        own = [row for row in rows if (row["order"], row["permutation"]) == (order, number)]
        orders.setdefault(str(order), []).append(marks(own))
    return OrderedSet(**task_values(cell.task), shots=cell.shots, tokens=cell.needed, orders=orders)

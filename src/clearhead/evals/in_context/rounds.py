"""Which texts are asked and which demonstrate, and in what order: drawn from a seed, the same for every model.

Nothing here knows a tokenizer, so prompts agree between models that read the same text.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import numpy as np

from clearhead.evals.asking.records import RecordError
from clearhead.evals.in_context.labelled import Example, LabelledSet

Order = Literal["random", "by_class"]


def divide(data: LabelledSet, items: int, seed: int) -> tuple[list[Example], list[Example]]:
    """(pool, asked): `items` texts to ask, their labels in the set's own shares, and the texts to demonstrate with.

    A set that comes divided keeps its division; of any other one text of each label stays in the pool. No text is in
    both. Raises RecordError when there are not so many.
    """
    source = data.examples if data.test is None else data.test
    rng = np.random.default_rng([seed, 0])
    by_label: dict[str, list[int]] = {label: [] for label in data.labels}
    for index in rng.permutation(len(source)):
        by_label[source[index].label].append(int(index))
    spared = 1 if data.test is None else 0
    room = {label: max(0, len(rows) - spared) for label, rows in by_label.items()}
    if items > sum(room.values()):
        raise RecordError(
            f"the set {data.name!r} has {len(source)} different texts to ask from"
            f"{', one of each label kept to demonstrate' if spared else ''}: items is {items}, "
            f"at most {sum(room.values())} can be asked"
        )
    quotas = shares({label: len(rows) for label, rows in by_label.items()}, room, items)
    chosen = [row for label, rows in by_label.items() for row in rows[: quotas[label]]]
    asked = [source[chosen[i]] for i in rng.permutation(len(chosen))]
    if data.test is not None:
        return list(data.examples), asked
    gone = set(chosen)
    return [example for index, example in enumerate(source) if index not in gone], asked


def shares(sizes: dict[str, int], room: dict[str, int], total: int) -> dict[str, int]:
    """`total` divided in proportion to `sizes` by largest remainders, none above its `room`."""
    whole = sum(sizes.values())
    ideal = {label: total * size / whole for label, size in sizes.items()}
    given = {label: min(int(ideal[label]), room[label]) for label in sizes}
    for _ in range(total - sum(given.values())):
        label = max(
            (label for label in sizes if given[label] < room[label]), key=lambda x: ideal[x] - given[x]
        )
        given[label] += 1
    return given


def in_rounds(pool: Sequence[Example], seed: int, draw: int) -> list[Example]:
    """The whole pool in rounds: each round gives every label once that has texts left, in a fresh random order.

    So the first k demonstrations hold every label as evenly as possible, and are the beginning of the first 2k.
    """
    rng = np.random.default_rng([seed, draw, 1])
    queues: dict[str, list[Example]] = {}
    for index in rng.permutation(len(pool)):
        queues.setdefault(pool[index].label, []).append(pool[index])
    labels = sorted(queues)
    ordered: list[Example] = []
    while len(ordered) < len(pool):
        left = [label for label in labels if queues[label]]
        ordered += [queues[left[i]].pop() for i in rng.permutation(len(left))]
    return ordered


def permuted(demonstrations: Sequence[Example], order: Order, seed: int, permutation: int) -> list[Example]:
    """The same demonstrations in another order.

    `random`: any order, all equally likely. `by_class`: the classes take turns, always in the same sequence (one
    that has none left is passed over); the sequence, and the order within a class, are drawn.
    """
    rng = np.random.default_rng([seed, permutation, 2 if order == "random" else 3])
    shuffled = [demonstrations[i] for i in rng.permutation(len(demonstrations))]
    if order == "random":
        return shuffled
    queues: dict[str, list[Example]] = {}
    for example in shuffled:
        queues.setdefault(example.label, []).append(example)
    labels = sorted(queues)
    turns = [labels[i] for i in rng.permutation(len(labels))]
    longest = max((len(queue) for queue in queues.values()), default=0)
    return [queues[label][i] for i in range(longest) for label in turns if i < len(queues[label])]

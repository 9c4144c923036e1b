"""Items that several models were asked: the ones that all of them have, and what each scored on them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

from clearhead.analysis.by_length import Values

V = TypeVar("V")
T = TypeVar("T")
Items = Callable[[V], Mapping[Any, T]]
"""The values of one model -> what each item scored."""


def shared_items(
    values: Values[V], items: Items[V, T], keep: Callable[[T], bool] = lambda score: True
) -> list[Any]:
    """The items that every model has with a score that `keep` keeps, in the first model's order."""
    found = [items(value) for seeds in values.values() for value in seeds.values()]
    return [item for item in found[0] if all(item in one and keep(one[item]) for one in found)]


def paired_samples(
    values: Values[V], items: Items[V, T], shared: Sequence[Any], number: Callable[[T], float]
) -> dict[str, dict[int, list[float]]]:
    """Arm -> seed -> a number for each of the `shared` items, in their order."""
    return {
        arm: {seed: [number(items(value)[item]) for item in shared] for seed, value in seeds.items()}
        for arm, seeds in values.items()
    }


def few(lines: Sequence[str], most: int = 5) -> list[str]:
    """The first of many lines, and how many there are more."""
    return [*lines[:most], *([f"And {len(lines) - most} more like these."] if len(lines) > most else [])]


def shortened(text: str, longest: int = 300) -> str:
    """What the report shows of an answer."""
    return text if len(text) <= longest else f"{text[:longest]}…"

"""Random choices from one seed, the same in every process and on every machine."""

import random
from collections.abc import Sequence
from typing import TypeVar

import torch
from torch import Tensor

T = TypeVar("T")


class Draw:
    """What a generator of cases draws from: small choices from Python's generator, tensors from torch's."""

    def __init__(self, seed: int) -> None:
        self._choices = random.Random(seed)
        self._numbers = torch.Generator().manual_seed(seed)

    def one(self, *options: T) -> T:
        """One of the options; an option given twice is twice as likely."""
        return self._choices.choice(options)

    def among(self, options: Sequence[T]) -> T:
        """One of a sequence."""
        return self._choices.choice(options)

    def chance(self, share: float) -> bool:
        """True in `share` of the draws."""
        return self._choices.random() < share

    def between(self, low: int, high: int) -> int:
        """An integer, both ends among them."""
        return self._choices.randint(low, high)

    def number(self, low: float, high: float) -> float:
        """A number of the interval."""
        return self._choices.uniform(low, high)

    def seed(self) -> int:
        """A seed for what is drawn later."""
        return self._choices.getrandbits(48)

    def normal(self, *shape: int) -> Tensor:
        """Standard normal numbers in float64."""
        return torch.randn(shape, generator=self._numbers, dtype=torch.float64)

    def flags(self, *shape: int, share: float = 0.5) -> Tensor:
        """Booleans, True with the probability `share`."""
        return torch.rand(shape, generator=self._numbers) < share

    def integers(self, high: int, *shape: int, low: int = 0) -> Tensor:
        """Integers from `low` to `high` − 1."""
        return torch.randint(low, high, shape, generator=self._numbers)

"""Whether two checkpoints are the same function: their logits on a text, compared.

Legend: B batch, L tokens, V vocabulary.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from clearhead.convert.base import Computation
from clearhead.convert.computing import WeightReader
from clearhead.convert.weights import Weights

TEXT = (
    "It was a bright morning in March, and the clerk who kept the harbour's books had counted 1,482 barrels, three "
    'crates of lemons and one very small dog. "Whose is it?" he asked; nobody knew. The list said: salt, rope, tar, '
    "oil (two casks), nails. He wrote the dog down between the rope and the tar, for that is where it sat, and went on."
)
TOKENS = 96
EXACT, ROUNDED = 1e-10, 1e-5
"""What a difference may be beside the largest logit, or 1: where nothing was rounded, and where something was."""
CHUNK = 2**19
"""Numbers of the output matrix that are held at a time."""


@dataclass(frozen=True)
class Agreement:
    """What a comparison of logits found. difference, largest: of logits, as absolute values."""

    difference: float
    largest: float
    tokens: int
    dtype: torch.dtype
    limit: float

    @property
    def holds(self) -> bool:
        """Whether the two are one function; false for logits that are not finite."""
        return self.difference <= self.limit * max(1.0, self.largest)

    def record(self) -> dict[str, Any]:
        """As plain values."""
        return {
            "max_difference": self.difference,
            "largest_logit": self.largest,
            "allowed": self.limit * max(1.0, self.largest),
            "tokens": self.tokens,
            "computed_in": str(self.dtype).removeprefix("torch."),
        }


def token_ids(tokenizer: Any, vocabulary: int) -> list[int]:
    """Tokens of a text, or of its bytes where there is no tokenizer; all of them within the vocabulary."""
    found = list(TEXT.encode()) if tokenizer is None else tokenizer.encode(TEXT, add_special_tokens=True)
    return [token % vocabulary for token in found[:TOKENS]]


@torch.no_grad()
def compare(
    first: tuple[Computation, Weights],
    second: tuple[Computation, Weights],
    ids: Sequence[int],
    vocabulary: int,
    dtype: torch.dtype,
    limit: float,
) -> Agreement:
    """Logits of both, a part of the vocabulary at a time, so that no output matrix is held whole."""
    states = []
    for computation, weights in (first, second):
        embedded = weights.take(computation.embedding, ids).to(dtype)[None]
        states.append(computation.hidden(embedded, WeightReader(weights, dtype)))
    difference = largest = 0.0
    step = max(1, CHUNK // states[0].shape[-1])
    for start in range(0, vocabulary, step):
        stop = min(vocabulary, start + step)
        one, other = (
            hidden @ weights.rows(computation.head, start, stop).to(dtype).T
            for hidden, (computation, weights) in zip(states, (first, second), strict=True)
        )
        # `max` of Python would lose a NaN.
        apart = (one - other).abs().max()
        difference = float(torch.maximum(torch.tensor(difference, dtype=dtype), apart))
        largest = float(torch.maximum(torch.tensor(largest, dtype=dtype), one.abs().max()))
    return Agreement(difference, largest, len(ids), dtype, limit)


def precision(layer_numbers: int) -> torch.dtype:
    """float64 where a layer of so many numbers, twice, fits into half of the memory that is free, else float32."""
    free = _free_memory()
    return torch.float64 if free is None or 4 * 8 * layer_numbers < free else torch.float32


def _free_memory() -> int | None:
    try:
        for line in Path("/proc/meminfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    return None

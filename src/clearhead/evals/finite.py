"""A model that computes no numbers is not measured: a count of its right answers would be a zero like any other."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def broken_weights(model: nn.Module) -> str | None:
    """Why no evaluation of `model` means anything: the first weight that is NaN or infinite; None for none."""
    for name, weight in model.named_parameters():
        # A sum is one pass without a copy, and is finite wherever every number is, but for an overflow.
        if bool(weight.detach().sum(dtype=torch.float64).isfinite()):
            continue
        odd = weight.numel() - int(weight.detach().isfinite().sum())
        if odd:
            return f"the model's weights are not all numbers: {odd} of {weight.numel()} in {name} are NaN or infinite"
    return None


class Watch:
    """How many of a model's calls gave logits, and how many of those held NaN or infinity."""

    def __init__(self) -> None:
        self.calls = self.broken = 0

    def see(self, head: nn.Module, inputs: Any, logits: Any) -> None:
        if isinstance(logits, torch.Tensor) and logits.numel():
            self.calls += 1
            # The maximum is NaN if anything is; −inf is how some heads rule a token out.
            self.broken += not bool(logits.amax().isfinite())

    @property
    def reason(self) -> str | None:
        """A sentence where some logits were no numbers, else None."""
        if not self.broken:
            return None
        return f"the model's logits held NaN or infinity in {self.broken} of {self.calls} calls"


def exponential(nats: float) -> float:
    """e^nats; ValueError in one sentence where that is more than a number can be."""
    try:
        return math.exp(nats)
    except OverflowError:
        raise ValueError(f"the loss of {nats:.4g} nats per token is too large for a perplexity") from None


@contextmanager
def watched(model: PreTrainedModel) -> Iterator[Watch]:
    """Looks at all that the model's head gives meanwhile."""
    watch = Watch()
    head = model.get_output_embeddings()
    hook = None if head is None else head.register_forward_hook(watch.see)
    try:
        yield watch
    finally:
        if hook is not None:
            hook.remove()

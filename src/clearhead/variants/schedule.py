"""What an attention knows of its own training: how far it is."""

import torch
from torch import Tensor, nn

from clearhead.core.streams import check_whole


class TrainingProgress(nn.Module):
    """The share of `steps` optimiser steps that training has done, min(1, step / steps); a buffer beside the weights.

    It starts at 0, `advance` sets it, and it is saved with the model: what is loaded computes as it did when it was
    saved.
    """

    progress: Tensor

    def __init__(self, steps: int) -> None:
        super().__init__()
        check_whole("steps", steps)
        self.steps = steps
        self.register_buffer("progress", torch.zeros(1))

    def forward(self) -> Tensor:
        """(1,), in float32 at least."""
        return self.progress if self.progress.dtype == torch.float64 else self.progress.float()

    def extra_repr(self) -> str:
        return f"{self.steps} steps"


def advance(model: nn.Module, step: int) -> bool:
    """Tell every schedule in `model` that optimiser step `step`, counted from 1, is the one being made.

    Returns whether there is any schedule. ValueError for a step below 0; 0 is before training.
    """
    check_whole("step", step, 0)
    found = [module for module in model.modules() if isinstance(module, TrainingProgress)]
    for module in found:
        module.progress.fill_(min(1.0, step / module.steps))
    return bool(found)


def begins(model: nn.Module) -> bool:
    """Whether a schedule in `model` is at its beginning; one that training has moved already stays where it is."""
    return any(
        isinstance(module, TrainingProgress) and not bool(module.progress.any()) for module in model.modules()
    )

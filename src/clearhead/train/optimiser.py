"""What the recipe says of the optimiser: AdamW and the course of its learning rate."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

from clearhead.runs.recipe import Train


def adamw(model: nn.Module, train: Train, partial: Sequence[nn.Parameter] = ()) -> torch.optim.AdamW:
    """AdamW whose weight decay falls on matrices only: norms and the λ vectors are left out.

    partial: matrices of which some rows alone are trained; they have none, as it would move the others.
    """
    whole = {id(parameter) for parameter in partial}
    trained = [p for p in model.parameters() if p.requires_grad]
    matrices = [p for p in trained if p.ndim >= 2 and id(p) not in whole]
    rest = [p for p in trained if p.ndim < 2 or id(p) in whole]
    groups = [
        {"params": matrices, "weight_decay": train.weight_decay},
        {"params": rest, "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=train.learning_rate, betas=train.betas, fused=True)


def course(train: Train) -> Callable[[int], float]:
    """Step -> the factor of the learning rate: a linear rise, then what `train.schedule` says down to its floor."""
    warmup = max(1, round(train.warmup * train.steps))

    def factor(step: int) -> float:
        if step < warmup:
            return (step + 1) / warmup
        if train.schedule == "constant":
            return 1.0
        if train.schedule == "wsd":
            fallen = max(0, step - train.decay_start) / (train.steps - train.decay_start)
            return 1.0 - (1.0 - train.min_lr_ratio) * min(1.0, fallen)
        done = min(1.0, (step - warmup) / max(1, train.steps - warmup))
        shape = 1.0 - done if train.schedule == "linear" else 0.5 * (1.0 + math.cos(math.pi * done))
        return train.min_lr_ratio + (1.0 - train.min_lr_ratio) * shape

    return factor


def bare(wrapped: Any) -> Any:
    """The optimiser or schedule inside Accelerate's wrapper, if there is one."""
    from accelerate.optimizer import AcceleratedOptimizer
    from accelerate.scheduler import AcceleratedScheduler

    if isinstance(wrapped, AcceleratedOptimizer):
        return wrapped.optimizer
    return wrapped.scheduler if isinstance(wrapped, AcceleratedScheduler) else wrapped

"""Low-rank matrices beside a model's own while it trains: PEFT's LoRA."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from clearhead.runs.recipe import Train


def need_lora() -> None:
    """Raise MissingExtra unless PEFT is installed."""
    from clearhead.extras import need

    need('train.trainable = "lora"', "adapters")


def add_lora(model: nn.Module, train: Train) -> Callable[[], None]:
    """Put them beside every matrix whose name is in `train.lora_modules`; returns what merges them into the weights.

    Rank `lora_rank`, alpha twice that, no dropout; B starts at 0, so the model is the function it was. ValueError for
    names that no matrix has.
    """
    need_lora()
    from peft import LoraConfig
    from peft.tuners.lora import LoraModel

    found = {name.rpartition(".")[2] for name, part in model.named_modules() if isinstance(part, nn.Linear)}
    if unknown := [name for name in train.lora_modules if name not in found]:
        raise ValueError(f"train.lora_modules names {unknown[0]!r}; the model has {', '.join(sorted(found))}")
    config = LoraConfig(
        r=train.lora_rank,
        lora_alpha=2 * train.lora_rank,
        lora_dropout=0.0,
        target_modules=list(train.lora_modules),
    )
    wrapped: Any = LoraModel(model, config, "default")

    def merge() -> None:
        with torch.no_grad():
            wrapped.merge_and_unload()

    return merge

"""Bytes on one device while a model trains, and how long a step must take at least: a model, not a measurement."""

from dataclasses import dataclass
from typing import Literal

import torch

from clearhead.models.config import ClearheadConfig
from clearhead.models.cost import WeightCounts, forward_flops_per_token, weight_counts
from clearhead.models.footprint.activations import KeptActivations, activations
from clearhead.models.footprint.devices import Fleet

Sharding = Literal["none", "fsdp"]
FLOAT = 4
MOMENTS = 2 * FLOAT
# Layers whose gathered weights are there at once: the one that computes and the next.
GATHERED = 2


@dataclass(frozen=True)
class ModelSize:
    """Parameters: all, of one layer (the largest), and outside the layers."""

    parameters: int
    layer: int
    outside: int

    @classmethod
    def of(cls, config: ClearheadConfig) -> "ModelSize":
        """Counted on the meta device."""
        return cls.counted(weight_counts(config))

    @classmethod
    def counted(cls, found: WeightCounts) -> "ModelSize":
        """From counts made already."""
        return cls(found.total, max(found.layers), found.total - sum(found.layers))


@dataclass(frozen=True)
class TrainingMemory:
    """Bytes on one device.

    weights, gradients, optimiser: float32, AdamW's two moments; divided by the devices under "fsdp".
    gathered:    whole weights of the layers at work, in the dtype that computes, and their gradients (under "fsdp").
    activations: kept from the forward pass;  loss: logits and their gradients.
    peak:        the most that is there at once: when the backward pass begins, or at its end.
    """

    weights: int
    gradients: int
    optimiser: int
    gathered: int
    activations: int
    loss: int
    peak: int


def training_memory(
    size: ModelSize,
    kept: KeptActivations,
    devices: int,
    sharding: Sharding,
    dtype: torch.dtype,
    *,
    checkpointing: bool,
    accumulates: bool,
) -> TrainingMemory:
    """The memory of a training step.

    accumulates: whether gradients of earlier rows are there already when a backward pass begins.
    """
    share = devices if sharding == "fsdp" else 1
    weights = gradients = FLOAT * size.parameters // share
    optimiser = MOMENTS * size.parameters // share
    gathered = 0
    if share > 1:
        # The embedding and the head stay whole from the forward pass to the end of the backward pass.
        whole = size.outside + GATHERED * size.layer
        gathered = dtype.itemsize * whole + FLOAT * size.layer
    own = kept.kept(checkpointing)
    again = kept.largest if checkpointing else 0
    begins = own + max(kept.loss, again) + (gradients if accumulates else 0)
    ends = gradients + kept.largest
    return TrainingMemory(
        weights,
        gradients,
        optimiser,
        gathered,
        own + again,
        kept.loss,
        weights + optimiser + gathered + max(begins, ends),
    )


@dataclass(frozen=True)
class Roofline:
    """Seconds of one optimiser step if one resource were the only limit; a step takes the largest at least.

    compute:  matrix products and attention at the peak rate.
    memory:   weights, gradients, moments and activations through the device's memory once a pass.
    wire:     gathering weights and reducing gradients between devices.
    """

    compute: float
    memory: float
    wire: float

    @property
    def seconds(self) -> float:
        return max(self.compute, self.memory, self.wire)

    @property
    def limit(self) -> str:
        """The name of the largest."""
        return max(("compute", "memory", "wire"), key=lambda name: float(getattr(self, name)))


def roofline(
    config: ClearheadConfig,
    size: ModelSize,
    kept: KeptActivations,
    fleet: Fleet,
    sharding: Sharding,
    *,
    batch_tokens: int,
    length: int,
    rows: int,
    checkpointing: bool,
) -> Roofline:
    """The least time of a step of `batch_tokens` tokens over the fleet, each device taking `rows` rows at a time."""
    device, passes = fleet.device, 4 if checkpointing else 3
    flops = passes * forward_flops_per_token(config, length) * batch_tokens
    turns = max(1, round(batch_tokens / (fleet.count * rows * length)))
    half = 2 * size.parameters
    # Weights in bfloat16 once a pass, what is kept written and read; then AdamW reads and writes its numbers.
    traffic = turns * (passes * half + 2 * (kept.kept(checkpointing) + kept.loss))
    traffic += 7 * FLOAT * size.parameters // (fleet.count if sharding == "fsdp" else 1)
    part = (fleet.count - 1) / fleet.count
    # Gathered for each pass that needs them, forward and backward; gradients in float32.
    sent = turns * (2 * half + FLOAT * size.parameters) if sharding == "fsdp" else 2 * FLOAT * size.parameters
    return Roofline(
        flops / (fleet.count * device.flops * 1e12),
        traffic / (device.bandwidth * 1e9),
        part * sent / fleet.wire,
    )


@dataclass(frozen=True)
class Footprint:
    """A configuration on a fleet, with and without activation checkpointing: (memory, roofline) of each."""

    size: ModelSize
    rows: int
    plain: tuple[TrainingMemory, Roofline]
    checkpointed: tuple[TrainingMemory, Roofline]


def footprint(
    config: ClearheadConfig,
    on: Fleet,
    *,
    length: int,
    batch_tokens: int,
    rows: int = 1,
    sharding: Sharding = "fsdp",
    documents: bool = False,
    size: ModelSize | None = None,
) -> Footprint:
    """Memory and least time of a training in bfloat16 with float32 weights, gradients and moments.

    size: the model's, where it has been counted.
    rows: of each device in one forward pass; more rows of a step than the devices take at once are accumulated.
    Raises ValueError where a step has not enough rows for every device.
    """
    needed = on.count * rows * length
    if batch_tokens < needed:
        raise ValueError(
            f"a step of {batch_tokens:,} tokens has not {rows} rows of {length:,} tokens for each of {on.count} devices"
        )
    size = size or ModelSize.of(config)
    kept = activations(config, rows, length, torch.bfloat16, documents=documents)
    both = []
    for checkpointing in (False, True):
        memory = training_memory(
            size,
            kept,
            on.count,
            sharding,
            torch.bfloat16,
            checkpointing=checkpointing,
            accumulates=batch_tokens > needed,
        )
        time = roofline(
            config,
            size,
            kept,
            on,
            sharding,
            batch_tokens=batch_tokens,
            length=length,
            rows=rows,
            checkpointing=checkpointing,
        )
        both.append((memory, time))
    return Footprint(size, rows, both[0], both[1])

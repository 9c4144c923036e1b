"""How differential attention begins in a pretrained layer: for each way, its options and what becomes of the weights.

Legend: d width of a head, r rank.
"""

import math
from abc import ABC
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor

from clearhead.convert.start import twice
from clearhead.convert.weights import TensorRecipe
from clearhead.models.config import ClearheadConfig
from clearhead.registry import did_you_mean

PARTS = ("q_proj", "k_proj", "v_proj", "o_proj")


@dataclass(frozen=True)
class Layer:
    """One layer that gets another attention.

    prefix: of its attention's tensors.      dtype: of its projections.      generator: for what is drawn.
    """

    config: ClearheadConfig
    index: int
    options: Mapping[str, Any]
    prefix: str
    dtype: torch.dtype
    generator: torch.Generator = field(compare=False)

    def weight(
        self, part: str, make: Callable[[Tensor], Tensor], exact: bool = True
    ) -> dict[str, TensorRecipe]:
        """A projection made of the one of its name; in float32 where a narrower type would round it."""
        name = f"{self.prefix}.{part}.weight"
        wide = None if exact else torch.promote_types(self.dtype, torch.float32)
        return {name: TensorRecipe((name,), make, wide, rounded=not exact)}


class Init(ABC):
    """One way to begin.

    same_function: whether the model is the function it was. options: the attention's, unless others are given.
    own_options: the attention's that no other value may be given to.
    """

    attention: ClassVar[str]
    name: ClassVar[str]
    same_function: ClassVar[bool] = True
    options: ClassVar[Mapping[str, Any]] = {}
    own_options: ClassVar[Mapping[str, Any]] = {}

    def projections(self, layer: Layer) -> dict[str, TensorRecipe]:
        """The projections that change."""
        return {}


class V2Mirror(Init):
    """V2 whose second query is a copy of the first: softmax − σ softmax = (1 − σ) softmax, undone by the output matrix.

    W_λ is 0, so σ = sigmoid(b), one half without a bias. Both streams get a gradient at once.
    """

    attention, name = "differential_v2", "mirror"

    def projections(self, layer: Layer) -> dict[str, TensorRecipe]:
        width, bias = layer.config.head_dim, layer.options.get("lambda_bias")
        assert width is not None
        sigma = 1.0 / (1.0 + math.exp(-(bias or 0.0)))
        factor = 1.0 / (1.0 - sigma)
        return layer.weight("q_proj", lambda rows: twice(rows, width)) | layer.weight(
            "o_proj", lambda matrix: matrix.to(_wide(matrix)) * factor, exact=math.frexp(factor)[0] == 0.5
        )


class V2Closed(V2Mirror):
    """The same with a bias so low that the second stream is hardly heard at first: sigmoid(−5) = 0.0067."""

    name = "closed"
    options: ClassVar[Mapping[str, Any]] = {"lambda_bias": -5.0}


class V1Mirror(Init):
    """V1 with the twin's own values, whose second query and key are copies; λ rises from 0."""

    attention, name = "differential", "mirror"
    options: ClassVar[Mapping[str, Any]] = {"lambda_warmup": 1000}
    own_options: ClassVar[Mapping[str, Any]] = {"values": "own", "head_norm": False}

    def projections(self, layer: Layer) -> dict[str, TensorRecipe]:
        width = layer.config.head_dim
        assert width is not None
        return layer.weight("q_proj", lambda rows: twice(rows, width)) | layer.weight(
            "k_proj", lambda rows: twice(rows, width)
        )


class V1Random(V1Mirror):
    """The same with a second query and key that are drawn, N(0, initializer_range²)."""

    name = "random"

    def projections(self, layer: Layer) -> dict[str, TensorRecipe]:
        width, std = layer.config.head_dim, layer.config.initializer_range
        assert width is not None
        seed = int(torch.randint(2**31, (1,), generator=layer.generator))

        def made(rows: Tensor, salt: int) -> Tensor:
            drawn = torch.randn(rows.shape, generator=torch.Generator().manual_seed(seed + salt)) * std
            pairs = torch.stack(
                (rows.unflatten(0, (-1, width)), drawn.to(rows.dtype).unflatten(0, (-1, width))), 1
            )
            return pairs.flatten(0, 2)

        return layer.weight("q_proj", lambda rows: made(rows, 0)) | layer.weight(
            "k_proj", lambda rows: made(rows, 1)
        )


class DexAnnealed(Init):
    """DEX, whose λ is 0 at first."""

    attention, name = "dex", "annealed"


class LoraWarmup(Init):
    """DiffLoRA whose λ rises from 0; the matrices begin as published. With both=True the first stream's B is 0."""

    attention, name = "diff_lora", "warmup"
    options: ClassVar[Mapping[str, Any]] = {"lambda_warmup": 1000}

    def projections(self, layer: Layer) -> dict[str, TensorRecipe]:
        rank, both = layer.options.get("rank", 64), layer.options.get("both", False)
        seed = int(torch.randint(2**31, (1,), generator=layer.generator))

        def extended(matrix: Tensor, salt: int) -> Tensor:
            # Kaiming-uniform with a = √5 is U(−1/√n, 1/√n) for n inputs.
            inputs = matrix.shape[1]
            generator = torch.Generator().manual_seed(seed + salt)
            drawn = torch.rand(rank * (2 if both else 1), inputs, generator=generator) * 2 - 1
            return torch.cat((matrix, (drawn / math.sqrt(inputs)).to(matrix.dtype)))

        return layer.weight("q_proj", lambda rows: extended(rows, 0)) | layer.weight(
            "k_proj", lambda rows: extended(rows, 1)
        )


class LoraPublished(LoraWarmup):
    """DiffLoRA as its paper begins: λ is near λ_init at once, so the model is not the function it was."""

    name = "published"
    same_function = False
    options: ClassVar[Mapping[str, Any]] = {}


INITS: tuple[type[Init], ...] = (
    V2Mirror,
    V2Closed,
    V1Mirror,
    V1Random,
    DexAnnealed,
    LoraWarmup,
    LoraPublished,
)


def find_init(attention: str, name: str | None) -> Init:
    """The way `name` to begin with `attention`, by default its first; ValueError if there is none, with the nearest."""
    known = {init.attention for init in INITS}
    if attention not in known:
        raise ValueError(
            f"--attention {attention!r} cannot be put into a plain model with its function unchanged; "
            f"{did_you_mean(attention, known)}"
        )
    own = {init.name: init for init in INITS if init.attention == attention}
    if name is None:
        return next(iter(own.values()))()
    if name not in own:
        raise ValueError(f"--init {name!r} is no way to begin with {attention!r}; {did_you_mean(name, own)}")
    return own[name]()


def _wide(matrix: Tensor) -> torch.dtype:
    return torch.promote_types(matrix.dtype, torch.float32)

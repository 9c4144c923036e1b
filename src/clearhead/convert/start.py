"""The weights of a softmax model under another attention.

V2 is the same function at once: its second query stream repeats the first, λ(x) is 0, so that sigmoid(λ) is one half,
and the output projection is doubled. Every other variant is another function, and the weights are a start for training.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from clearhead.convert.base import Source, refuse
from clearhead.convert.weights import MadeWeights, TensorRecipe, Weights, same
from clearhead.models.config import ClearheadConfig
from clearhead.registry import resolve

SAME_FUNCTION = ("differential_v2",)


class Start(Protocol):
    """What becomes of a checkpoint's weights that are put under another attention."""

    def config(self, before: ClearheadConfig, weights: Weights, source: Source) -> ClearheadConfig:
        """The configuration with the other attention; ValueError where the model cannot have it."""
        ...

    def weights(self, weights: Weights, before: ClearheadConfig, after: ClearheadConfig) -> MadeWeights:
        """The weights of `before` for `after`."""
        ...

    def same_function(self, before: ClearheadConfig) -> bool:
        """Whether the result computes what `before` does, and is not merely a start for training."""
        ...

    def record(self) -> dict[str, Any]:
        """What conversion.json says of it, as plain values."""
        ...


@dataclass(frozen=True)
class OtherAttention:
    """`clearhead convert --attention`: every layer gets `attention`, new parameters begin as their paper says."""

    attention: str

    def config(self, before: ClearheadConfig, weights: Weights, source: Source) -> ClearheadConfig:
        return restarted(before, self.attention)

    def weights(self, weights: Weights, before: ClearheadConfig, after: ClearheadConfig) -> MadeWeights:
        return restart(weights, before, after)

    def same_function(self, before: ClearheadConfig) -> bool:
        exact = ("softmax",) if self.attention in SAME_FUNCTION else ()
        return before.attention in (self.attention, *exact)

    def record(self) -> dict[str, Any]:
        return {}


def restarted(config: ClearheadConfig, attention: str) -> ClearheadConfig:
    """The configuration with another attention; ValueError where the model cannot have it."""
    if config.attention == attention:
        return config
    if config.attention != "softmax" or config.attention_options:
        raise refuse(
            "attention", config.attention, f"--attention {attention} can be given to softmax models only"
        )
    plain = config.to_dict()
    plain |= {"attention": attention, "attention_options": {}}
    return ClearheadConfig.from_dict(plain)


def restart(weights: Weights, before: ClearheadConfig, after: ClearheadConfig, seed: int = 0) -> MadeWeights:
    """The weights of `before` for `after`; what is new begins as its paper says, drawn with `seed`."""
    from clearhead.models.causal import ClearheadForCausalLM

    recipes: dict[str, TensorRecipe] = {name: TensorRecipe((name,), same) for name in weights.names()}
    doubled = after.attention.startswith("differential_v2")
    width = before.head_dim
    float32 = resolve("variants", after.attention).float32_parameters
    with torch.device("meta"):
        wanted = ClearheadForCausalLM(after).state_dict()
    for layer in range(after.num_hidden_layers):
        prefix = f"model.layers.{layer}.self_attn"
        query, output = f"{prefix}.q_proj.weight", f"{prefix}.o_proj.weight"
        if doubled:
            assert width is not None
            recipes[query] = TensorRecipe((query,), lambda rows: twice(rows, width))
            recipes[output] = TensorRecipe((output,), lambda matrix: matrix * 2)
        for name, value in new_values(after, layer, seed).items():
            if f"{prefix}.variant.{name}" in wanted:
                held = value if name in float32 else value.to(weights.dtype(query))
                recipes[f"{prefix}.variant.{name}"] = TensorRecipe((), lambda held=held: held, held.dtype)
    return MadeWeights(weights, recipes)


def twice(rows: Tensor, width: int) -> Tensor:
    """Every head of a query projection followed by itself."""
    return rows.unflatten(0, (-1, 1, width)).expand(-1, 2, -1, -1).flatten(0, 2)


def new_values(config: ClearheadConfig, layer: int, seed: int) -> Mapping[str, Tensor]:
    """The variant's own parameters and buffers of a layer, drawn with `seed`; V2's W_λ is 0."""
    with torch.random.fork_rng():
        torch.manual_seed(seed + layer)
        variant = config.make_variant(layer)
    found = {name: value.detach() for name, value in variant.state_dict().items()}
    if "lambda_proj.weight" in found:
        found["lambda_proj.weight"] = torch.zeros_like(found["lambda_proj.weight"])
    return found

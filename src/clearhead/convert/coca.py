"""The released CoCA code's LLaMA layout: collinear attention in mode "slack", whose key projection is called t_proj.

Its GPT-NeoX layout is another model (parallel residual, LayerNorm, GELU, biases), which has no form here.
"""

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from clearhead.convert.base import Computation, Converter, NameLine, NameTable, Source, refuse
from clearhead.convert.computing import PlainDecoder, WeightReader, angles, causal_softmax, spread
from clearhead.convert.family import ATTENTION, LlamaFamily
from clearhead.convert.weights import Weights
from clearhead.models.config import ClearheadConfig


class CocaLlama(LlamaFamily):
    """`LlamaForCausalLM` of Collinear-Constrained-Attention; linear and dynamic scalings too."""

    model_type = "llama"
    class_name = "LlamaForCausalLM"

    def claims(self, source: Source) -> bool:
        return source.has("self_attn.t_proj.weight")

    def attention(self, config: Any) -> tuple[str, dict[str, Any]]:
        return "collinear", {"mode": "slack"}

    def configuration(self, source: Source) -> ClearheadConfig:
        return super().configuration(replace(source, config=_standard(source.config)))

    def table(self, config: ClearheadConfig) -> NameTable:
        theirs = f"{ATTENTION}.t_proj.weight"
        table = super().table(config)
        lines = tuple(
            NameLine(line.ours, theirs, line.into, line.back) if line.ours.endswith("k_proj.weight") else line
            for line in table.lines
        )
        return replace(table, lines=lines)

    def computation(self, config: Mapping[str, Any], weights: Weights, dtype: torch.dtype) -> Computation:
        theirs = self._theirs(_standard(config))
        heads, groups = theirs.num_attention_heads, theirs.num_key_value_heads

        def attention(layer: int, x: Tensor, read: WeightReader) -> Tensor:
            prefix = f"model.layers.{layer}.self_attn"
            q, t, v = (
                read.linear(x, f"{prefix}.{name}.weight").unflatten(-1, (count, -1)).transpose(1, 2)
                for name, count in (("q_proj", heads), ("t_proj", groups), ("v_proj", groups))
            )
            first, second = t.chunk(2, dim=-1)
            tied = ((first + second) / 2).relu()
            turned = angles(x.shape[1], q.shape[-1], theirs.rope_parameters, dtype)
            cos, sin = turned.cos(), turned.sin()
            keys = spread(_rotated(torch.cat((tied, tied), dim=-1), cos, sin), heads)
            logits = (q * _rotated(q, cos, sin)) @ keys.mT / math.sqrt(q.shape[-1])
            mixed = causal_softmax(logits) @ spread(v, heads)
            return read.linear(mixed.transpose(1, 2).flatten(2), f"{prefix}.o_proj.weight")

        return PlainDecoder(
            attention, theirs.num_hidden_layers, theirs.rms_norm_eps, theirs.tie_word_embeddings
        )


class CocaNeox(Converter):
    """The other released layout, and GPT-NeoX itself: recognised, and refused with the reason."""

    def claims(self, source: Source) -> bool:
        return source.model_type == "gpt_neox"

    def configuration(self, source: Source) -> ClearheadConfig:
        raise refuse(
            "model_type",
            "gpt_neox",
            "GPT-NeoX, the released CoCA's too, has a parallel residual, LayerNorm, GELU and biases; clearhead models "
            "have none of them",
        )

    def table(self, config: ClearheadConfig) -> NameTable:
        raise NotImplementedError

    def computation(self, config: Mapping[str, Any], weights: Weights, dtype: torch.dtype) -> Computation:
        raise NotImplementedError


def _standard(config: Mapping[str, Any]) -> dict[str, Any]:
    """The released configuration in transformers' keys: it calls the trained length otherwise, and its class too."""
    found = {key: value for key, value in config.items() if key != "architectures"}
    if "max_position_embeddings" not in found and "max_sequence_length" in found:
        found["max_position_embeddings"] = found["max_sequence_length"]
    return found


def _rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = x.chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, first * sin + second * cos), dim=-1)

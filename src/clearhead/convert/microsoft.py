"""Microsoft's released differential attention, V1 and V2: state dicts with its layer inside LLaMA's decoder.

Only the attention layers were released (unilm, Diff-Transformer). So what is around them is expected under LLaMA's
names: `model.layers.N.self_attn.` in front of the released names, `mlp.gate_proj`, `input_layernorm` and so on. The
released layers rotate pairs (2j, 2j + 1); here they become (j, j + d / 2) by a permutation of rows. All sizes are read
off the tensors; a config.json beside them may say rope_theta, rms_norm_eps, max_position_embeddings and token ids.
"""

import math
from abc import abstractmethod
from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor

from clearhead.convert.base import Computation, Converter, NameLine, NameTable, Source
from clearhead.convert.computing import PlainDecoder, WeightReader, angles, causal_softmax, rms_norm, spread
from clearhead.convert.family import ATTENTION, frame, layout_of
from clearhead.convert.orders import halves_to_pairs, pairs_to_halves
from clearhead.convert.weights import ConversionError, FileWeights, MemoryWeights, Weights, same
from clearhead.models.config import ClearheadConfig

FIRST = "model.layers.0.self_attn"
SUBLN_EPS = 1e-5
"""The released layer's, whatever the norms around it have."""
TOKENS = ("pad_token_id", "bos_token_id", "eos_token_id")
LAMBDAS = ("lambda_q1", "lambda_k1", "lambda_q2", "lambda_k2")


class _Microsoft(Converter):
    mark: ClassVar[str]
    attention: ClassVar[str]

    def claims(self, source: Source) -> bool:
        return source.has(f"self_attn.{self.mark}")

    @abstractmethod
    def head_counts(self, rows: Callable[[str], int]) -> tuple[int, int, int]:
        """The twin's query heads, its key-value heads and the width of a head, from numbers of rows."""

    @abstractmethod
    def lines(self) -> list[NameLine]:
        """What the variant has besides projections."""

    @abstractmethod
    def layer(
        self, layer: int, x: Tensor, read: WeightReader, cos: Tensor, sin: Tensor, sizes: tuple[int, int, int]
    ) -> Tensor:
        """The released layer, in plain functions."""

    def configuration(self, source: Source) -> ClearheadConfig:
        weights, given = source.weights, source.config

        def rows(part: str) -> int:
            name = f"{FIRST}.{part}"
            if name not in weights:
                raise ConversionError(
                    f"there is no tensor {name!r}: Microsoft's attention is expected inside LLaMA's decoder, under its "
                    "names"
                )
            return weights.shape(name)[0]

        heads, groups, width = self.head_counts(rows)
        if min(heads, groups) < 1 or heads * width != weights.shape(f"{FIRST}.{self.output}")[1]:
            raise ConversionError(
                f"the sizes of {FIRST}'s tensors do not fit together: {heads} heads of width {width} and an output "
                f"projection of {weights.shape(f'{FIRST}.{self.output}')[1]} columns"
            )
        for name in ("model.embed_tokens.weight", "model.layers.0.mlp.gate_proj.weight"):
            if name not in weights:
                raise ConversionError(
                    f"there is no tensor {name!r}: what is around the attention must have LLaMA's names"
                )
        layers = {int(name.split(".")[2]) for name in weights.names() if name.startswith("model.layers.")}
        vocabulary, hidden = weights.shape("model.embed_tokens.weight")
        tokens: dict[str, Any] = {key: given.get(key) for key in TOKENS}
        return ClearheadConfig(
            vocab_size=vocabulary,
            hidden_size=hidden,
            intermediate_size=weights.shape("model.layers.0.mlp.gate_proj.weight")[0],
            num_hidden_layers=len(layers),
            num_attention_heads=heads,
            num_key_value_heads=groups,
            head_dim=width,
            attention=self.attention,
            rms_norm_eps=given.get("rms_norm_eps", 1e-5),
            max_position_embeddings=given.get("max_position_embeddings", 2048),
            rope_parameters=self._rope(given),
            tie_word_embeddings="lm_head.weight" not in weights,
            **tokens,
        )

    output: ClassVar[str] = "o_proj.weight"

    def table(self, config: ClearheadConfig) -> NameTable:
        assert config.head_dim is not None
        width, turned = config.head_dim, layout_of(config) == "half"

        def into(rows: Tensor) -> Tensor:
            return pairs_to_halves(rows, width)

        def back(rows: Tensor) -> Tensor:
            return halves_to_pairs(rows, width)

        order = (into, back) if turned else (same, same)
        lines = [
            NameLine(f"{ATTENTION}.q_proj.weight", f"{ATTENTION}.q_proj.weight", *order),
            NameLine(f"{ATTENTION}.k_proj.weight", f"{ATTENTION}.k_proj.weight", *order),
            NameLine(f"{ATTENTION}.v_proj.weight", f"{ATTENTION}.v_proj.weight"),
            NameLine(f"{ATTENTION}.o_proj.weight", f"{ATTENTION}.{self.output}"),
        ]
        return NameTable((*frame(config), *lines, *self.lines()), config.num_hidden_layers)

    def computation(self, config: Mapping[str, Any], weights: Weights, dtype: torch.dtype) -> Computation:
        assert isinstance(weights, FileWeights | MemoryWeights)
        ours = self.configuration(Source("", config, weights, ()))
        assert ours.num_key_value_heads is not None and ours.head_dim is not None
        sizes = (ours.num_attention_heads, ours.num_key_value_heads, ours.head_dim)
        rope = self._rope(config)

        def attention(layer: int, x: Tensor, read: WeightReader) -> Tensor:
            turned = angles(x.shape[1], sizes[2], rope, dtype)
            return self.layer(layer, x, read, turned.cos(), turned.sin(), sizes)

        return PlainDecoder(attention, ours.num_hidden_layers, ours.rms_norm_eps, ours.tie_word_embeddings)

    @staticmethod
    def _rope(given: Mapping[str, Any]) -> dict[str, Any]:
        nested = given.get("rope_parameters") or given.get("rope_scaling") or {}
        kind = nested.get("rope_type", nested.get("type", "default"))
        if kind != "default":
            raise ConversionError(
                f"the configuration's rope_type is {kind!r}: the released code has no rotary scaling"
            )
        return {
            "rope_type": "default",
            "rope_theta": nested.get("rope_theta", given.get("rope_theta", 10000.0)),
        }


class MicrosoftV1(_Microsoft):
    """`MultiheadFlashDiff1` (equal to `..._2`, and to the plain file but under grouped queries, where that one pairs
    keys wrongly)."""

    mark = "subln.weight"
    attention = "differential"
    output = "out_proj.weight"

    def head_counts(self, rows: Callable[[str], int]) -> tuple[int, int, int]:
        width = rows("lambda_q1")
        return rows("q_proj.weight") // width, rows("k_proj.weight") // width, width

    def lines(self) -> list[NameLine]:
        found = [NameLine(f"{ATTENTION}.variant.{name}", f"{ATTENTION}.{name}") for name in LAMBDAS]
        return [*found, NameLine(f"{ATTENTION}.variant.head_norm.weight", f"{ATTENTION}.subln.weight")]

    def layer(
        self, layer: int, x: Tensor, read: WeightReader, cos: Tensor, sin: Tensor, sizes: tuple[int, int, int]
    ) -> Tensor:
        heads, groups, width = sizes
        prefix = f"model.layers.{layer}.self_attn"
        q = _rotated(_heads(read.linear(x, f"{prefix}.q_proj.weight"), heads), cos, sin)
        k = _rotated(_heads(read.linear(x, f"{prefix}.k_proj.weight"), groups), cos, sin)
        v = spread(_heads(read.linear(x, f"{prefix}.v_proj.weight"), groups // 2), heads // 2)
        maps = [
            causal_softmax(q[:, s::2] @ spread(k[:, s::2], heads // 2).mT / math.sqrt(width)) for s in (0, 1)
        ]
        q1, k1, q2, k2 = (read(f"{prefix}.{name}") for name in LAMBDAS)
        start = 0.8 - 0.6 * math.exp(-0.3 * layer)
        weight = (q1 * k1).sum().exp() - (q2 * k2).sum().exp() + start
        mixed = (maps[0] - weight * maps[1]) @ v
        normed = rms_norm(mixed, read(f"{prefix}.subln.weight"), SUBLN_EPS) * (1 - start)
        return read.linear(_merged(normed), f"{prefix}.out_proj.weight")


class MicrosoftV2(_Microsoft):
    """`MultiheadFlashDiffV2`."""

    mark = "lambda_proj.weight"
    attention = "differential_v2"

    def head_counts(self, rows: Callable[[str], int]) -> tuple[int, int, int]:
        heads = rows("lambda_proj.weight")
        width = rows("q_proj.weight") // (2 * heads)
        return heads, rows("k_proj.weight") // max(1, width), width

    def lines(self) -> list[NameLine]:
        return [NameLine(f"{ATTENTION}.variant.lambda_proj.weight", f"{ATTENTION}.lambda_proj.weight")]

    def layer(
        self, layer: int, x: Tensor, read: WeightReader, cos: Tensor, sin: Tensor, sizes: tuple[int, int, int]
    ) -> Tensor:
        heads, groups, width = sizes
        prefix = f"model.layers.{layer}.self_attn"
        q = _rotated(_heads(read.linear(x, f"{prefix}.q_proj.weight"), 2 * heads), cos, sin)
        k = _rotated(_heads(read.linear(x, f"{prefix}.k_proj.weight"), groups), cos, sin)
        v = _heads(read.linear(x, f"{prefix}.v_proj.weight"), groups)
        both = causal_softmax(q @ spread(k, 2 * heads).mT / math.sqrt(width)) @ spread(v, 2 * heads)
        gate = read.linear(x, f"{prefix}.lambda_proj.weight").sigmoid().transpose(1, 2)[..., None]
        return read.linear(_merged(both[:, 0::2] - gate * both[:, 1::2]), f"{prefix}.o_proj.weight")


def _heads(x: Tensor, count: int) -> Tensor:
    return x.unflatten(-1, (count, -1)).transpose(1, 2)


def _merged(x: Tensor) -> Tensor:
    return x.transpose(1, 2).flatten(2)


def _rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    even, odd = x[..., 0::2], x[..., 1::2]
    return torch.stack((even * cos - odd * sin, even * sin + odd * cos), dim=-1).flatten(-2)

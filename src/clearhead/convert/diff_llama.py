"""DiffLlama of transformers: differential attention V1 under its names and in its order of heads, both ways.

Of the twin's h heads DiffLlama takes heads i and i + h / 2 as the streams of differential head i; here they are heads
2i and 2i + 1. Its value of that head is value heads i and i + g / 2 side by side; here it is one block. Its head norm
has no weight: ours goes into the columns of the output projection, W diag(w), which is the same function.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from clearhead.convert.base import NameLine, NameTable, Source, refuse
from clearhead.convert.family import ATTENTION, LlamaFamily, frame, rope_for, shared_keys, to_halves
from clearhead.convert.orders import chunks_to_stripes, stripes_to_chunks
from clearhead.convert.weights import TensorRecipe, Weights, same
from clearhead.models.config import ClearheadConfig

NORM = f"{ATTENTION}.variant.head_norm.weight"
LAMBDAS = ("lambda_q1", "lambda_k1", "lambda_q2", "lambda_k2")


class DiffLlama(LlamaFamily):
    """`DiffLlamaForCausalLM`."""

    model_type = "diffllama"
    class_name = "DiffLlamaForCausalLM"
    exports = True

    def attention(self, config: Any) -> tuple[str, dict[str, Any]]:
        options: dict[str, Any] = {}
        if config.rms_norm_eps != 1e-5:
            options["norm_eps"] = config.rms_norm_eps
        if config.lambda_std_dev != 0.1:
            options["lambda_std"] = config.lambda_std_dev
        return "differential", options

    def table(self, config: ClearheadConfig) -> NameTable:
        heads, groups = config.num_attention_heads, config.num_key_value_heads
        assert groups is not None
        turned = to_halves(config)
        lines = [
            _striped("q_proj", heads, turned),
            _striped("k_proj", groups, turned),
            _striped("v_proj", groups, same),
        ]
        lines.append(NameLine(f"{ATTENTION}.o_proj.weight", f"{ATTENTION}.o_proj.weight"))
        lines += [NameLine(f"{ATTENTION}.variant.{name}", f"{ATTENTION}.{name}") for name in LAMBDAS]
        return NameTable((*frame(config), *lines), config.num_hidden_layers)

    def incoming(self, config: ClearheadConfig, source: Source) -> dict[str, TensorRecipe]:
        assert config.head_dim is not None
        found = super().incoming(config, source)
        width = 2 * config.head_dim
        for layer in range(config.num_hidden_layers):
            norm = NORM.format(layer=layer)
            beside = f"{ATTENTION}.o_proj.weight".format(layer=layer)
            like = source.weights.dtype(beside) if beside in source.weights else None
            found[norm] = TensorRecipe((), lambda: torch.ones(width), like)
        return found

    def written(self, config: ClearheadConfig) -> dict[str, Any]:
        if config.attention != "differential":
            raise refuse(
                "attention", config.attention, "DiffLlamaForCausalLM computes 'differential' (V1) only"
            )
        options = dict(config.attention_options or {})
        for key, only in (("lambda_init", "depth"), ("head_norm", True)):
            if options.get(key, only) != only:
                raise refuse(
                    f"attention_options[{key!r}]", options[key], f"DiffLlamaForCausalLM has {only!r}"
                )
        if (eps := options.get("norm_eps", 1e-5)) != config.rms_norm_eps:
            raise refuse(
                "attention_options['norm_eps']",
                eps,
                f"DiffLlamaForCausalLM has one for all norms, rms_norm_eps ({config.rms_norm_eps})",
            )
        from transformers import DiffLlamaConfig

        rope, length = rope_for(config, "DiffLlamaForCausalLM")
        made = DiffLlamaConfig(
            **shared_keys(config),
            head_dim=config.head_dim,
            max_position_embeddings=length,
            rope_parameters=rope,
            lambda_std_dev=options.get("lambda_std", 0.1),
            architectures=[self.class_name],
        )
        return dict(made.to_diff_dict())

    def outgoing(self, config: ClearheadConfig, weights: Weights) -> dict[str, TensorRecipe]:
        found = super().outgoing(config, weights)
        folded = False
        low = False
        for layer in range(config.num_hidden_layers):
            name, norm = f"{ATTENTION}.o_proj.weight".format(layer=layer), NORM.format(layer=layer)
            if not bool((weights.read(norm) == 1).all()):
                dtype = weights.dtype(name)
                folded, low = True, low or dtype.itemsize < 4
                # Two factors of 11 bits at most have an exact product in float32.
                found[name] = TensorRecipe((name, norm), fold, rounded=dtype == torch.float32)
        if folded and low:
            found = {
                name: TensorRecipe(recipe.takes, recipe.make, torch.float32, recipe.rounded)
                for name, recipe in found.items()
            }
        return found


def _striped(part: str, heads: int, turned: Callable[[Tensor], Tensor]) -> NameLine:
    """Streams of one head side by side here, in two halves there."""
    name = f"{ATTENTION}.{part}.weight"

    def into(rows: Tensor) -> Tensor:
        return chunks_to_stripes(rows, heads)

    def back(rows: Tensor) -> Tensor:
        return stripes_to_chunks(turned(rows), heads)

    return NameLine(name, name, into, back)


def fold(projection: Tensor, weight: Tensor) -> Tensor:
    """(hidden_size, H·2d) with each head's columns times the norm's weight (2d)."""
    wide = torch.promote_types(projection.dtype, torch.float32)
    repeated = weight.to(wide).repeat(projection.shape[1] // weight.numel())
    return projection.to(wide) * repeated

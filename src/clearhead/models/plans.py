"""How transformers shares a model out over several processes: the plans that it reads from a configuration.

A plan names modules and parameters of the decoder, "*" for every layer's number, and says for each what becomes of it:
transformers' styles for tensor parallelism and for FSDP, the tensors that come and go for pipelines.
"""

from collections.abc import Iterable, Sequence
from typing import Any

import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from transformers.distributed.parallel_utils import ALL_PARALLEL_STYLES
from transformers.distributed.tensor_parallel import TensorParallelLayer

from clearhead.variants.base import SUMMED, Variant

# Equal parts of the rows of q, k, v and of the columns of o are whole heads: `Variant.tensor_parallel`.
_BLOCKS = {
    "layers.*.self_attn.q_proj": "colwise",
    "layers.*.self_attn.k_proj": "colwise",
    "layers.*.self_attn.v_proj": "colwise",
    "layers.*.self_attn.o_proj": "rowwise",
    "layers.*.mlp.gate_proj": "colwise",
    "layers.*.mlp.up_proj": "colwise",
    "layers.*.mlp.down_proj": "rowwise",
}
PIPELINE = {
    "embed_tokens": (["input_ids"], ["inputs_embeds"]),
    "layers": (["hidden_states", "attention_mask"], ["hidden_states"]),
    "norm": (["hidden_states"], ["hidden_states"]),
}
ENCODER_PIPELINE = {
    "embed_tokens": (["input_ids"], ["inputs_embeds"]),
    "embed_norm": (["inputs_embeds"], ["inputs_embeds"]),
    "layers": (["hidden_states", "attention_mask"], ["hidden_states"]),
    "norm": (["hidden_states"], ["hidden_states"]),
}
_GATHERED = {"embed_tokens": "free_full_weight", "layers.*": "free_full_weight", "norm": "keep_full_weight"}
_ATTENTION = "layers.*.self_attn."


class SummedGradients(TensorParallelLayer):  # type: ignore[misc]
    """Every rank has the module's own parameters and the gradient of its own heads; the ranks' gradients are summed.

    transformers' "replicated_with_grad_allreduce" sums what has been accumulated, so with gradient accumulation the
    earlier steps once more at every step; here each step's gradient is summed before it is added.
    """

    def install_forward(self, module: nn.Module, mesh: DeviceMesh) -> nn.Module:
        forward, group = module.forward, mesh.get_group()
        # Weights are read after this is called, into other parameters.
        hooked: dict[str, nn.Parameter] = {}

        def summed(gradient: Tensor) -> Tensor:
            total = gradient.clone()
            dist.all_reduce(total, group=group)
            return total

        def hooking(*args: Any, **kwargs: Any) -> Any:
            for name, parameter in module.named_parameters(recurse=False):
                if parameter.requires_grad and hooked.get(name) is not parameter:
                    parameter.register_hook(summed)
                    hooked[name] = parameter
            return forward(*args, **kwargs)

        module.forward = hooking
        return module


ALL_PARALLEL_STYLES.register(SUMMED, SummedGradients())  # type: ignore[arg-type]


def tensor_parallel(variants: Iterable[Variant]) -> dict[str, str] | None:
    """The plan for a decoder of these variants; None where one of them does not say how it is shared out, or two of
    them say it differently of one name."""
    plan = dict(_BLOCKS)
    for variant in variants:
        styles = _styles(variant)
        if styles is None or any(plan.setdefault(name, style) != style for name, style in styles.items()):
            return None
    return plan


def _styles(variant: Variant) -> dict[str, str] | None:
    """The rules for what the variant has of its own; None where it does not say one for each parameter."""
    if variant.tensor_parallel is None:
        return None
    names = [
        name
        for name, module in variant.named_modules()
        if any(True for _ in module.parameters(recurse=False))
    ]
    for name, _ in variant.named_parameters():
        names.append(name)
        if not {name, name.rpartition(".")[0]} & variant.tensor_parallel.keys():
            return None
    return {
        f"{_ATTENTION}variant.{name}".removesuffix("."): variant.tensor_parallel[name]
        for name in names
        if name in variant.tensor_parallel
    }


def fully_sharded(variants: Iterable[Variant]) -> dict[str, str]:
    """FSDP takes parameters of one dtype at a time: beside those that stay in float32 the variant's others are apart.

    transformers gives the variant itself, which holds the former, a group of its own.
    """
    plan = dict(_GATHERED)
    for variant in variants:
        if variant.float32_parameters:
            for name, module in variant.named_modules():
                if name and any(True for _ in module.parameters(recurse=False)):
                    plan[f"{_ATTENTION}variant.{name}"] = "free_full_weight"
    return plan


def rules_of_attention(plan: dict[str, Any] | None) -> dict[str, str]:
    """Those of a plan, a whole model's or a decoder's, that are about attention, by the name inside the layer."""
    found = {}
    for name, style in (plan or {}).items():
        _, here, rest = name.partition(_ATTENTION)
        if here:
            found[rest] = style
    return found


def check_rules(plan: dict[str, str], changes: Any) -> bool:
    """Whether attention is shared out by `plan` with a user's `changes` to it: by all of its rules or by none.

    ValueError for changes to some of them: heads would be in pieces, or counted as if they were.
    """
    if changes == {}:
        return False
    own = rules_of_attention(plan)
    for name, style in rules_of_attention(changes if isinstance(changes, dict) else None).items():
        if own.get(name) != style:
            raise ValueError(
                f"tp_plan: {_ATTENTION}{name} is {style!r}; the rules of attention belong together, so leave it "
                f"{own.get(name)!r} or give an empty tp_plan"
            )
    return bool(own)


def share_heads(variants: Sequence[Variant], rank: int, parts: int) -> None:
    """Tell each layer's variant which of the heads are here; ValueError, before any is told, if they do not divide."""
    for layer, variant in enumerate(variants):
        try:
            variant.sizes.share(parts)
        except ValueError as error:
            raise ValueError(
                f"tp_size {parts} does not fit layer {layer}, a {type(variant).__name__} layer: {error} that it makes "
                f"of num_key_value_heads {variant.shape.num_kv_heads}, and every rank needs whole ones"
            ) from None
    for variant in variants:
        variant.share(rank, parts)

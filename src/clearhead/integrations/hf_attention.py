"""The fused CPU kernel inside any Hugging Face model: where its SDPA is plain causal attention, computed faster.

Softmax(Q Kᵀ · scale) V over the keys up to each query's own, the queries being the last of the keys. Whatever else a
layer asks for (padding, a window, a bias, a cache of fixed size) goes to Hugging Face's own SDPA function as before.
Hugging Face has no mask function that tells "the last L of S" from "the first L of S": its own builds a dense mask for
a prompt behind a cache, which costs the whole rectangle and copies of keys and values for grouped heads.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import causal_mask_function, sdpa_mask

from clearhead.functional import attention

if TYPE_CHECKING:
    from transformers import PreTrainedModel

NAME = "clearhead_plain_causal"


def use_fused(model: PreTrainedModel) -> bool:
    """Let `model` take it for good; returns whether it does: on CPU, with SDPA, if its attention can be exchanged.

    The same numbers as before, to rounding.
    """
    if model.device.type != "cpu" or model.config._attn_implementation != "sdpa":
        return False
    AttentionInterface.register(NAME, _attend)
    AttentionMaskInterface.register(NAME, _mask)
    model.set_attn_implementation(NAME)
    if model.config._attn_implementation == NAME:
        return True
    model.set_attn_implementation("sdpa")
    return False


def _mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int | Tensor = 0,
    kv_offset: int = 0,
    mask_function: Callable[..., Any] = causal_mask_function,
    attention_mask: Tensor | None = None,
    local_size: int | None = None,
    allow_is_causal_skip: bool = True,
    **settings: Any,  # Hugging Face's
) -> Tensor | None:
    """None for plain causal attention whose queries are the last keys, else the dense mask."""
    plain = (
        allow_is_causal_skip
        and local_size is None
        and mask_function is causal_mask_function
        and kv_offset == 0
        and int(q_offset) + q_length == kv_length
        and (attention_mask is None or bool(attention_mask.all()))
    )
    if plain:
        return None
    # Without the skip: there None would also mean that the queries are the first keys.
    made: Tensor | None = sdpa_mask(
        batch_size=batch_size,
        q_length=q_length,
        kv_length=kv_length,
        q_offset=int(q_offset),
        kv_offset=kv_offset,
        mask_function=mask_function,
        attention_mask=attention_mask,
        local_size=local_size,
        allow_is_causal_skip=False,
        **settings,
    )
    return made


def _attend(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    **settings: Any,  # Hugging Face's
) -> tuple[Tensor, Tensor | None]:
    """Hugging Face's contract: (B, H, L, D), (B, G, S, D) -> (B, L, H, E)."""
    queries, keys = query.shape[2], key.shape[2]
    causal = module.is_causal if is_causal is None else is_causal
    asked = any(settings.get(name) is not None for name in ("position_bias", "cache", "softcap", "s_aux"))
    if attention_mask is None and causal and not asked and dropout == 0:
        out = attention(query, key, value, is_causal=queries > 1, scale=scaling)
        return out.transpose(1, 2).contiguous(), None
    if attention_mask is None and causal and 1 < queries < keys:
        attention_mask = torch.ones(queries, keys, dtype=torch.bool, device=query.device).tril(keys - queries)
        attention_mask = attention_mask[None, None]
    return sdpa_attention_forward(
        module,
        query,
        key,
        value,
        attention_mask,
        dropout=dropout,
        scaling=scaling,
        is_causal=is_causal,
        **settings,
    )

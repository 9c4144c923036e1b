"""PyTorch's scaled_dot_product_attention."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from clearhead.core.dispatch import Caps, Engine, Problem
from clearhead.core.legalise import Call, Lowering, lower_mask
from clearhead.core.masks import MaskSpec

_CAUSAL = "causal"


class Sdpa(Engine):
    """`torch.nn.functional.scaled_dot_product_attention` with native GQA.

    Its fused kernels want values as wide as keys. On CPU keys padded to the value's width are faster than two slices
    (one softmax
    instead of two, larger products: `benchmarks/`); elsewhere the slices keep the kernels for narrow heads.
    """

    name = "sdpa"

    def caps(self, device: str) -> Caps:
        return Caps(wide_values="pad" if device == "cpu" else "split")

    def prepare(self, mask: MaskSpec, problem: Problem, lowering: Lowering) -> Any:
        if mask.is_open(problem.queries, problem.keys):
            return None
        if mask.is_plain_causal(problem.queries, problem.keys):
            return _CAUSAL
        dense = mask.materialise(problem.queries, problem.keys, problem.dtype, torch.device(problem.device))
        return lower_mask(dense, lowering, problem.kv_heads)

    def __call__(self, call: Call, mask: Any, scale: float) -> tuple[Tensor, Tensor | None]:
        flag = isinstance(mask, str)
        out = F.scaled_dot_product_attention(
            call.q,
            call.k,
            call.v,
            attn_mask=None if flag else mask,
            is_causal=flag,
            scale=scale,
            enable_gqa=call.q.shape[1] != call.k.shape[1],
        )
        return out, None

"""Attention written out: the engine that can do everything, returns maps, and uses quadratic memory."""

from typing import Any

import torch
from torch import Tensor

from clearhead.core.dispatch import AttentionProblem, Caps, Engine
from clearhead.core.lowering import Lowering, SoftmaxCall, lower_mask
from clearhead.core.masks import MaskSpec
from clearhead.core.modes import MODES
from clearhead.core.streams import repeat_kv


class Eager(Engine):
    """softmax(scale · q kᵀ + mask) v with explicit maps; the softmax in float32, or in float64 for float64 inputs."""

    name = "eager"

    def caps(self, device: str) -> Caps:
        return Caps(maps=True, modes=frozenset(MODES))

    def prepare(self, mask: MaskSpec, problem: AttentionProblem, lowering: Lowering) -> Any:
        if mask.is_open(problem.queries, problem.keys):
            return None
        device = torch.device(problem.device)
        dense = mask.materialise(problem.queries, problem.keys, _statistics(problem.dtype), device)
        return lower_mask(dense, lowering, problem.kv_heads)

    def __call__(self, call: SoftmaxCall, mask: Any, scale: float) -> tuple[Tensor, Tensor | None]:
        heads = call.q.shape[1]
        k, v = repeat_kv(call.k, heads), repeat_kv(call.v, heads)
        # (B, H, L, S)
        logits = (call.q @ k.transpose(-1, -2)).to(_statistics(call.q.dtype)) * scale
        if mask is None:
            weights = logits.softmax(dim=-1)
        else:
            logits = logits.masked_fill(~mask, float("-inf")) if mask.dtype == torch.bool else logits + mask
            empty = (logits == float("-inf")).all(dim=-1, keepdim=True)
            # Softmax over nothing is NaN, and so is its gradient, so such rows are computed as if open and zeroed
            # after.
            weights = logits.masked_fill(empty, 0.0).softmax(dim=-1).masked_fill(empty, 0.0)
        weights = weights.to(v.dtype)
        return weights @ v, weights


def _statistics(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32

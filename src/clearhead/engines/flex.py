"""PyTorch's FlexAttention: masks as functions, compiled to a kernel that skips what nobody sees."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import torch
from torch import Tensor

from clearhead.core.dispatch import AttentionProblem, Caps, Engine
from clearhead.core.lowering import Lowering, SoftmaxCall, lower_slopes
from clearhead.core.masks import MaskSpec


@dataclass(frozen=True, slots=True)
class FlexMask:
    """A block mask, None where everything is seen, and what is done to the logits, None for nothing."""

    block_mask: Any
    score: Callable[..., Tensor] | None


class Flex(Engine):
    """`torch.nn.attention.flex_attention` with a block mask. Forward only on CPU; no dense masks.

    ALiBi is a function of a logit and its place, computed in the kernel in float32: no mask of queries against keys.
    """

    name = "flex"
    # Without a `preferred`: on a GPU it skips the blocks that packed documents and windows hide, where SDPA takes a
    # dense mask, but nothing has timed the two, and a preference rests on measurements.

    def caps(self, device: str) -> Caps:
        # PyTorch 2.13 rejects float64 in the compiled CPU kernel.
        return Caps(
            masks=frozenset({"causal", "window", "padding", "documents", "alibi", "places"}),
            dtypes=frozenset({torch.float32, torch.bfloat16, torch.float16}),
            devices=frozenset({"cpu", "cuda", "mps", "xpu"}),
            grads=device not in ("cpu", "mps"),
        )

    def prepare(self, mask: MaskSpec, problem: AttentionProblem, lowering: Lowering) -> Any:
        from torch.nn.attention.flex_attention import create_block_mask

        queries, keys, device = problem.queries, problem.keys, problem.device
        score = None
        if mask.slopes is not None:
            slopes = lower_slopes(mask.slopes, lowering, problem.kv_heads)
            slopes = slopes.to(torch.float32).to(device, non_blocking=True)
            score = _score_mod(slopes, _offset(mask, queries, keys, device), mask.places)
        visibility = replace(mask, slopes=None, places=None)
        if visibility.is_open(queries, keys):
            return FlexMask(None, score)
        batches = [part.shape[0] for part in (mask.key_padding, mask.documents) if part is not None]
        block_mask = create_block_mask(
            _mask_mod(visibility, _offset(mask, queries, keys, device)),
            max(batches) if batches else None,
            None,
            queries,
            keys,
            device=device,
        )
        return FlexMask(block_mask, score)

    def __call__(self, call: SoftmaxCall, mask: FlexMask, scale: float) -> tuple[Tensor, Tensor | None]:
        run = _eager_flex() if torch.compiler.is_compiling() else _compiled_flex()
        # PyTorch has no FlexAttention for views whose sign is only noted.
        q, k, v = (x.resolve_neg() for x in (call.q, call.k, call.v))
        out = run(
            q,
            k,
            v,
            score_mod=mask.score,
            block_mask=mask.block_mask,
            scale=scale,
            enable_gqa=q.shape[1] != k.shape[1],
        )
        return out, None


@cache
def _compiled_flex() -> Callable[..., Tensor]:
    # Uncompiled FlexAttention materialises every logit, which is what this engine exists to avoid.
    return torch.compile(_eager_flex(), dynamic=False)


def _eager_flex() -> Callable[..., Tensor]:
    from torch.nn.attention.flex_attention import flex_attention

    return flex_attention  # type: ignore[return-value]


def _offset(mask: MaskSpec, queries: int, keys: int, device: str) -> Tensor:
    offset = keys - queries if mask.offset is None else mask.offset
    # Not `as_tensor`, which waits for a device to take the number.
    return offset.to(device) if isinstance(offset, Tensor) else torch.full((), offset, device=device)


def _score_mod(slopes: Tensor, offset: Tensor, places: tuple[Tensor, Tensor] | None) -> Callable[..., Tensor]:
    def biased(score: Tensor, b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return score - slopes[h] * (k - q - offset).abs()

    if places is None:
        return biased
    own, theirs = places

    def placed(score: Tensor, b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        distance = theirs[b if theirs.shape[0] > 1 else 0, k] - own[b if own.shape[0] > 1 else 0, q]
        return score - slopes[h] * distance.abs()

    return placed


def _mask_mod(mask: MaskSpec, offset: Tensor) -> Callable[..., Tensor]:
    def visible(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        seen = k == k
        if mask.is_causal:
            seen = seen & (k <= q + offset)
        if mask.window is not None:
            seen = seen & ((k - q - offset).abs() < mask.window)
        if mask.key_padding is not None:
            seen = seen & mask.key_padding[b if mask.key_padding.shape[0] > 1 else 0, k]
        if mask.documents is not None:
            row = b if mask.documents.shape[0] > 1 else 0
            seen = seen & (mask.documents[row, q + offset] == mask.documents[row, k])
        return seen

    return visible

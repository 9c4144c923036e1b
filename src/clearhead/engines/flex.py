"""PyTorch's FlexAttention: masks as functions, compiled to a kernel that skips what nobody sees."""

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor

from clearhead.core.dispatch import Caps, Engine, Problem
from clearhead.core.legalise import Call, Lowering
from clearhead.core.masks import MaskSpec


class Flex(Engine):
    """`torch.nn.attention.flex_attention` with a block mask. Forward only on CPU; no dense masks."""

    name = "flex"

    def caps(self, device: str) -> Caps:
        # PyTorch 2.13 rejects float64 in the compiled CPU kernel.
        return Caps(
            masks=frozenset({"causal", "window", "padding", "documents"}),
            dtypes=frozenset({torch.float32, torch.bfloat16, torch.float16}),
            grads=device != "cpu",
        )

    def prepare(self, mask: MaskSpec, problem: Problem, lowering: Lowering) -> Any:
        from torch.nn.attention.flex_attention import create_block_mask

        if mask.is_open(problem.queries, problem.keys):
            return None
        batches = [part.shape[0] for part in (mask.key_padding, mask.documents) if part is not None]
        return create_block_mask(
            _mask_mod(mask, problem.queries, problem.keys, problem.device),
            max(batches) if batches else None,
            None,
            problem.queries,
            problem.keys,
            device=problem.device,
        )

    def __call__(self, call: Call, mask: Any, scale: float) -> tuple[Tensor, Tensor | None]:
        run = _eager_flex() if torch.compiler.is_compiling() else _compiled_flex()
        out = run(
            call.q,
            call.k,
            call.v,
            block_mask=mask,
            scale=scale,
            enable_gqa=call.q.shape[1] != call.k.shape[1],
        )
        return out, None


@cache
def _compiled_flex() -> Callable[..., Tensor]:
    # Uncompiled FlexAttention materialises every logit, which is what this engine exists to avoid.
    return torch.compile(_eager_flex(), dynamic=False)


def _eager_flex() -> Callable[..., Tensor]:
    from torch.nn.attention.flex_attention import flex_attention

    return flex_attention  # type: ignore[return-value]


def _mask_mod(mask: MaskSpec, queries: int, keys: int, device: str) -> Callable[..., Tensor]:
    offset = torch.as_tensor(keys - queries if mask.offset is None else mask.offset, device=device)

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

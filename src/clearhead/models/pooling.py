"""One state for each text, of the states of its tokens.

Legend: B batch, L tokens.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from clearhead.core.values import demand
from clearhead.models.arguments import packed_numbers
from clearhead.models.places import restarts


def pool(
    states: Tensor,
    attention_mask: Tensor | None,
    position_ids: Tensor | None,
    keywords: Mapping[str, Any],
    pooling: str,
) -> Tensor:
    """(B, L, hidden_size) -> (B, hidden_size): the mean over real tokens, in float32 at least, or the first of them.

    ValueError for packed documents, which would be read as one text, and for a mask of 4 dimensions.
    """
    batch, length = states.shape[:2]
    if attention_mask is not None and attention_mask.ndim != 2:
        raise ValueError(
            f"attention_mask has {attention_mask.ndim} dimensions; a head for whole texts has to know which tokens are "
            "real: give (batch, tokens)"
        )
    real = (
        torch.ones_like(states[..., 0], dtype=torch.bool) if attention_mask is None else attention_mask != 0
    )
    real = real.expand(batch, length)
    packed = packed_numbers(keywords, batch, length) is not None
    if packed or position_ids is not None:
        alone = torch.zeros((), dtype=torch.bool) if packed else ~restarts(position_ids, real).any()  # type: ignore[arg-type]
        demand(
            alone,
            "packed documents reach a head for whole texts, which has one answer a row: give a text a row",
        )
    if pooling == "first":
        first = real.long().argmax(dim=1)
        return states[torch.arange(batch, device=states.device), first]
    wide = torch.promote_types(states.dtype, torch.float32)
    weights = real.to(wide)
    weights = weights / weights.sum(dim=1, keepdim=True).clamp(min=1)
    # What padding holds must not come through, NaN included.
    seen = states.to(wide).masked_fill(~real[..., None], 0)
    return (weights[..., None] * seen).sum(dim=1).to(states.dtype)

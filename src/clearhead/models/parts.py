"""What a forward pass must be told where processes share rows out, and what it cannot have there.

Each process has some of a row's tokens: with PyTorch's usual balance a piece from either end, so that positions jump.

Legend: B batch, L queries.
"""

import torch
from torch import Tensor
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from clearhead.core.values import demand

_DOCUMENTS = (
    "position_ids go back, which means packed documents: under context parallelism PyTorch takes no mask, and they "
    "would see one another; give every document a row of its own"
)
_PADDING = (
    "attention_mask has padding before real tokens: under context parallelism PyTorch takes no mask, so that padding "
    "must stand at a row's end"
)


def check_part(
    attention_mask: Tensor | None, position_ids: Tensor | None, packed: Tensor | None, whole: bool
) -> Tensor:
    """The positions (B or 1, L) of the tokens that are here; ValueError for what PyTorch's ring attention has not.

    packed: document numbers that were given as such. whole: whether the queries are all that the layers will see.
    Padding at a row's end is seen by padding alone, and so may stay. Packed documents are noticed by the process that
    has the end of one inside a part of its own.
    """
    if position_ids is None:
        raise ValueError(
            "position_ids are missing: under context parallelism a process has a part of every row and cannot count; "
            "give position_ids of whole rows, among the buffers that are shared out"
        )
    if not whole:
        raise ValueError(
            "past_key_values hold keys already: under context parallelism rows are read whole, without a cache"
        )
    if packed is not None:
        raise ValueError(
            "packed documents are given by seq_idx or cu_seq_lens_q: under context parallelism PyTorch takes no mask; "
            "give every document a row of its own"
        )
    if attention_mask is not None and attention_mask.ndim != 2:
        raise ValueError(
            f"attention_mask has {attention_mask.ndim} dimensions: under context parallelism PyTorch takes no mask; "
            "leave it out"
        )
    demand((position_ids.diff(dim=1) > 0).all(), _DOCUMENTS)
    if attention_mask is not None:
        if attention_mask.shape[1] != position_ids.shape[1]:
            raise ValueError(
                f"attention_mask has {attention_mask.shape[1]} columns for {position_ids.shape[1]} tokens: under "
                "context parallelism it must be among the buffers that are shared out, or be left out"
            )
        demand(((attention_mask != 0).int().diff(dim=1) <= 0).all(), _PADDING)
    return position_ids


def check_heads_are_not_shared() -> None:
    """ValueError under DeepSpeed's Ulysses, which shares out heads where functions of transformers are called.

    These models call engines of their own: each process would see its part of a row alone, without a word.
    """
    if torch.compiler.is_compiling():
        return
    if getattr(ALL_ATTENTION_FUNCTIONS["sdpa"], "__module__", "").startswith("deepspeed."):
        raise ValueError(
            "DeepSpeed's Ulysses (sp_backend='deepspeed') has put its function in the place of transformers' "
            "attention, which these models do not call; share rows out with PyTorch's context parallelism "
            "(cp_backend='torch')"
        )


def check_part_length(longest: Tensor, trained: int | None) -> None:
    """ValueError where a rope scaling asks how long rows are and nobody says: processes would turn keys differently.

    longest: of the tokens that are here; trained: up to which length no scaling asks, None where one always does.
    """
    missing = "rope_length is missing: this rope scaling turns keys by a row's length, of which a process has a part"
    if trained is None:
        raise ValueError(missing)
    demand((longest <= trained).all(), missing)

"""What the arguments of a forward pass must be, and what of their values has to be looked at.

Legend: B batch, H heads, L queries, S keys.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from transformers.utils.generic import TransformersKwargs

from clearhead.core.values import demand, readable
from clearhead.registry import did_you_mean

_BINARY = (
    "attention_mask of 2 dimensions must hold 1 for real tokens and 0 for padding{found}; a mask that is added to the "
    "logits, or says who sees whom, has 4 dimensions (batch, 1 or heads, queries, keys), and packed documents are "
    "position_ids that restart"
)
# BERT's tokenizers give them, zeros for a single text.
_SEGMENTS = "token_type_ids"
_NO_SEGMENTS = (
    "token_type_ids tell two texts apart, and these models have no embedding for that: leave them out "
    "(tokenizer.model_input_names = ['input_ids', 'attention_mask']); a separator between the texts tells as much"
)
# What transformers' tools may hand to any model. Documents are read from the first ones; the rest says nothing here.
_PACKING = ("cu_seq_lens_q", "cu_seq_lens_k", "seq_idx")
KNOWN = frozenset(
    {*TransformersKwargs.__annotations__, *_PACKING, "cache_position", "shift_labels", _SEGMENTS}
)


def check_keywords(
    keywords: Mapping[str, Any], own: Mapping[str, Any], causal: bool = True
) -> Mapping[str, Any]:
    """The keywords; those that a pipeline of transformers binds to a signature come once more as `kwargs`.

    TypeError for a keyword that neither `own`, the arguments by name, nor transformers' models have. ValueError for an
    `is_causal` that is not `causal`, which would ask for another model, and for `token_type_ids` other than zeros.
    """
    if isinstance(bound := keywords.get("kwargs"), Mapping):
        keywords = {name: value for name, value in keywords.items() if name != "kwargs"} | dict(bound)
    for name in keywords:
        if name not in KNOWN:
            known = sorted({*KNOWN, *own} - {"self", "kwargs"})
            raise TypeError(f"forward has no argument {name!r}: {did_you_mean(name, known)}")
    if (segments := keywords.get(_SEGMENTS)) is not None:
        demand((segments == 0).all(), _NO_SEGMENTS)
    if keywords.get("is_causal") is (not causal):
        kind = "causal models" if causal else "encoders, whose tokens see those behind them"
        raise ValueError(
            f"is_causal={not causal}: these are {kind}; a mask of 4 dimensions says who sees whom"
        )
    return keywords


def packed_numbers(keywords: Mapping[str, Any], batch: int, queries: int) -> Tensor | None:
    """(B or 1, L) document numbers, of the keywords that FlashAttention's collators give; None without them.

    cu_seq_lens_q (documents + 1,): where each document of one flattened row begins, and the row's length.
    seq_idx (B, L): the numbers themselves.
    """
    bounds, numbers = keywords.get("cu_seq_lens_q"), keywords.get("seq_idx")
    other = keywords.get("cu_seq_lens_k")
    bounds = other if bounds is None else bounds
    if bounds is not None:
        if batch != 1 or bounds.ndim != 1 or bounds.is_floating_point():
            raise ValueError(
                f"cu_seq_lens_q has shape {tuple(bounds.shape)} and {bounds.dtype} beside a batch of {batch}; expected "
                "integers (documents + 1,) and one flattened row"
            )
        demand(
            (bounds[0] == 0) & (bounds[-1] == queries) & (bounds.diff() >= 0).all(),
            f"cu_seq_lens_q must rise from 0 to the row's length, {queries}",
        )
        if other is not None and other is not bounds and other.shape == bounds.shape:
            demand(
                (other == bounds).all(),
                "cu_seq_lens_k must equal cu_seq_lens_q: keys are those of the queries",
            )
        slots = torch.arange(queries, device=bounds.device)
        return torch.searchsorted(bounds.contiguous(), slots, right=True)[None]
    if numbers is None:
        return None
    if tuple(numbers.shape) not in ((1, queries), (batch, queries)) or numbers.is_floating_point():
        raise ValueError(
            f"seq_idx has shape {tuple(numbers.shape)} and {numbers.dtype}; expected integers {(batch, queries)}"
        )
    return numbers.long()


def check_position_ids(position_ids: Tensor | None, batch: int, queries: int) -> None:
    """ValueError unless they are integers, (B or 1, L)."""
    if position_ids is None:
        return
    if tuple(position_ids.shape) not in ((1, queries), (batch, queries)):
        raise ValueError(
            f"position_ids has shape {tuple(position_ids.shape)}; expected {(batch, queries)} or {(1, queries)}"
        )
    if position_ids.is_floating_point() or position_ids.is_complex() or position_ids.dtype == torch.bool:
        raise ValueError(f"position_ids must hold integers, not {position_ids.dtype}")


def check_dense(mask: Tensor, batch: int, queries: int, keys: int) -> None:
    """ValueError unless it is bool or floating point and has a row for each query and a column for each key."""
    if mask.dtype != torch.bool and not mask.is_floating_point():
        raise ValueError(
            "attention_mask of 4 dimensions must be bool (True = visible) or floating point (added to the logits), "
            f"not {mask.dtype}"
        )
    rows, _, height, width = mask.shape
    if rows not in (1, batch) or height not in (1, queries) or (width != 1 and width < keys):
        raise ValueError(
            f"attention_mask has shape {tuple(mask.shape)}; expected ({batch} or 1, heads or 1, {queries}, {keys})"
        )


def check_mask_shape(mask: Tensor, batch: int, queries: int, past: int | Tensor, keys: int) -> None:
    """ValueError unless it is (B, S), with a column for each token so far; in fixed caches up to all that fit."""
    # How much of a cache of fixed size is written is on its device; asking would stall it.
    known = not isinstance(past, Tensor) or (past.device.type == "cpu" and readable(past))
    least = int(past) + queries if known else queries
    if mask.ndim != 2 or mask.shape[0] not in (1, batch) or not least <= mask.shape[1] <= keys:
        raise ValueError(
            f"attention_mask has shape {tuple(mask.shape)}; expected 4 dimensions or ({batch}, "
            f"{least if known else keys}), one column for each token so far, those in the cache too"
        )


def has_padding(mask: Tensor, documents: Tensor | None, look: bool = True) -> tuple[bool, Tensor | None]:
    """Whether anything of a (B, S) mask is padded, and `documents` where there is more than one.

    Looked at together, once; without `look`, and where nothing can be looked at, the answers are yes.

    ValueError for a mask that holds anything but 0 and 1, or is floating point and all 0: such masks are added.
    """
    if not (look and readable(mask)):
        odd = (mask != 0) & (mask != 1)
        demand(~odd.any(), _BINARY.format(found=""))
        return True, documents
    lowest, highest = mask.aminmax()
    facts = [lowest, highest]
    if mask.is_floating_point():
        facts.append(((mask != 0) & (mask != 1)).any())
    if documents is not None:
        facts.append(documents.amax())
    if mask.device.type == "cpu":
        found = [float(fact) for fact in facts]
    else:
        found = torch.stack(
            [fact.double() if mask.device.type != "mps" else fact.float() for fact in facts]
        ).tolist()
    low, high = found[:2]
    whole = not mask.is_floating_point()
    if not (low >= 0 and high <= 1) or (not whole and (found[2] or high == 0)):
        raise ValueError(_BINARY.format(found=f"; found values from {low:g} to {high:g}"))
    if documents is not None and found[-1] <= 1:
        documents = None
    return low == 0, documents

"""The length of a request, which some rope scalings turn its tokens by: one number for all of its tokens.

A token's rotation must not depend on what happens to share its batch, its row or its call. So the length belongs to a
request: the row, or the document of a packed row, and all calls that extend one cache.

Legend: B batch, N tokens.
"""

import torch
from torch import Tensor

from clearhead.core.values import demand, readable


def given_length(rope_length: int | Tensor, batch: int, device: torch.device) -> Tensor:
    """(B or 1, 1): one length for all rows, or (B,) for each; ValueError for what is no length."""
    if not isinstance(rope_length, Tensor):
        if not hasattr(rope_length, "__index__"):
            raise ValueError(f"rope_length must be an integer number of tokens, not {rope_length!r}")
        if isinstance(rope_length, bool) or rope_length < 1:
            raise ValueError(f"rope_length must be at least 1, not {rope_length!r}")
        return torch.full((1, 1), rope_length, device=device)
    if rope_length.is_floating_point() or rope_length.dtype == torch.bool:
        raise ValueError(f"rope_length must hold integers, not {rope_length.dtype}")
    if rope_length.ndim > 1 or rope_length.numel() not in (1, batch):
        raise ValueError(
            f"rope_length has shape {tuple(rope_length.shape)}; expected one length for each row, ({batch},)"
        )
    return rope_length.reshape(-1, 1).to(device)


def check_given_length(length: Tensor, longest: Tensor) -> None:
    """Raise ValueError where a request is longer than the length, (B or 1, 1), that was given for it.

    longest: (B or 1, 1) or (B, N), as of `longest_request`. Devices are not waited for: see `demand`.
    """
    if longest.device.type == "cpu" and readable(longest):
        for given, needed in zip(
            *torch.broadcast_tensors(length, longest.amax(dim=1, keepdim=True)), strict=True
        ):
            if needed > given:
                raise ValueError(
                    f"rope_length is {int(given)}, shorter than the request: a position here is {int(needed) - 1}, so "
                    f"it must be at least {int(needed)} (prompt and all new tokens)"
                )
    else:
        demand((longest <= length).all(), "rope_length is shorter than the request that it was given for")


def longest_request(positions: Tensor, documents: Tensor | None = None, real: Tensor | None = None) -> Tensor:
    """(B or 1, 1) or, with documents, (B, N): the longest position + 1, of each row or of each token's document.

    positions:  (B or 1, N) integers.
    documents:  (B or 1, N) integers, the same number for the tokens of one document.
    real:       (B, N) bool; padding, where it is False, counts for nothing.
    No value is looked at on the host.
    """
    if real is not None:
        positions = torch.where(real, positions, 0)
    if documents is not None:
        return _longest_of_document(positions, documents) + 1
    return positions.amax(dim=1, keepdim=True) + 1


def check_cached_length(trained: int | None, past: int | Tensor, total: int | None) -> None:
    """Raise ValueError where a call that was given no length cannot know how cached keys were turned.

    trained: the length up to which requests are turned alike.
    past:  cached tokens, a tensor for caches of fixed size.
    total: tokens in the cache after the call, for caches of fixed size all that fit; None where that is not known.

    As long as the cache stays within the trained length, all calls agree. How full a cache of fixed size is cannot be
    asked without stalling its device, so what counts is what it may come to hold, padding included.
    """
    starts_here = not isinstance(past, Tensor) and past == 0
    if starts_here or (trained is not None and total is not None and total <= trained):
        return
    held = "an unknown number of" if total is None else str(total)
    raise ValueError(
        f"rope_length is missing: the cache may hold {held} tokens, the model was trained with "
        f"{'an unknown number' if trained is None else trained}, and this rope scaling turns keys by the length of "
        "the whole request; give every call on this cache, `generate` too, the same rope_length, from the first one on "
        "(all tokens that the request or conversation may come to)"
    )


def _longest_of_document(positions: Tensor, documents: Tensor) -> Tensor:
    """(B, N): the longest position among the tokens with the same number, in whatever order they stand."""
    documents = documents.expand(max(documents.shape[0], positions.shape[0]), -1)
    numbers, order = documents.sort(dim=1, stable=True)
    group = torch.zeros_like(order)
    group[:, 1:] = (numbers[:, 1:] != numbers[:, :-1]).cumsum(dim=1)
    ordered = positions.expand_as(order).gather(1, order)
    longest = torch.zeros_like(ordered).scatter_reduce(1, group, ordered, "amax", include_self=False)
    return torch.empty_like(ordered).scatter(1, order, longest.gather(1, group))

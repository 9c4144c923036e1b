"""Rows that are shared out over processes, as PyTorch's context parallelism does it."""

import torch.nn.functional as F

_SDPA = F.scaled_dot_product_attention
_THEIRS = "torch.distributed.tensor.experimental."


def rows_are_shared() -> bool:
    """Whether this call is inside PyTorch's `context_parallel`, so that a process has a part of every row.

    Nothing is told of it: `context_parallel` puts a function of its own in the place of SDPA, which exchanges keys
    and values with the other processes. Whatever else computes attention there sees its own part alone.
    """
    # The first question is one that `torch.compile` can follow; others put functions there too.
    here = F.scaled_dot_product_attention
    return here is not _SDPA and str(getattr(here, "__module__", "")).startswith(_THEIRS)

"""How much memory a training took."""

import resource
import sys

import torch


def peak_memory() -> int:
    """Bytes: the GPU's peak allocation, or this process's peak resident set, libraries and data included."""
    if torch.cuda.is_available():
        return int(torch.cuda.max_memory_allocated())
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return int(peak if sys.platform == "darwin" else peak * 1024)

"""Which kernel PyTorch's SDPA takes on a GPU, as data: its own rules, for a plan of what is not here.

Read from PyTorch's sources (`aten/src/ATen/native/transformers/cuda/sdp_utils.cpp`, 2.13 and the main branch after it)
and verified on no device:

                 flash              cudnn               efficient                 math
    numbers      16 bits            16 bits             16 and 32 bits            all
    mask         none, or causal    yes                 yes                       yes
                 with L = S
    values       as wide as keys    their own width     their own width           any
    widths       256 (AMD 512)      128, in eights      multiples of 16 bytes     any
    GQA          yes                yes                 no (later than 2.13: yes) yes
    GPUs         sm_80 on, AMD      sm_80 on            all; on AMD as flash      all
    memory       linear             linear              linear                    every map written out

cudnn is asked first on sm_90 and sm_100, where cuDNN is newer than 9.15, and elsewhere never. Efficient attention keeps
the output of values up to 128 wide in registers, and adds up wider ones in memory.
"""

import torch

from clearhead.core.capability import compute_capability
from clearhead.core.dispatch import AttentionProblem
from clearhead.core.lowering import Lowering

_HALVES = frozenset({torch.float16, torch.bfloat16})
_ORDER = ("flash", "efficient")
# Widest value whose sums efficient attention keeps in registers.
_IN_REGISTERS = 128


def is_amd(problem: AttentionProblem) -> bool:
    name = problem.capability
    return name.startswith("gfx") if name is not None else torch.version.hip is not None


def is_masked(problem: AttentionProblem) -> bool:
    """Whether SDPA is given a mask of queries against keys, and not nothing or its causal flag."""
    if problem.mask - {"causal"}:
        return True
    alone = problem.queries == 1 and problem.ends_aligned
    square = problem.queries == problem.keys and problem.ends_aligned
    return "causal" in problem.mask and not (alone or square)


def repeats_keys(dtype: torch.dtype, masked: bool) -> bool:
    """Whether the key-value heads of a group are better repeated, as only flash and cudnn know groups.

    Without, such a call would run in math, which repeats them too and writes every map out.
    """
    return masked or dtype not in _HALVES


def takes_wide_values(problem: AttentionProblem) -> bool:
    """Whether values wider than keys go in as they are: where flash takes no slices of them and efficient takes all.

    For V1 that is two calls with 6d multiply-adds for a query and key, and not four with 8d.
    """
    if problem.value_width > _IN_REGISTERS or is_amd(problem):
        return False
    sliced = _against_flash(problem, problem.key_width, problem.key_width)
    return sliced is not None and _against_efficient(problem, problem.key_width, problem.value_width) is None


def kernel_of(problem: AttentionProblem, lowering: Lowering) -> tuple[str, tuple[tuple[str, str], ...]]:
    """The kernel that SDPA takes for the calls of `lowering`, and why not those that it asks before."""
    keys = problem.value_width if lowering.pad else problem.key_width
    values = problem.value_width // lowering.slices
    checks = {"flash": _against_flash, "cudnn": _against_cudnn, "efficient": _against_efficient}
    capability = compute_capability(problem.capability)
    first = ("cudnn",) if capability is not None and capability[0] in (9, 10) else ()
    reasons: list[tuple[str, str]] = []
    for name in (*first, *_ORDER):
        reason = checks[name](problem, keys, values)
        if reason is None:
            return name, tuple(reasons)
        reasons.append((name, reason))
    return "math", tuple(reasons)


def _against_flash(problem: AttentionProblem, keys: int, values: int) -> str | None:
    if problem.dtype not in _HALVES:
        return "it computes in 16 bits only"
    if is_masked(problem):
        return "it takes no mask"
    if keys != values:
        return "it takes values as wide as keys"
    most = 512 if is_amd(problem) else 256
    if keys > most:
        return f"it takes heads up to {most} wide"
    capability = compute_capability(problem.capability)
    if capability is not None and capability < (8, 0):
        return "it needs compute capability 8.0"
    small = capability is not None and (capability in ((8, 6), (8, 7), (8, 9)) or capability[0] == 12)
    if small and problem.needs_grad and 192 < keys <= 224:
        return "it has no backward pass for such heads on this GPU"
    return None


def _against_cudnn(problem: AttentionProblem, keys: int, values: int) -> str | None:
    if problem.dtype not in _HALVES:
        return "it computes in 16 bits only"
    if max(keys, values) > 128:
        # Newer cuDNN takes 256 on these GPUs; the older one is counted on.
        return "it takes heads up to 128 wide"
    if keys % 8 or values % 8:
        return "it takes widths in multiples of 8"
    return "it takes more than one key" if problem.keys == 1 else None


def _against_efficient(problem: AttentionProblem, keys: int, values: int) -> str | None:
    if problem.dtype not in _HALVES and problem.dtype != torch.float32:
        return "it computes in 16 and 32 bits only"
    capability = compute_capability(problem.capability)
    if capability is not None and capability < (8, 0) and problem.dtype == torch.bfloat16:
        return "it computes in bfloat16 from compute capability 8.0 on"
    unit = 8 if problem.dtype in _HALVES else 4
    if keys % unit or values % unit:
        return f"it takes widths in multiples of {unit}"
    return "on AMD it takes values as wide as keys" if is_amd(problem) and keys != values else None

"""The Triton kernels as a backend: what they take and on which devices."""

import os
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec

import torch
from torch import Tensor

from clearhead.core.capability import compute_capability
from clearhead.core.dispatch import AttentionProblem, Kernel
from clearhead.core.masks import MaskSpec
from clearhead.core.norm import HeadNorm
from clearhead.core.streams import Streams, repeat_kv
from clearhead.core.values import dtype_name
from clearhead.kernels.triton import ops as _ops  # noqa: F401  (registers the operators)
from clearhead.kernels.triton.configs import FEW_ROWS

MASKS = frozenset({"causal", "padding", "documents", "window", "alibi"})
WIDEST_KEY, WIDEST_VALUE = 256, 512
LEAST_TRITON = (3, 6)
LEAST_CAPABILITY = (8, 0)
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_MIXING = {1: "single", 2: "difference"}


def interpreted() -> bool:
    """Whether Triton runs its kernels in Python on CPU tensors, which its tests do."""
    return os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "on", "yes", "y")


class Triton(Kernel):
    """One or two softmax maps combined and applied without being held, on NVIDIA and AMD GPUs.

    A second stream with fewer heads than the first (grouped differential attention) has its queries repeated: the same
    arithmetic as with equally many heads, and only those queries are copied.

    The algorithm and its arithmetic are in the docstrings of `forward.py` and `backward.py`.
    """

    name = "triton"
    unequal_heads = True
    takes_tables = True
    takes_logits = True
    passed_over = "no GPU has timed it yet: name it to use it"

    def __init__(self) -> None:
        # Looked for, not imported: most who load this will not run it.
        self.missing = _missing()
        self.interpreted = interpreted()

    def refusal(self, problem: AttentionProblem) -> str | None:
        if problem.device == "cpu" and not self.interpreted:
            return "it runs on cuda, and on cpu only in Triton's interpreter (TRITON_INTERPRET=1)"
        if problem.device not in ("cuda", "cpu"):
            return f"it runs on cuda, not on {problem.device}"
        reason = self.missing or (None if problem.device == "cpu" else _too_old(problem.capability))
        if reason is not None:
            return reason
        if problem.needs_maps:
            return "it does not return attention maps"
        if problem.dtype not in _DTYPES:
            return f"it computes in bfloat16, float16, float32, not in {dtype_name(problem.dtype)}"
        if _MIXING.get(problem.streams) != problem.mixing:
            return f"it knows one stream, or the difference of two, not {problem.streams} with another mixing"
        if problem.stream_heads is not None and (reason := _against_heads(problem)) is not None:
            return reason
        if problem.mask - MASKS:
            return f"it cannot express a mask with {', '.join(sorted(problem.mask - MASKS))}"
        if problem.key_width > WIDEST_KEY or problem.value_width > WIDEST_VALUE:
            widths = f"{problem.key_width} and {problem.value_width}"
            return f"it takes keys up to {WIDEST_KEY} and values up to {WIDEST_VALUE} wide, not {widths}"
        return None

    def preferred(self, problem: AttentionProblem) -> bool:
        # A preference rests on measurements, and there is none: what is known is in docs/gpu-kernel.md.
        return False

    def norms(self, norm: HeadNorm, heads: Streams) -> bool:
        """Where the result has the type that it would have: the weight's and the values' are one, or autocast's."""
        weight, v = norm.weight, heads.v
        if getattr(weight, "device_mesh", None) is not None or weight.device != v.device:
            return False
        kind = v.device.type
        cast = torch.is_autocast_enabled(kind) and torch.get_autocast_dtype(kind) == v.dtype
        return weight.numel() == v.shape[3] and weight.dtype in _DTYPES and (weight.dtype == v.dtype or cast)

    def run(self, heads: Streams, mask: MaskSpec, scale: float) -> Tensor:
        weight = None if heads.norm is None else heads.norm.weight
        sigmoid = heads.gate_logit is not None
        gate = heads.gate_logit if sigmoid else heads.gate
        keep = torch.is_grad_enabled() and any(
            x is not None and x.requires_grad for x in (*heads.q, *heads.k, heads.v, gate, weight)
        )
        if keep or heads.q[0].shape[2] * (heads.q[0].shape[1] // heads.v.shape[1]) > FEW_ROWS:
            heads = heads.expanded()
        q1, k1, v = heads.q[0], heads.k[0], heads.v
        q2 = repeat_kv(heads.q[1], q1.shape[1]) if len(heads.q) == 2 else None
        k2 = heads.k[1] if len(heads.k) == 2 else None
        if gate is not None:
            gate = (gate if sigmoid else gate.float()).expand(*q1.shape[:3], 1)
        shifted = isinstance(mask.offset, Tensor)
        offset = v.shape[2] - q1.shape[2] if mask.offset is None or shifted else mask.offset
        out, _, _, _ = torch.ops.clearhead.triton_attention(
            *(q1, q2, k1, k2, v, gate, mask.key_padding),
            None if mask.documents is None else mask.documents.long(),
            mask.offset if shifted else None,
            None if mask.slopes is None else mask.slopes.to(v.device, torch.float32, non_blocking=True),
            *(heads.table, weight, offset, mask.window or 0, mask.is_causal, scale),
            *((0.0, 1.0) if heads.norm is None else (heads.norm.eps, heads.norm.factor)),
            *(sigmoid, keep),
        )
        return out


def _against_heads(problem: AttentionProblem) -> str | None:
    """Why it does not take streams with these numbers of heads, or None."""
    counts = problem.stream_heads or ()
    if len(counts) != 2 or counts[0] % counts[1]:
        return (
            f"it takes a second stream whose heads divide the first's, not {' and '.join(map(str, counts))}"
        )
    if problem.differs_by_head:
        return "a mask or ALiBi's slopes by head need streams with equally many heads"
    return None


def _missing() -> str | None:
    if find_spec("triton") is None:
        return "Triton is not installed: pip install 'clearhead[triton]'"
    try:
        found = version("triton")
    except PackageNotFoundError:
        # AMD's builds have other names.
        return None
    if tuple(int(x) for x in found.split(".")[:2]) < LEAST_TRITON:
        return f"it needs Triton {'.'.join(map(str, LEAST_TRITON))} or newer, not {found}"
    return None


def _too_old(capability: str | None) -> str | None:
    """Why a GPU is not one of those the kernels are written for; None for one that nobody could ask."""
    found = compute_capability(capability)
    if found is not None and found < LEAST_CAPABILITY:
        return f"it needs a GPU of compute capability 8.0 or higher, not {found[0]}.{found[1]}"
    return None

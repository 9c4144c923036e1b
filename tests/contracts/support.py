"""Problems, and how far an answer may be from its oracle."""

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from clearhead.testing.masks import MASKS, Mask, cast, make_mask, rand

__all__ = ["MASKS", "Mask", "cast", "make_mask", "rand"]

# Query heads (of the output) and key-value groups.
HEADS = {"mha": (4, 4), "gqa": (4, 2), "mqa": (4, 1)}
# Masks without an (L, S) part, which fused kernels and FlexAttention take.
INDEXED = (
    "causal",
    "last",
    "padding",
    "documents",
    "window",
    "window_last",
    "window_both_ways",
    "window_of_real_documents",
)


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


Function = Callable[..., Tensor]


def value_and_gradients(
    function: Function, inputs: Sequence[Tensor], cotangent: Tensor, dtype: torch.dtype, **arguments: object
) -> list[Tensor]:
    """The output in float64, then the gradient of (output · cotangent) with respect to every input."""
    leaves = [x.to(dtype).detach().clone().requires_grad_() for x in inputs]
    out = function(*leaves, **cast(arguments, dtype))
    assert out.dtype == dtype
    gradients = torch.autograd.grad(out, leaves, cotangent.to(dtype), allow_unused=False)
    return [x.detach().double() for x in (out, *gradients)]


def distances(found: Sequence[Tensor], expected: Sequence[Tensor]) -> list[float]:
    assert [x.shape for x in found] == [x.shape for x in expected]
    return [distance(a, b) for a, b in zip(found, expected, strict=True)]


def distance(a: Tensor, b: Tensor) -> float:
    """Largest absolute difference; NaN is infinitely far."""
    return float((a.detach().double() - b.detach().double()).abs().nan_to_num(nan=math.inf).max())


def relative_error(found: Sequence[Tensor], expected: Sequence[Tensor]) -> float:
    """‖found − expected‖ / ‖expected‖ of everything as one vector: one small gradient may be accurate by luck."""
    a, b = (torch.cat([x.detach().double().flatten() for x in items]) for items in (found, expected))
    return float((a - b).norm() / b.norm())


def assert_within(
    found: Sequence[Tensor], expected: Sequence[Tensor], plain: Sequence[Tensor], dtype: torch.dtype
) -> None:
    """The value, then all gradients: at most twice the error of the plain computation, plus a rounding floor."""
    for part in (slice(0, 1), slice(1, None)):
        if expected[part]:
            error, own = (
                relative_error(found[part], expected[part]),
                relative_error(plain[part], expected[part]),
            )
            allowed = 2 * own + 4 * torch.finfo(dtype).eps
            assert error <= allowed, f"{error:.2e} is over {allowed:.2e}, plain attention being {own:.2e} off"


def plain_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    is_causal: bool = False,
    key_padding_mask: Tensor | None = None,
    documents: Tensor | None = None,
    window: int | None = None,
    attn_mask: Tensor | None = None,
    scale: float | None = None,
) -> Tensor:
    """Attention as anyone would write it, in the precision of its inputs with the softmax in float32."""
    L, D, S, repeats = q.shape[2], q.shape[3], k.shape[2], q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(repeats, 1), v.repeat_interleave(repeats, 1)
    scores = (q @ k.transpose(-1, -2)).float() * (D**-0.5 if scale is None else scale)
    seen = torch.ones(1, 1, L, S, dtype=torch.bool)
    if is_causal:
        seen = seen.tril(S - L)
    if window is not None:
        seen = seen.triu(S - L - window + 1).tril(S - L + window - 1)
    if key_padding_mask is not None:
        seen = seen & key_padding_mask[:, None, None]
    if documents is not None:
        seen = seen & (documents[:, None, S - L :, None] == documents[:, None, None])
    scores = scores.masked_fill(~seen, float("-inf"))
    if attn_mask is not None:
        mask = attn_mask[:, None] if attn_mask.dim() == 3 else attn_mask
        scores = (
            scores + mask.float() if mask.is_floating_point() else scores.masked_fill(~mask, float("-inf"))
        )
    blind = (scores == float("-inf")).all(-1, keepdim=True)
    weights = scores.masked_fill(blind, 0.0).softmax(-1).masked_fill(blind, 0.0)
    return weights.to(v.dtype) @ v


def plain_differential(q: Tensor, k: Tensor, v: Tensor, lam: Tensor, **arguments: object) -> Tensor:
    """Two plain attentions and a subtraction."""
    shared = k.shape[1] == v.shape[1]
    keys = (k, k) if shared else (k[:, 0::2], k[:, 1::2])
    signal = plain_attention(q[:, 0::2], keys[0], v, **arguments)  # type: ignore[arg-type]
    noise = plain_attention(q[:, 1::2], keys[1], v, **arguments)  # type: ignore[arg-type]
    return signal - lam * noise

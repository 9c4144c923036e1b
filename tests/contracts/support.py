"""Problems, and how far an answer may be from its oracle."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from tests.oracles.softmax import visible

# Query heads (of the output) and key-value groups.
HEADS = {"mha": (4, 4), "gqa": (4, 2), "mqa": (4, 1)}
MASKS = ("none", "causal", "last", "padding", "documents", "dense", "per_head", "bias", "blind_rows")
MASKS += ("window", "window_of_one", "window_last", "window_both_ways", "window_of_real_documents")
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


@dataclass(frozen=True)
class Mask:
    """A mask as arguments of the public op and as arguments of the oracle."""

    op: dict[str, object]
    oracle: dict[str, object]
    keys_beyond_queries: int = 0


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def rand(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=generator(seed), dtype=torch.float64)


def make_mask(kind: str, batch: int, heads: int, queries: int, seed: int = 0) -> Mask:
    """The mask `kind` for `queries` queries; "last" is causal attention of the last queries over more keys."""
    rng = generator(seed + 77)
    if kind == "none":
        return Mask({}, {})
    if kind == "causal":
        return Mask({"is_causal": True}, {"causal": True})
    if kind == "last":
        return Mask({"is_causal": True}, {"causal": True}, keys_beyond_queries=3)
    if kind == "padding":
        real = torch.ones(batch, queries, dtype=torch.bool)
        # Rows 0 and 1 of the first sequence then see nothing at all.
        real[0, :2] = False
        seen = visible(batch, queries, queries, key_padding=real)[:, None]
        return Mask({"is_causal": True, "key_padding_mask": real}, {"causal": True, "allowed": seen})
    if kind == "documents":
        number = (torch.arange(queries) >= queries // 2).long().expand(batch, queries)
        seen = visible(batch, queries, queries, documents=number)[:, None]
        return Mask({"is_causal": True, "documents": number}, {"causal": True, "allowed": seen})
    if kind.startswith("window"):
        return _windowed(kind, batch, queries)
    if kind == "dense":
        seen = torch.rand(queries, queries, generator=rng) < 0.6
        seen |= torch.eye(queries, dtype=torch.bool)
        return Mask({"attn_mask": seen}, {"allowed": seen})
    if kind == "per_head":
        seen = torch.rand(batch, heads, queries, queries, generator=rng) < 0.6
        seen |= torch.eye(queries, dtype=torch.bool)
        return Mask({"attn_mask": seen}, {"allowed": seen})
    if kind == "bias":
        bias = torch.randn(batch, heads, queries, queries, generator=rng, dtype=torch.float64)
        bias[..., 0, 1] = float("-inf")
        return Mask({"attn_mask": bias}, {"bias": bias.clamp(min=-1e9), "allowed": bias > -1e9})
    assert kind == "blind_rows"
    seen = torch.rand(batch, heads, queries, queries, generator=rng) < 0.5
    seen[0, :, 1] = False
    seen[:, 0, 3] = False
    return Mask({"attn_mask": seen}, {"allowed": seen})


def _windowed(kind: str, batch: int, queries: int) -> Mask:
    extra = {"window_last": 3, "window_of_real_documents": 4}.get(kind, 0)
    keys, causal = queries + extra, kind != "window_both_ways"
    window = 1 if kind == "window_of_one" else 3
    op: dict[str, object] = {"is_causal": causal, "window": window}
    seen = visible(batch, queries, keys, window=window)
    if kind == "window_of_real_documents":
        number = ((torch.arange(keys) >= 3).long() + (torch.arange(keys) >= keys - 2)).repeat(batch, 1)
        number[-1] = 7
        real = torch.ones(batch, keys, dtype=torch.bool)
        # The first query of the first sequence then sees nothing at all.
        real[0, 2 : extra + 1] = False
        op |= {"documents": number, "key_padding_mask": real}
        parts = {"documents": number[:, extra:], "key_documents": number, "key_padding": real}
        seen = visible(batch, queries, keys, window=window, **parts)
    return Mask(op, {"causal": causal, "allowed": seen[:, None]}, keys_beyond_queries=extra)


def cast(arguments: dict[str, object], dtype: torch.dtype) -> dict[str, object]:
    """Floating-point masks in `dtype`; everything else as it is."""
    return {
        name: value.to(dtype) if isinstance(value, Tensor) and value.is_floating_point() else value
        for name, value in arguments.items()
    }


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

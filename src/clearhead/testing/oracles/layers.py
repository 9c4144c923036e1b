"""A whole attention layer: project, split into heads, attend, finish, project back.

Weights are (out, in) matrices by name: q_proj, k_proj, v_proj, o_proj, then V1's lambda_q1, lambda_k1,
lambda_q2, lambda_k2 and head_norm, V2's lambda_proj (and lambda_proj.bias). Head counts are the Transformer twin's:
with h heads of width d, V1 has h/2 heads whose values are 2d wide, V2 has h heads fed by 2h query heads, V1 with
`values: "own"` has h heads with two queries and two keys each, the others have h. The collinear forms of V1 and V2
have their weights. DEX adds dex (W_D) and dex.factor.lambda_learn; DiffLoRA query_up, key_up, first_query_up,
first_key_up, and rows below its q_proj and k_proj. `progress` of the options is how far λ has risen.
"""

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from .alibi import slope
from .collinear import collinear_map, collinear_t
from .differential import differential_map, finish, lambda_init, lambda_value
from .differential_collinear import differential_collinear_map
from .retrofits import dex_lambda, dex_output, diff_lora_lambda, diff_lora_parts, risen
from .rotary import Turning, rotate
from .softmax import apply_map, attention_map, rms_norm, visible


@dataclass(frozen=True)
class LayerSpec:
    attention: str
    heads: int
    kv_heads: int
    head_dim: int
    layer: int = 0
    position: str = "rope"
    base: float | Turning = 10_000.0
    eps: float = 1e-5
    options: dict[str, Any] = field(default_factory=dict)


def heads_of(x: Tensor, weight: Tensor, width: int) -> Tensor:
    """x Wᵀ cut into heads of `width`: (B, L, d_model) -> (B, heads, L, width)."""
    y = torch.einsum("bli,oi->blo", x, weight)
    return torch.stack(y.split(width, dim=-1), dim=1)


def cut(y: Tensor, width: int) -> Tensor:
    """(B, L, heads·width) -> (B, heads, L, width)."""
    return torch.stack(y.split(width, dim=-1), dim=1)


def side_by_side(first: Tensor, second: Tensor) -> Tensor:
    """Heads of two streams, (B, H, L, D) each, as (B, 2H, L, D): first, second, first, second, ..."""
    return torch.stack((first, second), dim=2).flatten(1, 2)


def diff_lora_heads(x: Tensor, weights: dict[str, Tensor], spec: LayerSpec, name: str, heads: int) -> Tensor:
    """(B, 2·heads, L, D): both streams of a DiffLoRA's queries (name "q") or keys ("k")."""
    which = {"q": "query_up", "k": "key_up"}[name]
    rank, alpha = spec.options.get("rank", 64), spec.options.get("alpha", 128.0)
    parts = diff_lora_parts(
        x,
        weights[f"{name}_proj"],
        heads * spec.head_dim,
        rank,
        alpha,
        weights[which],
        weights.get(f"first_{which}"),
    )
    return side_by_side(*(cut(part, spec.head_dim) for part in parts))


def merge(heads: Tensor) -> Tensor:
    return torch.cat(heads.unbind(dim=1), dim=-1)


def initial_lambda(spec: LayerSpec) -> float:
    choice = spec.options.get("lambda_init", "depth")
    return lambda_init(spec.layer) if choice == "depth" else float(choice)


def lambda_of(spec: LayerSpec, weights: dict[str, Tensor], x: Tensor) -> float | Tensor:
    """What the second stream is weighed with; 0 where there is none."""
    progress = spec.options.get("progress", 1.0)
    if spec.attention in ("differential", "differential_collinear"):
        q1, k1, q2, k2 = (weights[f"lambda_{name}"] for name in ("q1", "k1", "q2", "k2"))
        return risen(lambda_value(q1, k1, q2, k2, initial_lambda(spec)), progress)
    if spec.attention in ("differential_v2", "differential_v2_collinear"):
        raw = torch.einsum("bli,hi->bhl", x, weights["lambda_proj"])
        if "lambda_proj.bias" in weights:
            raw = raw + weights["lambda_proj.bias"][:, None]
        return (1 / (1 + torch.exp(-raw)))[..., None]
    if spec.attention == "diff_lora":
        return diff_lora_lambda(weights, initial_lambda(spec), progress)
    return 0.0


def finished(spec: LayerSpec, weights: dict[str, Tensor], out: Tensor) -> Tensor:
    """What happens to the heads' outputs before the output projection."""
    if spec.attention in ("differential", "differential_collinear") and spec.options.get("head_norm", True):
        return finish(out, weights["head_norm"], initial_lambda(spec), spec.eps)
    if spec.attention == "softmax" and spec.options.get("head_norm", False):
        return rms_norm(out, weights["head_norm"], spec.eps)
    if spec.attention == "dex":
        chosen = spec.options.get("heads") or list(range(spec.heads))
        learned = weights["dex.factor.lambda_learn"]
        lam = dex_lambda(spec.options.get("progress", 1.0), initial_lambda(spec), learned)
        return dex_output(out, weights["dex"], lam, chosen)
    return out


def distance_bias(spec: LayerSpec, positions: Tensor, context_positions: Tensor) -> Tensor:
    """(B, H, L, S): −slope_h · |m − n|, ALiBi's, for the heads of the output."""
    paired = spec.attention in ("differential", "differential_collinear")
    paired = paired and spec.options.get("values", "paired") == "paired"
    heads = spec.heads // 2 if paired else spec.heads
    away = (positions[:, :, None] - context_positions[:, None, :]).abs().double()
    return torch.stack([-slope(head, heads) * away for head in range(heads)], dim=1)


def layer(
    spec: LayerSpec,
    weights: dict[str, Tensor],
    x: Tensor,
    context: Tensor | None = None,
    *,
    causal: bool = False,
    window: int | None = None,
    key_padding: Tensor | None = None,
    documents: Tensor | None = None,
    allowed: Tensor | None = None,
    positions: Tensor | None = None,
    context_positions: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Output (B, L, d_model) and effective map (B, H, L, S) of x (B, L, d_model), context (B, S, d_model).

    Positions count from 0 in x and in the context unless given. `allowed` is bool, (L, S) to (B, H, L, S).
    """
    source = x if context is None else context
    B, L, S, d = x.shape[0], x.shape[1], source.shape[1], spec.head_dim
    if positions is None:
        positions = torch.arange(L)
    if context_positions is None:
        context_positions = positions if context is None else torch.arange(S)
    positions, context_positions = positions.expand(B, L), context_positions.expand(B, S)
    see = visible(B, L, S, causal=causal, window=window, key_padding=key_padding, documents=documents)[
        :, None
    ]
    if allowed is not None:
        see = see & (allowed if allowed.dim() != 3 else allowed[:, None])

    if spec.attention == "diff_lora":
        q = diff_lora_heads(x, weights, spec, "q", spec.heads)
        k = diff_lora_heads(source, weights, spec, "k", spec.kv_heads)
    else:
        q = heads_of(x, weights["q_proj"], d)
        k = heads_of(source, weights["k_proj"], d)
    v1 = spec.attention in ("differential", "differential_collinear")
    paired = v1 and spec.options.get("values", "paired") == "paired"
    v = heads_of(source, weights["v_proj"], 2 * d if paired else d)
    if spec.position == "rope" and "collinear" not in spec.attention:
        q, k = rotate(q, positions, spec.base), rotate(k, context_positions, spec.base)
    bias = distance_bias(spec, positions, context_positions) if spec.position == "alibi" else None
    if spec.position != "rope":
        assert spec.position in ("alibi", "nope")
        positions, context_positions = torch.zeros(B, L), torch.zeros(B, S)

    t = collinear_t(k, spec.options.get("activation", "relu"))
    mode = spec.options.get("mode", "exact")
    lam = lambda_of(spec, weights, x)

    if spec.attention in ("softmax", "dex"):
        weights_map = attention_map(q, k, allowed=see.expand(B, spec.heads, L, S), bias=bias)
    elif spec.attention == "collinear":
        weights_map = collinear_map(
            q, t, mode, positions, context_positions, allowed=see.expand(B, spec.heads, L, S), base=spec.base
        )
    elif "collinear" in spec.attention:
        weights_map = differential_collinear_map(
            q, t, v.shape[1], lam, mode, positions, context_positions, allowed=see, base=spec.base
        )
    else:
        assert spec.attention in ("differential", "differential_v2", "diff_lora")
        weights_map = differential_map(q, k, v.shape[1], lam, allowed=see, bias=bias)

    out = finished(spec, weights, apply_map(weights_map, v))
    return torch.einsum("bli,oi->blo", merge(out), weights["o_proj"]), weights_map

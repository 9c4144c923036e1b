"""What attention, layers and decoders should give: float64, whole tensors at a time, nothing of the implementation.

`tests.oracles` follows the papers line by line and takes milliseconds a row; this says the same in few operations, so
that thousands of problems can be solved a minute. test_fuzz.py holds the two together.

Rotary logits are written in relative form: Σ_j ζ_j^(m − n) Re(q_j conj(k_j) e^{i (m − n) θ_j}), which no implementation
that turns queries and keys by themselves shares.

Letters: B batch, H output heads, G key-value heads, L queries, S keys, D key width, J = D/2 pairs, N streams.
"""

import math
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from tests.oracles import alibi, differential, scalings
from tests.oracles.models import swiglu
from tests.oracles.softmax import rms_norm


def visible(
    queries: int,
    keys: int,
    *,
    causal: bool = False,
    window: int | None = None,
    padding: Tensor | None = None,
    documents: Tensor | None = None,
    dense: Tensor | None = None,
    first: int | None = None,
) -> Tensor:
    """(B or 1, H or 1, L, S) bool; the first query stands at `first`, by default S − L."""
    first = keys - queries if first is None else first
    away = torch.arange(keys)[None, :] - (torch.arange(queries) + first)[:, None]
    see = torch.ones(1, 1, queries, keys, dtype=torch.bool)
    if causal:
        see = see & (away <= 0)
    if window is not None:
        see = see & (away.abs() < min(window, 2**62))
    if padding is not None:
        see = see & padding[:, None, None, :]
    if documents is not None:
        own = documents[:, first : first + queries]
        see = see & (own[:, None, :, None] == documents[:, None, None, :])
    if dense is not None:
        dense = dense[None, None] if dense.ndim == 2 else dense
        see = see & (dense if dense.dtype == torch.bool else dense > -math.inf)
    return see


def finite(bias: Tensor) -> Tensor:
    """(B or 1, H or 1, L, S): what is added where a key is visible."""
    four = (bias[None, None] if bias.ndim == 2 else bias).double()
    return four.masked_fill(four == -math.inf, 0.0)


def weights_digest(logits: Tensor, see: Tensor) -> Tensor:
    """Softmax over the visible keys; a row that sees none is zero. Differentiable as often as anyone likes."""
    top = logits.detach().masked_fill(~see, -math.inf).amax(-1, keepdim=True)
    top = torch.where(top == -math.inf, 0.0, top)
    weight = torch.where(see, torch.exp(torch.where(see, logits - top, 0.0)), 0.0)
    total = weight.sum(-1, keepdim=True)
    return weight / torch.where(total == 0, 1.0, total)


def streams_of(q: Tensor, k: Tensor, groups: int, streams: int) -> tuple[list[Tensor], list[Tensor]]:
    """Queries (B, H, L, D) and keys (B, H, S, D) of each stream; adjacent heads are the streams of one output head."""
    queries = [q[:, s::streams] for s in range(streams)]
    repeats = queries[0].shape[1] // groups
    own = k.shape[1] == streams * groups
    keys = [k[:, s::streams] if own else k for s in range(streams)]
    return queries, [key.repeat_interleave(repeats, 1) for key in keys]


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lam: Tensor | float | None,
    see: Tensor,
    bias: Tensor | None = None,
    scale: float | Tensor | None = None,
) -> Tensor:
    """softmax(scale · q kᵀ + bias) v, or with λ the difference of two of them; heads as for the public operations."""
    streams = 1 if lam is None else 2
    queries, keys = streams_of(q, k, v.shape[1], streams)
    scale = q.shape[3] ** -0.5 if scale is None else scale
    maps = []
    for query, key in zip(queries, keys, strict=True):
        logits = scale * (query @ key.mT)
        maps.append(weights_digest(logits if bias is None else logits + bias, see))
    mixed = maps[0] if lam is None else maps[0] - lam * maps[1]
    return mixed @ v.repeat_interleave(queries[0].shape[1] // v.shape[1], 1)


@dataclass(frozen=True)
class Attended:
    """What a layer gives: output (B, L, d_model), effective map (B, H, L, S), and the logits of each stream."""

    output: Tensor
    map: Tensor
    logits: list[Tensor]


@dataclass(frozen=True)
class Turn:
    """How far the pairs of each token turn a step, (B or 1, N, J), and what multiplies cos and sin, (B or 1, N, 1)."""

    theta: Tensor
    factor: Tensor


@dataclass(frozen=True)
class Place:
    """Where queries and keys stand: positions (B or 1, L) and (B or 1, S), how they turn, and what they see."""

    queries: Tensor
    keys: Tensor
    query_turn: Turn
    key_turn: Turn
    see: Tensor
    bias: Tensor | None = None
    distance: Tensor | None = None


@dataclass(frozen=True)
class Spec:
    """One attention layer as its Transformer twin counts it; ζ of xPos is (2j/D + gamma)/(1 + gamma)."""

    attention: str
    heads: int
    kv_heads: int
    width: int
    layer: int = 0
    position: str = "rope"
    layout: str = "half"
    eps: float = 1e-5
    gamma: float = 0.4
    scale_base: float = 512.0
    options: dict[str, Any] = field(default_factory=dict)


def turn_of(
    width: int, parameters: dict[str, Any], trained: int, lengths: Tensor, dtype: torch.dtype = torch.float64
) -> Turn:
    """The turning of tokens whose requests are `lengths` (B or 1, N) tokens long."""
    kept = {
        key: value
        for key, value in parameters.items()
        if key not in ("layout", "xpos_gamma", "xpos_scale_base")
    }
    trained = int(kept.pop("original_max_position_embeddings", trained))
    made = {n: scalings.turning(width, kept, trained, n) for n in set(lengths.flatten().tolist())}
    rows = [[made[n] for n in row] for row in lengths.tolist()]
    theta = torch.tensor([[one.theta for one in row] for row in rows], dtype=dtype)
    return Turn(theta, torch.tensor([[[one.factor] for one in row] for row in rows], dtype=dtype))


def pairs(x: Tensor, layout: str) -> tuple[Tensor, Tensor]:
    """First and second components of the rotary pairs."""
    if layout == "interleaved":
        return x[..., 0::2], x[..., 1::2]
    half = x.shape[-1] // 2
    return x[..., :half], x[..., half:]


def unscaled(spec: Spec, q: Tensor, k: Tensor, place: Place) -> Tensor:
    """(B, H, L, S) logits before 1/√D of q (B, H, L, D) and k (B, H, S, D) as projected."""
    collinear = "collinear" in spec.attention
    if spec.position in ("nope", "alibi"):
        return q @ k.mT
    away = (place.queries[:, :, None] - place.keys[:, None, :]).double()[..., None]
    factor = (place.query_turn.factor[:, :, None] * place.key_turn.factor[:, None, :])[:, None, ..., 0]
    strength = torch.ones_like(away)
    if spec.position == "xpos":
        j = torch.arange(spec.width // 2, dtype=torch.float64)
        zeta = (2 * j / spec.width + spec.gamma) / (1 + spec.gamma)
        strength = torch.exp(away / spec.scale_base * zeta.log())
    angle = away * place.query_turn.theta[:, :, None]
    (q1, q2), (k1, k2) = pairs(q, spec.layout), pairs(k, spec.layout)
    if not collinear:
        turned = torch.complex(q1, q2)[:, :, :, None] * torch.complex(k1, -k2)[:, :, None]
        logits = (turned * (strength * torch.polar(torch.ones_like(angle), angle))[:, None]).real.sum(-1)
        return logits * factor
    mean = (k1 + k2) / 2
    t = mean.relu() if spec.options.get("activation", "relu") == "relu" else torch.log1p(mean.exp())
    mode = spec.options.get("mode", "exact")
    if mode == "slack":
        turned_query = (place.queries[..., None].double() * place.query_turn.theta)[:, None, :, None]
        turned_key = (place.keys[..., None].double() * place.key_turn.theta)[:, None, None]
        a, b = q1[:, :, :, None], q2[:, :, :, None]
        real = a * turned_query.cos() - b * turned_query.sin()
        imaginary = a * turned_query.sin() + b * turned_query.cos()
        cos, sin = turned_key.cos(), turned_key.sin()
        term = a * real * (cos - sin) + b * imaginary * (cos + sin)
        return (term * t[:, :, None] * strength[:, None]).sum(-1) * factor
    if mode == "strict":
        q1 = q2 = (q1 + q2) / 2
    squared = q1 * q1 + q2 * q2
    turned = (strength * angle.cos()).expand(squared.shape[0], -1, -1, -1)
    return torch.einsum("bhlj,bhsj,blsj->bhls", squared, t, turned) * factor


def layer(spec: Spec, weights: dict[str, Tensor], x: Tensor, source: Tensor, place: Place) -> Attended:
    """x (B, L, d_model) over source (B, S, d_source); weights by name as in `tests.oracles.layers`."""
    v1, v2 = spec.attention in ("differential", "differential_collinear"), "_v2" in spec.attention
    streams = 2 if v1 or v2 else 1
    q, k = (_heads(y, weights, name, spec.width) for y, name in ((x, "q_proj"), (source, "k_proj")))
    v = _heads(source, weights, "v_proj", 2 * spec.width if v1 else spec.width)
    queries, keys = streams_of(q, k, v.shape[1], streams)
    heads = queries[0].shape[1]
    bias = place.bias
    if spec.position == "alibi":
        assert place.distance is not None
        slopes = torch.tensor([alibi.slope(h, heads) for h in range(heads)], dtype=torch.float64)
        sloped = -slopes[:, None, None] * place.distance[:, None]
        bias = sloped if bias is None else bias + sloped
    every = [unscaled(spec, q, k, place) * spec.width**-0.5 for q, k in zip(queries, keys, strict=True)]
    maps = [weights_digest(logits if bias is None else logits + bias, place.see) for logits in every]
    initial = _initial(spec)
    if v1:
        vectors = [weights[f"lambda_{name}"] for name in ("q1", "k1", "q2", "k2")]
        mixed = maps[0] - differential.lambda_value(*vectors, initial) * maps[1]
    elif v2:
        lam = torch.sigmoid(x @ weights["lambda_proj"].mT).mT[..., None]
        mixed = maps[0] - lam * maps[1]
    else:
        mixed = maps[0]
    out = mixed @ v.repeat_interleave(heads // v.shape[1], 1)
    if v1 and spec.options.get("head_norm", True):
        out = differential.finish(out, weights["head_norm"], initial, spec.eps)
    elif spec.attention == "softmax" and spec.options.get("head_norm", False):
        out = rms_norm(out, weights["head_norm"], spec.eps)
    merged = out.transpose(1, 2).flatten(2)
    y = merged @ weights["o_proj"].mT
    return Attended(y + weights["o_proj.bias"] if "o_proj.bias" in weights else y, mixed, every)


def _heads(x: Tensor, weights: dict[str, Tensor], name: str, width: int) -> Tensor:
    y = x @ weights[name].mT
    if f"{name}.bias" in weights:
        y = y + weights[f"{name}.bias"]
    return y.unflatten(-1, (-1, width)).transpose(1, 2)


def _initial(spec: Spec) -> float:
    choice = spec.options.get("lambda_init", "depth")
    return differential.lambda_init(spec.layer) if choice == "depth" else float(choice)


@dataclass(frozen=True)
class Decoder:
    """The weights of a model by name, in float64, and what each of its layers is."""

    specs: list[Spec]
    weights: dict[str, Tensor]

    def __call__(self, embedded: Tensor, place: Place) -> tuple[Tensor, list[Tensor]]:
        """Logits (B, L, V) and effective maps of embedded tokens (B, L, d_model) that are all there is."""
        x, maps = embedded, []
        for index, spec in enumerate(self.specs):
            w = _below(self.weights, f"model.layers.{index}.")
            normed = rms_norm(x, w["input_layernorm"], spec.eps)
            attended = layer(spec, _below(w, "self_attn."), normed, normed, place)
            x = x + attended.output
            inner = rms_norm(x, w["post_attention_layernorm"], spec.eps)
            x = x + swiglu(inner, w["mlp.gate_proj"], w["mlp.up_proj"], w["mlp.down_proj"])
            maps.append(attended.map)
        normed = rms_norm(x, self.weights["model.norm"], self.specs[0].eps)
        return normed @ self.weights["lm_head"].mT, maps

    def embed(self, ids: Tensor) -> Tensor:
        """(B, L) to (B, L, d_model)."""
        return self.weights["model.embed_tokens"][ids]


def _below(weights: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {key.removeprefix(prefix): value for key, value in weights.items() if key.startswith(prefix)}


def named(parameters: dict[str, Tensor]) -> dict[str, Tensor]:
    """Parameters under the names used here, in float64."""
    return {
        key.replace("variant.", "").removesuffix(".weight"): value.detach().double()
        for key, value in parameters.items()
    }

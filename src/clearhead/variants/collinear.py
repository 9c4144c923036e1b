"""Collinear constrained attention (CoCA)."""

from typing import Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

from clearhead.core.heads import HeadShape, Widths, twin_widths
from clearhead.positions.base import Rotation
from clearhead.variants.base import Variant

Mode = Literal["exact", "slack", "strict"]
Activation = Literal["relu", "softplus"]
_ACTIVATIONS = {"relu": torch.relu, "softplus": F.softplus}


class Collinear(Variant):
    """Collinear Constrained Attention (Zhu et al., arXiv 2309.08646): a key that starts at angle zero to every query.

    With pairs j of a head of width d, q_j the query's pair, t_j ≥ 0 one number a pair of the key, θ_j RoPE's
    frequency and Δ = m − n:

        exact    Σ_j t_j |q_j|² cos(Δ θ_j) / √d                     equations 7-9 and 17, the theory; relative
        strict   exact with q tied inside each pair                  equations 10 and 11, the paper's "CoCA-Strict";
        relative slack    Σ_j t_j q_j · R_m q_j ∘ R_n(1, 1) / √d              equation 10 without 11: the released
        code and the paper's headline
                                                                     numbers; depends on m + n too, so absolute
                                                                     positions leak

    All three are plain dot products and run on any engine: exact is q' = R_m(|q_j|², 0), k' = R_n(t_j, 0); slack is
    q' = q ∘ R_m q, k' = R_n(t_j, t_j). t = activation of the mean of the key projection's two halves (the tie is
    over the pairs that RoPE turns), so parameters equal the twin's though half of them are redundant; "strict"
    averages the query's halves the same way. |q|², t and their rotation are computed in float32: the logits are
    cubic in the layer's input.

    Needs a rotary position method. Differs from the released code: that is "slack" only, in the model's dtype;
    activation="softplus" is this library's option (PoPE, arXiv 2509.10534, found that ReLU loses the gain).
    """

    needs_rotation = True

    def __init__(self, shape: HeadShape, *, mode: Mode = "exact", activation: Activation = "relu") -> None:
        super().__init__(shape)
        if mode not in get_args(Mode):
            raise ValueError(f"mode must be one of {', '.join(get_args(Mode))}, not {mode!r}")
        if activation not in _ACTIVATIONS:
            raise ValueError(f"activation must be one of {', '.join(_ACTIVATIONS)}, not {activation!r}")
        if shape.head_dim % 2:
            raise ValueError(
                f"collinear attention ties pairs, so head_dim must be even, not {shape.head_dim}"
            )
        self.mode = mode
        self.activation = activation

    @classmethod
    def widths(cls, shape: HeadShape) -> Widths:
        return twin_widths(shape)

    def place_query(self, q: Tensor, rotation: Rotation) -> Tensor:
        wide = _wide(q)
        if self.mode == "slack":
            return (wide * rotation.query(wide)).to(q.dtype)
        first, second = wide.chunk(2, dim=-1)
        if self.mode == "strict":
            first = second = (first + second) / 2
        squared = first.square() + second.square()
        return rotation.query(torch.cat((squared, torch.zeros_like(squared)), dim=-1)).to(q.dtype)

    def place_key(self, k: Tensor, rotation: Rotation) -> Tensor:
        first, second = _wide(k).chunk(2, dim=-1)
        t = _ACTIVATIONS[self.activation]((first + second) / 2)
        tied = torch.cat((t, t if self.mode == "slack" else torch.zeros_like(t)), dim=-1)
        return rotation.key(tied).to(k.dtype)


def _wide(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()

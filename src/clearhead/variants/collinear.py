"""Collinear constrained attention (CoCA)."""

from collections.abc import Mapping
from typing import ClassVar

from torch import Tensor

from clearhead.core.streams import HeadShape, Widths, twin_widths
from clearhead.positions.base import Rotation
from clearhead.variants.base import Variant
from clearhead.variants.placement import Activation, CollinearPlacement, Mode


class Collinear(Variant):
    """Collinear Constrained Attention (Zhu et al., arXiv 2309.08646): a key that starts at angle zero to every query.

    With pairs j of a head of width d, q_j the query's pair, t_j ≥ 0 one number a pair of the key, θ_j RoPE's
    frequency and Δ = m − n:

        exact    Σ_j t_j |q_j|² cos(Δ θ_j) / √d
                 equations 7-9 and 17, the theory; relative
        strict   exact with q tied inside each pair
                 equations 10 and 11, the paper's "CoCA-Strict"; relative
        slack    Σ_j t_j q_j · R_m q_j ∘ R_n(1, 1) / √d
                 equation 10 without 11, the released code and the paper's headline numbers; depends on m + n too,
                 so absolute positions leak

    All three are plain dot products (`CollinearPlacement`) and run on any engine. t = activation of the mean of each
    pair of the key projection (the pairs that the position method turns), so parameters equal the twin's though half
    of them are redundant; "strict" averages the query's pairs the same way.

    Needs a rotary position method. Differs from the released code: that is "slack" only, in the model's dtype;
    activation="softplus" is this library's option (PoPE, arXiv 2509.10534, found that ReLU loses the gain).
    """

    needs_rotation = True
    without_angles = "softmax"
    # t is made of a key head's own projection.
    tensor_parallel: ClassVar[Mapping[str, str] | None] = {}
    placement: CollinearPlacement

    def __init__(self, shape: HeadShape, *, mode: Mode = "exact", activation: Activation = "relu") -> None:
        super().__init__(shape)
        self.placement = CollinearPlacement(shape.head_dim, mode, activation)

    @classmethod
    def widths(cls, shape: HeadShape) -> Widths:
        return twin_widths(shape)

    def place_query(self, q: Tensor, rotation: Rotation) -> Tensor:
        return self.placement.query(q, rotation)

    def place_key(self, k: Tensor, rotation: Rotation) -> Tensor:
        return self.placement.key(k, rotation)

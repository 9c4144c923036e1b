"""Differential attention, V1 and V2, with both streams collinear."""

from typing import Literal

from torch import Tensor

from clearhead.core.streams import HeadShape
from clearhead.positions.base import Rotation
from clearhead.variants.differential import Differential
from clearhead.variants.differential_v2 import DifferentialV2
from clearhead.variants.placement import Activation, CollinearPlacement, Mode


class DifferentialCollinear(Differential):
    """Differential attention V1 whose two streams are both collinear: noise cancelled, and no initial angle.

    With streams s = 1, 2 of a head, pairs j of width d, t_s ≥ 0 made of the stream's own key projection, Δ = m − n:

        a_s(m, n) = Σ_j t_s,nj |q_s,mj|² cos(Δ θ_j) / √d              mode "exact"; others: `CollinearPlacement`
        head_i    = (softmax(a_1) − λ softmax(a_2)) v_i,              v_i of width 2d
        output    = (1 − λ_init) · RMSNorm(head_i)

    λ, its initialisation, the head norm, head counts (both of the twin's even), widths and parameters are
    `Differential`'s; mode and activation are `Collinear`'s. Needs a rotary position method.

    Source: this library's combination of arXiv 2410.05258 (equations 1-3) and arXiv 2309.08646 (equations 7-11);
    neither paper has it and there is no released code.
    """

    needs_rotation = True
    without_angles = "differential"
    placement: CollinearPlacement

    def __init__(
        self,
        shape: HeadShape,
        *,
        mode: Mode = "exact",
        activation: Activation = "relu",
        lambda_init: Literal["depth"] | float = "depth",
        head_norm: bool = True,
        norm_eps: float = 1e-5,
        lambda_std: float = 0.1,
    ) -> None:
        super().__init__(
            shape, lambda_init=lambda_init, head_norm=head_norm, norm_eps=norm_eps, lambda_std=lambda_std
        )
        self.placement = CollinearPlacement(shape.head_dim, mode, activation)

    def place_query(self, q: Tensor, rotation: Rotation) -> Tensor:
        return self.placement.query(q, rotation)

    def place_key(self, k: Tensor, rotation: Rotation) -> Tensor:
        return self.placement.key(k, rotation)


class DifferentialV2Collinear(DifferentialV2):
    """Differential attention V2 whose two query streams are collinear to the one key that they share.

    With the query pairs q_s,j of streams s = 1, 2, one t_j ≥ 0 a key and Δ = m − n:

        a_s(m, n) = Σ_j t_nj |q_s,mj|² cos(Δ θ_j) / √d                mode "exact"; others: `CollinearPlacement`
        head_i    = softmax(a_1) v − sigmoid(λ_i(x)) · softmax(a_2) v

    λ(x), head counts, widths and parameters are `DifferentialV2`'s; mode and activation are `Collinear`'s. Needs a
    rotary position method.

    Source: this library's combination of Differential Transformer V2 (Microsoft, January 2026) and arXiv 2309.08646
    (equations 7-11); neither has it and there is no released code.
    """

    needs_rotation = True
    without_angles = "differential_v2"
    placement: CollinearPlacement

    def __init__(self, shape: HeadShape, *, mode: Mode = "exact", activation: Activation = "relu") -> None:
        super().__init__(shape)
        self.placement = CollinearPlacement(shape.head_dim, mode, activation)

    def place_query(self, q: Tensor, rotation: Rotation) -> Tensor:
        return self.placement.query(q, rotation)

    def place_key(self, k: Tensor, rotation: Rotation) -> Tensor:
        return self.placement.key(k, rotation)

"""What a variant is.

Legend: B batch, N tokens, H query heads of one stream, G key-value heads, L queries, S keys, D key width, E value
    width.
"""

from abc import ABC, abstractmethod
from dataclasses import replace
from typing import ClassVar

from torch import Tensor, nn

from clearhead.core.attend import Mix, single
from clearhead.core.heads import Heads, HeadShape, Widths, split_heads
from clearhead.positions.base import Rotation
from clearhead.variants.placement import CollinearPlacement


class Variant(nn.Module, ABC):
    """Turns projections into softmax streams, and the streams' outputs into one.

    It owns its extra parameters only; the layer around it owns q_proj, k_proj, v_proj and o_proj, whose widths
    `widths` names. Weights that are kept elsewhere until they are needed (Accelerate's offloading, FSDP, ZeRO) are
    brought in when a module is called: `gate` is reached by calling the variant, so it may use the variant's own
    parameters; other methods may use those of submodules that they call.
    """

    needs_rotation: ClassVar[bool] = False
    # How the streams are placed where they are collinear, which is what a compact cache rests on.
    placement: CollinearPlacement | None = None

    def __init__(self, shape: HeadShape) -> None:
        super().__init__()
        self.shape = shape
        self.sizes = self.widths(shape)

    @classmethod
    @abstractmethod
    def widths(cls, shape: HeadShape) -> Widths:
        """Projection widths and streams for a twin of this shape; ValueError where the variant has none."""

    def split_queries(self, q: Tensor) -> tuple[Tensor, ...]:
        """(B, L, widths.q) -> one (B, H, L, D) a stream; by default a single one."""
        return (split_heads(q, self.sizes.heads),)

    def split_keys(self, k: Tensor) -> tuple[Tensor, ...]:
        """(B, S, widths.k) -> one (B, G, S, D) a stream, or one that all share; by default a single one."""
        return (split_heads(k, self.sizes.kv_heads),)

    def split(self, q: Tensor, k: Tensor, v: Tensor, x: Tensor) -> Heads:
        """Projections, and the layer's input x (B, L, embed_dim), to streams."""
        return Heads(self.split_queries(q), self.split_keys(k), split_heads(v, self.sizes.kv_heads), self(x))

    def forward(self, x: Tensor | None) -> Tensor | None:
        """`gate`, with the variant's own parameters brought in."""
        return self.gate(x)

    def gate(self, x: Tensor | None) -> Tensor | None:
        """What `mix` weighs the second stream with, broadcastable to (B, H, L, 1).

        x is the layer's input, or None where only a gate that does not depend on it is asked for.
        """
        return None

    def place(self, heads: Heads, rotation: Rotation) -> Heads:
        """Give the streams their positions. The variant decides what is rotated; by default every query and key."""
        return replace(
            heads,
            q=tuple(self.place_query(q, rotation) for q in heads.q),
            k=tuple(self.place_key(k, rotation) for k in heads.k),
        )

    def place_query(self, q: Tensor, rotation: Rotation) -> Tensor:
        """One query stream at its positions."""
        return rotation.query(q)

    def place_key(self, k: Tensor, rotation: Rotation) -> Tensor:
        """One key stream at its positions."""
        return rotation.key(k)

    @property
    def mix(self) -> Mix:
        """How the streams' outputs, (B, H, L, E) each, become one: linear, so that it mixes maps (B, H, L, S) too."""
        return single

    def finish(self, o: Tensor) -> Tensor:
        """What happens to (B, H, L, E) before the output projection."""
        return o

    def reset_parameters(self) -> None:
        """Initialise the variant's own parameters as its paper says."""

    def mean_lambda(self) -> float | None:
        """The mean of the gate where it does not depend on the input, for logs; None where there is none or it does."""
        return None

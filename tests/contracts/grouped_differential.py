"""Grouped differential attention, as somebody who adds a variant would write it: signal heads share a noise head."""

import torch
from torch import Tensor, nn

from clearhead.core.streams import HeadShape, Widths, split_heads
from clearhead.variants.base import Variant


class GroupedDifferential(Variant):
    """softmax(q1 k1ᵀ/√d) v − λ softmax(q2 k2ᵀ/√d) v; `ratio` signal heads share a noise head, λ is one number a head.

    own_keys: the noise has keys of its own. wide: values are twice as wide as keys.
    """

    mixing = "difference"
    float32_parameters = ("lam",)

    def __init__(
        self, shape: HeadShape, *, ratio: int = 2, own_keys: bool = False, wide: bool = False
    ) -> None:
        super().__init__(shape, self.widths(shape, ratio, own_keys, wide))
        self.lam = nn.Parameter(torch.empty(shape.num_heads))
        self.reset_parameters()

    @classmethod
    def widths(cls, shape: HeadShape, ratio: int = 2, own_keys: bool = False, wide: bool = False) -> Widths:
        heads, groups, width = shape.num_heads, shape.num_kv_heads, shape.head_dim
        counts, value_width = (heads, heads // ratio), width * (1 + wide)
        return Widths(
            q=sum(counts) * width,
            k=(1 + own_keys) * groups * width,
            v=groups * value_width,
            o=heads * value_width,
            heads=heads,
            kv_heads=groups,
            query_streams=2,
            key_streams=1 + own_keys,
            key_width=width,
            value_width=value_width,
            stream_heads=counts,
        )

    def split_queries(self, q: Tensor) -> tuple[Tensor, ...]:
        counts = self.sizes.query_heads
        parts = q.split([count * self.sizes.key_width for count in counts], dim=-1)
        return tuple(split_heads(part, count) for part, count in zip(parts, counts, strict=True))

    def split_keys(self, k: Tensor) -> tuple[Tensor, ...]:
        return tuple(
            split_heads(part, self.sizes.kv_heads) for part in k.chunk(self.sizes.key_streams, dim=-1)
        )

    def gate(self, x: Tensor | None) -> Tensor:
        return self.lam[None, :, None, None]

    def reset_parameters(self) -> None:
        nn.init.constant_(self.lam, 0.3)

    def diagnostics(self, x: Tensor | None = None) -> dict[str, float]:
        return {"lambda": float(self.lam.detach().mean()), "lambda_spread": float(self.lam.detach().std())}


class GroupByGroup(GroupedDifferential):
    """The same, projections laid out key-value head by key-value head, so that tensor parallelism can share them."""

    # λ is one number a head, so it is shared out with the heads.
    tensor_parallel = {"": "local_params", "lam": "colwise"}  # noqa: RUF012

    def split_queries(self, q: Tensor) -> tuple[Tensor, ...]:
        width, groups = self.sizes.key_width, self.sizes.kv_heads
        counts = [count // groups for count in self.sizes.query_heads]
        parts = q.unflatten(-1, (groups, sum(counts), width)).split(counts, dim=-2)
        return tuple(part.flatten(2, 3).transpose(1, 2) for part in parts)

    def split_keys(self, k: Tensor) -> tuple[Tensor, ...]:
        return split_heads(k, self.sizes.kv_heads).chunk(self.sizes.key_streams, dim=-1)

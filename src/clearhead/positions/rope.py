"""Rotary position embedding.

Legend: B batch, L queries, S keys, D key width, T tables of a scaling.
"""

from collections.abc import Mapping
from typing import Any, Self, get_args

import torch
from torch import Tensor

from clearhead.positions.base import Layout, PlaneRotation, Position
from clearhead.positions.length import longest_request
from clearhead.positions.scaling.base import COMMON_KEYS, RopeScaling, check_keys, number
from clearhead.positions.scaling.default import DefaultScaling
from clearhead.registry import did_you_mean, names, resolve


class Rope(Position):
    """RoPE (Su et al. 2021): pair j of a head of width D turns by position · θ_j, D even.

    scaling:  where θ_j and a factor on cos and sin come from; by default θ_j = 10000^(−2j/D).
    layout:   "half" pairs components (j, j + D/2), as LLaMA and most of Hugging Face; "interleaved" pairs
        (2j, 2j + 1), as the paper, the released Differential Transformer and GPT-J. The two are the same up to a
        permutation of the query and key projections' rows.

    Angles are computed in float32 whatever the model's dtype (float64 in float64), and so is `inv_freq`, which a cast
    to bfloat16 leaves in float32. Nothing is remembered from one call to the next: a scaling that depends on the length
    uses the length given, by default the longest position + 1.
    """

    inv_freq: Tensor

    def __init__(self, head_dim: int, scaling: RopeScaling | None = None, layout: Layout = "half") -> None:
        super().__init__()
        _check_width(head_dim)
        if layout not in get_args(Layout):
            raise ValueError(f"layout must be one of {', '.join(get_args(Layout))}, not {layout!r}")
        if scaling is not None and scaling.head_dim != head_dim:
            raise ValueError(f"the scaling was made for head_dim {scaling.head_dim}, not {head_dim}")
        self.head_dim = head_dim
        self.scaling = DefaultScaling(head_dim=head_dim, theta=10000.0) if scaling is None else scaling
        self.layout: Layout = layout
        # (T, D/2)
        self.register_buffer(
            "inv_freq", self.scaling.tables(_wide(torch.get_default_dtype())), persistent=False
        )

    @classmethod
    def from_parameters(cls, head_dim: int, parameters: Mapping[str, Any], max_positions: int | None) -> Self:
        scaling, layout = read_rope_parameters(head_dim, parameters, max_positions)
        return cls(head_dim, scaling, layout)

    def rotation(
        self, positions: Tensor, key_positions: Tensor | None = None, length: Tensor | None = None
    ) -> PlaneRotation:
        if not self.depends_on_length:
            length = None
        elif length is None:
            length = longest_request(positions)
            if key_positions is not None:
                length = torch.maximum(length, longest_request(key_positions))
        cos, sin = self._angles(positions, length)
        if key_positions is None:
            return PlaneRotation(cos, sin, cos, sin, self.layout)
        return PlaneRotation(cos, sin, *self._angles(key_positions, length), self.layout)

    @property
    def depends_on_length(self) -> bool:
        return self.scaling.depends_on_length

    @property
    def trained_length(self) -> int | None:
        return self.scaling.trained_length

    def reset_buffers(self) -> None:
        dtype, device = _wide(self.inv_freq.dtype), self.inv_freq.device
        tables = self.scaling.tables(dtype, device)
        if self.inv_freq.dtype == dtype:
            self.inv_freq.copy_(tables)
        else:
            self.inv_freq = tables

    def _angles(self, positions: Tensor, length: Tensor | None) -> tuple[Tensor, Tensor]:
        tables = self.inv_freq
        each = None if length is None else length[..., None]
        angles = positions[..., None].to(tables.dtype) * self.scaling.at(tables, each)
        factor = self.scaling.attention_factor(each)
        cos, sin = angles.cos(), angles.sin()
        if isinstance(factor, Tensor) or factor != 1.0:
            cos, sin = cos * factor, sin * factor
        return cos[:, None], sin[:, None]


def read_rope_parameters(
    head_dim: int, parameters: Mapping[str, Any], max_positions: int | None
) -> tuple[RopeScaling, Layout]:
    """The scaling and the layout that `rope_parameters` ask for, in Hugging Face's keys and this library's "layout".

    ValueError, naming the key, for what is unknown, missing or out of range.
    """
    _check_width(head_dim)
    kind = parameters.get("rope_type", "default")
    known = names("rope_scalings")
    if kind not in known:
        raise ValueError(f"unknown rope_type {kind!r}: {did_you_mean(str(kind), known)}")
    scaling: type[RopeScaling] = resolve("rope_scalings", kind)
    check_keys(f"rope_type {kind!r}", parameters, (*COMMON_KEYS, *scaling.keys))
    theta = number(kind, parameters, "rope_theta", 10000.0, above=0)
    layout: Layout = parameters.get("layout", "half")
    own = {key: value for key, value in parameters.items() if key in scaling.keys}
    return scaling.from_parameters(head_dim, theta, own, max_positions), layout


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def _check_width(head_dim: int) -> None:
    if head_dim % 2:
        raise ValueError(f"rope turns pairs, so head_dim must be even, not {head_dim}")

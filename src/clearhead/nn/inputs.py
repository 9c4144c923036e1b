"""What one call of an attention layer is given: one value, checked and completed.

Legend: B batch, L queries, S keys.
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from clearhead.core.masks import MaskSpec
from clearhead.nn.projections import KeyValueCache
from clearhead.positions.base import Position
from clearhead.positions.length import (
    check_cached_length,
    check_given_length,
    given_length,
    longest_request,
)


@dataclass(frozen=True, slots=True)
class AttentionInputs:
    """The arguments of `Attention.forward`, where each of them is explained."""

    x: Tensor
    context: Tensor | None = None
    is_causal: bool = False
    key_padding_mask: Tensor | None = None
    documents: Tensor | None = None
    window: int | None = None
    attn_mask: Tensor | None = None
    positions: Tensor | None = None
    context_positions: Tensor | None = None
    cache: KeyValueCache | None = None
    rope_length: int | Tensor | None = None

    @property
    def source(self) -> Tensor:
        """Where keys and values come from."""
        return self.x if self.context is None else self.context

    def check(self, width: int, source_width: int) -> None:
        """ValueError, naming the argument, for tensors and a cache that do not fit a layer of these widths."""
        x, source = self.x, self.source
        for name, value, expected in (("x", x, width), ("context", source, source_width)):
            if not isinstance(value, Tensor):
                raise ValueError(f"{name} must be a tensor, not {type(value).__name__}")
            if not value.is_floating_point():
                raise ValueError(f"{name} must be floating point, not {value.dtype}")
            if value.ndim != 3 or value.shape[2] != expected:
                raise ValueError(
                    f"{name} has shape {tuple(value.shape)}; expected (batch, tokens, {expected})"
                )
            if value.shape[1] == 0:
                raise ValueError(f"{name} has no tokens: its shape is {tuple(value.shape)}")
        if source.device != x.device:
            raise ValueError(f"context is on {source.device}, x on {x.device}; they must agree")
        if self.cache is not None and not (
            hasattr(self.cache, "update") and hasattr(self.cache, "get_seq_length")
        ):
            raise ValueError(
                f"cache must have Hugging Face's update and get_seq_length, which {type(self.cache).__name__} has not"
            )
        if source.shape[0] != x.shape[0]:
            raise ValueError(f"context has batch size {source.shape[0]}, x has {x.shape[0]}")
        if self.documents is not None and self.cache is not None:
            raise ValueError(
                "documents cannot be combined with a cache: cached keys carry no document numbers"
            )

    def placed(self, past: int | Tensor | None) -> "AttentionInputs":
        """The same with positions: those given, checked, or counted from 0 or from the cache's end."""
        positions, context_positions = self.positions, self.context_positions
        if positions is None:
            positions = _counted(self.x, 0 if past is None or self.context is not None else past)
        if self.context is not None and context_positions is None:
            context_positions = _counted(self.source, 0 if past is None else past)
        _check_positions("positions", positions, self.x)
        if context_positions is not None:
            _check_positions("context_positions", context_positions, self.source)
        return replace(self, positions=positions, context_positions=context_positions)

    def length(self, position: Position, past: int | Tensor | None) -> Tensor | None:
        """The length of each request for a position that depends on it, else None; after `placed`."""
        assert self.positions is not None
        if not position.depends_on_length:
            return None
        if self.rope_length is None:
            return self._longest_request(position, past)
        length = given_length(self.rope_length, self.x.shape[0], self.x.device)
        if self.key_padding_mask is None:
            check_given_length(length, longest_request(self.positions))
        return length

    def _longest_request(self, position: Position, past: int | Tensor | None) -> Tensor:
        positions, context_positions, real = self.positions, self.context_positions, self.key_padding_mask
        assert positions is not None
        if past is not None:
            added = positions if context_positions is None else context_positions
            total = None if isinstance(past, Tensor) else past + added.shape[1]
            check_cached_length(position.trained_length, past, total)
            # The padding of a cache has no positions here, and all lengths that pass the check are turned alike.
            real = None
        if context_positions is None:
            return longest_request(positions, self.documents, real)
        if self.documents is not None:
            raise ValueError(
                "rope_length is missing: with a context, documents do not say how long each of them is"
            )
        return torch.maximum(longest_request(positions), longest_request(context_positions, real=real))

    def mask(self, past: int | Tensor | None, slopes: Tensor | None) -> MaskSpec:
        """What each query may see."""
        return MaskSpec(
            is_causal=self.is_causal,
            offset=past if self.context is None else None,
            window=self.window,
            key_padding=self.key_padding_mask,
            documents=self.documents,
            dense=self.attn_mask,
            slopes=slopes,
        )


def _check_positions(name: str, positions: Tensor, x: Tensor) -> None:
    if not isinstance(positions, Tensor):
        raise ValueError(f"{name} must be a tensor of integers, not {type(positions).__name__}")
    if positions.device != x.device:
        raise ValueError(f"{name} is on {positions.device}, x on {x.device}; they must agree")
    expected = (x.shape[0], x.shape[1])
    if positions.ndim != 2 or positions.shape[0] not in (1, expected[0]) or positions.shape[1] != expected[1]:
        raise ValueError(
            f"{name} has shape {tuple(positions.shape)}; expected {expected} or (1, {expected[1]})"
        )
    if positions.dtype == torch.bool or positions.is_floating_point() or positions.is_complex():
        raise ValueError(f"{name} must hold integers, not {positions.dtype}")


def _counted(x: Tensor, start: int | Tensor) -> Tensor:
    return (torch.arange(x.shape[1], device=x.device) + start)[None]

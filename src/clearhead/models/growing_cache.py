"""A cache that grows in place: what a model and `generate` make when none is given.

Hugging Face's `DynamicCache` copies all keys and values for every token. Here a layer's tensors are the first part of
larger ones, which new tokens are written into; what is held is copied only when these are full.

Legend: B batch, G key-value heads, S tokens held.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import DynamicCache, DynamicLayer
from transformers.configuration_utils import PreTrainedConfig

from clearhead.core.modes import active_modes
from clearhead.models.kinds import CacheSizes

# Tokens of room beyond those held when room is made: an eighth of them, and at least so many.
LEAST_ROOM = 64


@dataclass
class _Room:
    """keys, values (B, G, room, ·), of which the first `used` tokens are somebody's."""

    keys: Tensor
    values: Tensor
    used: int

    def continues(self, keys: Tensor, values: Tensor, more: int) -> bool:
        """Whether `keys` and `values` are all that is in it, and `more` tokens go behind them.

        They are not after a crop, another order of the rows, or when a copy of the cache went on in the same room.
        """
        held = keys.shape[2]
        return (
            held == self.used
            and held + more <= self.keys.shape[2]
            and _begins(self.keys, keys)
            and _begins(self.values, values)
            and self.keys.is_inference() == torch.is_inference_mode_enabled()
        )


def _begins(room: Tensor, held: Tensor) -> bool:
    """Whether `held` is the first tokens of `room`, where they lie."""
    alike = room.stride() == held.stride() and room.dtype == held.dtype and room.shape[:2] == held.shape[:2]
    return alike and room.data_ptr() == held.data_ptr()


class GrowingLayer(DynamicLayer):
    """Hugging Face's `DynamicLayer` with room behind its tokens; whoever replaces `keys` and `values` finds them so."""

    def __init__(self) -> None:
        super().__init__()
        self._room: _Room | None = None

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Add keys (B, G, L, ·) and values (B, G, L, ·); return all, old and new: (B, G, S, ·) each."""
        if not self._in_place(key_states, value_states):
            self._room = None
            grown: tuple[Tensor, Tensor] = super().update(key_states, value_states, *args, **kwargs)
            return grown
        assert self.keys is not None and self.values is not None  # it holds tokens already
        held, more = self.keys.shape[2], key_states.shape[2]
        room = self._room
        if room is None or not room.continues(self.keys, self.values, more):
            room = self._room = _with_room(self.keys, self.values, key_states, value_states)
        room.keys[:, :, held : held + more] = key_states
        room.values[:, :, held : held + more] = value_states
        room.used = held + more
        self.keys, self.values = room.keys[:, :, : room.used], room.values[:, :, : room.used]
        return self.keys, self.values

    def _in_place(self, *new: Tensor) -> bool:
        """Whether tokens may be written behind those held: the first of all are not, as no more may ever follow."""
        # Derivatives need keys and values as they were, vmap cannot write several into one, a trace would keep what was
        # decided for its example, and subclasses of tensors have ways of their own.
        if (
            torch.is_grad_enabled()
            or torch.compiler.is_compiling()
            or torch._C._is_tracing()
            or active_modes()
        ):
            return False
        if self.get_seq_length() == 0:
            return False
        return all(type(x) is Tensor for x in (*new, self.keys, self.values))


def _with_room(keys: Tensor, values: Tensor, more_keys: Tensor, more_values: Tensor) -> _Room:
    """What is held, and behind it room for what comes and for an eighth more than that makes."""
    held, all_tokens = keys.shape[2], keys.shape[2] + more_keys.shape[2]
    tokens = all_tokens + max(LEAST_ROOM, all_tokens // 8)

    def widened(old: Tensor, new: Tensor) -> Tensor:
        room = new.new_empty((*old.shape[:2], tokens, old.shape[3]))
        room[:, :, :held] = old
        return room

    return _Room(widened(keys, more_keys), widened(values, more_values), held)


class GrowingCache(DynamicCache):
    """Hugging Face's `DynamicCache` whose layers without a window grow in place.

    It holds the same numbers, and `crop`, beams, padding and copies work as there. Room takes at most an eighth more
    memory, or 64 tokens, of which an operating system that hands out memory when it is used gives little at first.

    config: of the model.
    """

    def __init__(self, config: PreTrainedConfig | CacheSizes) -> None:
        super().__init__(config=config)  # type: ignore[no-untyped-call,arg-type]
        self.layers = grown(self.layers)


def grown(layers: list[Any]) -> list[Any]:
    """The layers of an empty `DynamicCache`, those without a window as `GrowingLayer`."""
    return [GrowingLayer() if type(layer) is DynamicLayer else layer for layer in layers]


def new_cache(config: CacheSizes) -> DynamicCache:
    """The cache of a model that was given none; in a compiled graph Hugging Face's own, which the compiler knows."""
    if torch.compiler.is_compiling():
        return DynamicCache(config=config)  # type: ignore[no-untyped-call,arg-type]
    return GrowingCache(config)

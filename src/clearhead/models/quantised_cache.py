"""A key-value cache whose older part is codes of 8 or 4 bits.

Legend: B batch, G key-value heads, N tokens, K key streams, D key width, E value width.
"""

from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedConfig
from transformers.cache_utils import Cache, CacheLayerMixin, get_layer_types_and_kwargs

from clearhead.core.quantised import BITS, KEY_BLOCK, Held, hold
from clearhead.core.streams import check_whole
from clearhead.core.values import demand
from clearhead.models.config import ClearheadConfig

_PIECE = 4096  # tokens that become codes at a time
_WINDOWS = ("sliding_attention",)
_TYPES = ("full_attention", *_WINDOWS)


class QuantisedLayer(CacheLayerMixin):
    """One layer's keys (B, G, N, K·D) and values (B, G, N, E): codes, then the newest as numbers.

    Codes are made of whole blocks of KEY_BLOCK tokens, as soon as `newest` tokens are left behind them; so between
    `newest` and `newest` + KEY_BLOCK − 1 tokens are numbers. A layer with a window drops blocks that no later query
    sees.
    """

    is_croppable = False  # what has become codes does not become the numbers that it was
    supports_early_init = False

    def __init__(self, bits: int, newest: int, streams: int = 1, window: int | None = None) -> None:
        super().__init__()
        self.bits, self.newest, self.streams, self.window = bits, newest, streams, window
        self.is_sliding = window is not None
        self.record_past = False
        self.reset()

    def reset(self) -> None:
        """Forget everything."""
        self.held: Held | None = None
        self.first = 0  # tokens that were dropped, or come before the first one that is held
        self.is_initialized = False
        self._room: tuple[Tensor, Tensor] | None = None
        self._count = 0

    @property
    def keys(self) -> Tensor | None:
        """The newest keys, those that are numbers."""
        return None if self._room is None else self._room[0][:, :, : self._count]

    @keys.setter
    def keys(self, value: Tensor | None) -> None:
        # transformers' base class sets both to None.
        assert value is None

    @property
    def values(self) -> Tensor | None:
        """The newest values, those that are numbers."""
        return None if self._room is None else self._room[1][:, :, : self._count]

    @values.setter
    def values(self, value: Tensor | None) -> None:
        assert value is None

    @property
    def nbytes(self) -> int:
        """Bytes of what is held: codes with their scales, and numbers."""
        tokens = (self.keys, self.values)
        numbers = sum(x.numel() * x.element_size() for x in tokens if x is not None)
        return numbers + (0 if self.held is None else self.held.nbytes)

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Empty, with the type and place of these."""
        self.dtype, self.device = key_states.dtype, key_states.device
        self._room = (key_states[:, :, :0], value_states[:, :, :0])
        self.is_initialized = True

    def hold(self, keys: Tensor, values: Tensor) -> tuple[Held | None, Tensor, Tensor]:
        """Add these; the codes of the tokens before, and the numbers that follow them, the new ones at their end.

        What is returned stays as it is until the next call. ValueError where a gradient would be lost, or for numbers
        that are not finite when they are to become codes.
        """
        if torch.is_grad_enabled() and (keys.requires_grad or values.requires_grad):
            raise ValueError(
                "a QuantisedCache has no gradients, and these keys or values have one: call the model under "
                "torch.no_grad()"
            )
        if not self.is_initialized:
            self.lazy_initialization(keys, values)
        before, ready = self.held, self._count + keys.shape[2] - self.newest
        if ready < KEY_BLOCK:
            self._append(keys, values)
            found_keys, found_values = self.keys, self.values
            assert found_keys is not None and found_values is not None
            return before, found_keys, found_values
        if self._count:
            assert self.keys is not None and self.values is not None
            keys, values = torch.cat((self.keys, keys), 2), torch.cat((self.values, values), 2)
        whole = ready // KEY_BLOCK * KEY_BLOCK
        self._seal(keys[:, :, :whole], values[:, :, :whole])
        self._room, self._count = None, 0
        self._append(keys[:, :, whole:], values[:, :, whole:])
        if not self.record_past:
            self._drop()
        return before, keys, values

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Hugging Face's protocol, for models that know no codes: all of the layer's tokens as numbers, made anew."""
        held, keys, values = self.hold(key_states, value_states)
        if held is None:
            return keys, values
        streams, older = held.expanded(keys.dtype)
        return torch.cat((torch.cat(streams, -1), keys), 2), torch.cat((older, values), 2)

    def get_seq_length(self) -> int:
        return self.first + self._past + self._count

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self._past + self._count + query_length, self.first

    def get_max_length(self) -> int:
        return -1 if self.window is None else self.window

    def activate_past_recording(self) -> None:
        """Keep what a window hides until `crop`, which may then take any number of tokens away."""
        self.record_past = True

    def crop(self, tokens_to_remove: int) -> None:
        """Take the last −tokens_to_remove tokens away; of a block of codes that is cut the rest becomes numbers
        again."""
        if tokens_to_remove > 0:
            raise ValueError(
                f"crop takes a negative number, the tokens to remove from the end, not {tokens_to_remove}"
            )
        missing = -tokens_to_remove - self._count
        if -tokens_to_remove > self._past + self._count:
            raise ValueError(
                f"crop({tokens_to_remove}) asks for more tokens than the {self._past + self._count} held"
            )
        length = self.get_seq_length() + tokens_to_remove
        if self.window is not None and self.first > max(0, length - self.window + 1):
            raise RuntimeError(
                f"crop({tokens_to_remove}) needs tokens that this layer's window has dropped; call "
                "activate_past_recording before them"
            )
        if missing <= 0:
            self._count += tokens_to_remove
        else:
            assert self.held is not None
            kept = self.held.tokens - missing
            whole = kept // KEY_BLOCK * KEY_BLOCK
            cut = self.held.part(whole, KEY_BLOCK) if kept > whole else None
            self.held = self.held.part(0, whole).mapped(torch.clone) if whole else None
            self._count = 0
            if cut is not None:
                streams, older = cut.expanded(self.dtype)
                self._append(torch.cat(streams, -1)[:, :, : kept - whole], older[:, :, : kept - whole])
        if self.record_past:
            self._drop()

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self._map(lambda x: x.index_select(0, beam_idx.to(x.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        self._map(lambda x: x.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: Tensor) -> None:
        self._map(lambda x: x[indices, ...])

    @property
    def _past(self) -> int:
        return 0 if self.held is None else self.held.tokens

    def _map(self, function: Any) -> None:
        if self._room is None:
            return
        self._room = (function(self._room[0]), function(self._room[1]))
        self.held = None if self.held is None else self.held.mapped(function)

    def _append(self, keys: Tensor, values: Tensor) -> None:
        """Behind the numbers: in place where there is room, so that a decoded token copies nothing but itself."""
        end = self._count + keys.shape[2]
        if self._room is None or self._room[0].shape[2] < end:
            room = max(end, self.newest + KEY_BLOCK - 1)
            made = tuple(x.new_empty((*x.shape[:2], room, x.shape[3])) for x in (keys, values))
            if self._room is not None:
                for to, x in zip(made, self._room, strict=True):
                    to[:, :, : self._count] = x[:, :, : self._count]
            self._room = (made[0], made[1])
        self._room[0][:, :, self._count : end] = keys
        self._room[1][:, :, self._count : end] = values
        self._count = end

    def _seal(self, keys: Tensor, values: Tensor) -> None:
        parts = [] if self.held is None else [self.held]
        for first in range(0, keys.shape[2], _PIECE):
            k, v = keys[:, :, first : first + _PIECE], values[:, :, first : first + _PIECE]
            demand(
                k.isfinite().all() & v.isfinite().all(),
                "a QuantisedCache was given keys or values that are NaN or infinite, which no code stands for",
            )
            parts.append(hold(tuple(k.chunk(self.streams, dim=-1)), v, self.bits))
        held = parts[0]
        for part in parts[1:]:
            held = held.followed_by(part)
        self.held = held

    def _drop(self) -> None:
        """Blocks of codes of which no query from here on sees anything."""
        if self.window is None or self.held is None:
            return
        unseen = self.get_seq_length() - self.window + 1 - self.first
        blocks = min(max(unseen, 0), self.held.tokens) // KEY_BLOCK * KEY_BLOCK
        if not blocks:
            return
        rest = self.held.tokens - blocks
        self.held = self.held.part(blocks, rest).mapped(torch.clone) if rest else None
        self.first += blocks


class QuantisedCache(Cache):
    """Keys and values in 8 or 4 bits: `model.generate(..., past_key_values=QuantisedCache(model.config, bits=8))`.

    Keys have a scale a channel and block of 128 tokens, values one a token and group of 64 channels (KIVI, Liu et al.
    2024, arXiv 2402.02750; here with an integer zero point, see `core.quantised`). The newest tokens, `newest` to
    `newest` + 127, stay numbers of the model's type. A prompt attends to itself in full precision; what follows attends
    to codes. The CPU kernel reads codes where they lie; on other devices, and for position methods that it does not
    know, the kernel "blocks" turns 1024 tokens at a time into numbers. Compact caches of collinear models, windows,
    padding, beams and `crop` work as with `DynamicCache`.

    bits: 8 or 4; 3 are to measure what they would lose, and take the bytes of 4.      newest: at least 1.
    config: of any model. One that is not of this package gets all tokens of a layer as numbers in each call: the codes
        are what stays in memory between calls.
    Raises ValueError for other numbers, and for layers that are neither full nor sliding attention.
    """

    def __init__(self, config: PreTrainedConfig, bits: int = 8, newest: int = 32) -> None:
        if isinstance(bits, bool) or bits not in BITS:
            raise ValueError(f"bits must be 8, 4 or 3, not {bits!r}")
        check_whole("newest", newest)
        text = config.get_text_config(decoder=True)
        types, options = get_layer_types_and_kwargs(text)
        wrong = [name for name in types if name not in _TYPES]
        if wrong:
            raise ValueError(f"a QuantisedCache has layers of {' and '.join(_TYPES)}, not of {wrong[0]}")
        self.bits, self.newest = bits, newest
        super().__init__(
            layers=[
                QuantisedLayer(bits, newest, _streams(text, layer), own.get("sliding_window"))
                for layer, own in enumerate(options)
            ]
        )

    def hold(self, keys: Tensor, values: Tensor, layer_idx: int) -> tuple[Held | None, Tensor, Tensor]:
        """Add keys and values of one layer; what its queries see: codes, and the numbers that follow them."""
        return self._layer(layer_idx).hold(keys, values)

    def held_bits(self, layer_idx: int) -> int | None:
        """Of the codes that the next call's queries of this layer see; None while there are none."""
        return None if self._layer(layer_idx).held is None else self.bits

    @property
    def nbytes(self) -> int:
        """Bytes of all that is held."""
        return sum(self._layer(i).nbytes for i in range(len(self.layers)))

    def _layer(self, index: int) -> QuantisedLayer:
        layer = self.layers[index]
        assert isinstance(layer, QuantisedLayer)
        return layer


def _streams(config: PreTrainedConfig, layer: int) -> int:
    """Key streams that lie side by side in a key of this layer."""
    if not isinstance(config, ClearheadConfig):
        return 1
    with torch.device("meta"):
        return config.make_variant(layer).sizes.key_streams

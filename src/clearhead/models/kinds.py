"""What may differ from layer to layer: the attention and its options, the position, the window.

Legend: B batch, L queries, S keys.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedConfig
from transformers.cache_utils import Cache

from clearhead.core.masks import MaskSpec
from clearhead.registry import did_you_mean

# Hugging Face's names, in a configuration's `layer_types`, for layers that see all keys and those with a window.
FULL, SLIDING = "full_attention", "sliding_attention"
TWIN_KEYS = ("num_attention_heads", "num_key_value_heads")
KEYS = ("attention", "attention_options", "position", "sliding_window")


@dataclass(frozen=True, slots=True)
class LayerKind:
    """What one layer is. Layers of one kind share plan, mask and rotation in a forward pass.

    options: of the attention. window: keys that a query sees, its own among them; None for all.
    """

    attention: str
    options: dict[str, Any] = field(hash=False)
    position: str
    window: int | None


class CacheSizes:
    """What Hugging Face's caches read of a configuration, read once: a compiled forward pass has nothing to import."""

    def __init__(self, config: PreTrainedConfig) -> None:
        self.per_layer_config = list(config.per_layer_config)

    def get_text_config(self, decoder: bool = True) -> "CacheSizes":
        return self


@dataclass(frozen=True, slots=True)
class Present:
    """Which keys a layer sees in a forward pass: `count` of them, the first one at place `first` of the sequence.

    A layer with a window may have dropped those before it, in a cache that does not grow past the window. One of an
    evicting cache is treated alike, whichever it dropped: `real` (B, kept) then says which of those kept are no
    padding.
    """

    first: int
    count: int
    real: Tensor | None = None

    def of(self, mask: MaskSpec, past: int | Tensor, window: int | None) -> MaskSpec:
        """The mask of all keys, cut to these, under the layer's window; a dense mask says that by itself."""
        end = self.first + self.count

        def cut(x: Tensor | None) -> Tensor | None:
            return None if x is None else x[..., self.first : end]

        places = mask.places
        if places is not None:
            places = (places[0], places[1][..., self.first : end])
        offset = past - self.first if mask.is_causal or mask.slopes is not None else mask.offset
        padding = cut(mask.key_padding)
        if self.real is not None:
            if mask.dense is not None:
                raise ValueError(
                    "a mask of 4 dimensions says something of every key, and an evicting cache has dropped some: give "
                    "a mask of 2 dimensions"
                )
            padding = None if padding is None else self._padding(padding)
        return replace(
            mask,
            offset=offset,
            window=window if mask.dense is None else None,
            key_padding=padding,
            documents=cut(mask.documents),
            dense=mask.dense if mask.dense is None or mask.dense.shape[-1] == 1 else cut(mask.dense),
            places=places,
        )

    def _padding(self, padding: Tensor) -> Tensor:
        """(B, count) of the kept keys and of those behind them, of which `padding` says it in their own places."""
        assert self.real is not None
        behind = self.count - self.real.shape[1]
        return torch.cat((self.real, padding[:, padding.shape[1] - behind :]), 1)


def present(cache: Cache | None, queries: int, layer: int, keys: int) -> Present:
    """The keys that layer `layer` will see of `keys` in all."""
    if cache is None:
        return Present(0, keys)
    count, first = cache.get_mask_sizes(queries, layer)
    kept_padding = getattr(cache, "kept_padding", None)
    return Present(first, count, None if kept_padding is None else kept_padding(layer))


def held_bits(cache: Cache | None, layer: int) -> int | None:
    """Of the codes that layer `layer` will see in a quantised cache; None where it sees numbers alone."""
    asked = getattr(cache, "held_bits", None)
    return None if asked is None else asked(layer)


def check_layers(layers: Any, depth: int) -> None:
    """Raise ValueError unless `layers` is a pattern for `depth` layers: tables with keys of `KEYS`."""
    if not isinstance(layers, Sequence) or isinstance(layers, str) or not 1 <= len(layers) <= depth:
        raise ValueError(
            f"layers must be a list of 1 to num_hidden_layers ({depth}) tables, which repeats over the depth; "
            f"got {layers!r}"
        )
    for index, entry in enumerate(layers):
        if not isinstance(entry, Mapping):
            raise ValueError(
                f"layers[{index}] must be a table such as {{'sliding_window': 128}}, not {entry!r}"
            )
        for key in entry:
            if key not in KEYS:
                raise ValueError(f"layers[{index}] has no key {key!r}: {did_you_mean(key, KEYS)}")
        options = entry.get("attention_options")
        if options is not None and not isinstance(options, Mapping):
            raise ValueError(f"layers[{index}].attention_options must be a table, not {options!r}")
        for key in ("attention", "position"):
            if not isinstance(entry.get(key, ""), str):
                raise ValueError(f"layers[{index}].{key} must be a name, not {entry[key]!r}")
        check_window(entry.get("sliding_window"), f"layers[{index}].sliding_window")


def check_twin_heads(heads: Any) -> None:
    """Raise ValueError unless `heads` is None or has positive integers for `TWIN_KEYS` and nothing else."""
    if heads is None:
        return
    whole = isinstance(heads, Mapping) and set(heads) == set(TWIN_KEYS)
    if not whole or not all(type(count) is int and count > 0 for count in heads.values()):
        raise ValueError(
            f"twin_heads must be a table of {' and '.join(TWIN_KEYS)}, positive integers, not {heads!r}"
        )


def check_window(window: Any, key: str) -> None:
    """Raise ValueError unless `window` is None or an integer of at least 2."""
    if window is None:
        return
    if isinstance(window, bool) or not isinstance(window, int) or window < 2:
        raise ValueError(
            f"{key} must be an integer of at least 2, the keys that a query sees, not {window!r}"
        )


def make_kinds(
    layers: Sequence[Mapping[str, Any]] | None,
    attention: str,
    options: Mapping[str, Any],
    positions: Sequence[str],
    window: int | None,
) -> tuple[LayerKind, ...]:
    """One kind for each of `positions`: what an entry of the pattern does not say is the model's own.

    Options of the model are those of its attention; an entry that names an attention has its own, by default none.
    """
    found = []
    for layer, position in enumerate(positions):
        entry = layers[layer % len(layers)] if layers else {}
        own = entry.get("attention_options")
        if own is None:
            own = options if entry.get("attention", attention) == attention else {}
        found.append(
            LayerKind(
                entry.get("attention", attention),
                dict(own),
                entry.get("position", position),
                entry.get("sliding_window", window),
            )
        )
    return tuple(found)

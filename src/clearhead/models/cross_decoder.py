"""The decoder of an encoder-decoder: the decoder, with cross-attention in every layer.

Legend: B batch, H output heads, L tokens of the decoder, S tokens of the encoder.
"""

import inspect
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers.cache_utils import Cache, DynamicCache, EncoderDecoderCache
from transformers.modeling_outputs import BaseModelOutputWithPastAndCrossAttentions
from transformers.utils.generic import can_return_tuple

from clearhead.core.masks import MaskSpec
from clearhead.models.arguments import check_keywords, has_padding
from clearhead.models.cross_attention import ClearheadCrossLayer, is_written
from clearhead.models.decoder import ClearheadModel
from clearhead.models.forward_inputs import Given, Placed
from clearhead.models.growing_cache import new_cache
from clearhead.models.seq2seq_config import ClearheadSeq2SeqConfig
from clearhead.models.shared import Shared

_PACKED = "packed documents: nothing says which tokens of target and source belong together, so give each pair a row"


class ClearheadCrossDecoder(ClearheadModel):
    """The decoder of `ClearheadModel` with attention to an encoder's states in every layer."""

    layer_class = ClearheadCrossLayer

    def __init__(self, config: ClearheadSeq2SeqConfig) -> None:
        super().__init__(config.sides[1])
        for index, layer in enumerate(self._cross_layers()):
            layer.look_at(config, index)
        self.cross_position = config.make_cross_position()
        declared = {n for layer in self._cross_layers() for n in layer.cross_attn.variant.float32_parameters}
        self._keep_in_fp32_modules_strict = [
            *(self._keep_in_fp32_modules_strict or ()),
            *(f"cross_attn.variant.{name}" for name in sorted(declared)),
        ]
        self.post_init()

    @can_return_tuple  # type: ignore[untyped-decorator]
    def forward(  # type: ignore[override]
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: EncoderDecoderCache | None = None,
        inputs_embeds: Tensor | None = None,
        encoder_hidden_states: Tensor | None = None,
        encoder_attention_mask: Tensor | None = None,
        use_cache: bool | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        rope_length: int | Tensor | None = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPastAndCrossAttentions:
        """Token ids (B, L) and an encoder's states (B, S, its hidden_size) to hidden states (B, L, hidden_size).

        encoder_attention_mask: (B, S) with 1 for real tokens of the source and 0 for padding, on either side.
        past_key_values: an `EncoderDecoderCache`; cross keys and values that it holds are not made again, and of
            `encoder_hidden_states` the shape alone is looked at.
        The rest as for `ClearheadModel.forward`; packed documents are a ValueError.
        """
        keywords = check_keywords(kwargs, _ARGUMENTS)
        inputs_embeds = self._embedded(input_ids, inputs_embeds)
        if encoder_hidden_states is None:
            raise ValueError("the decoder of an encoder-decoder needs encoder_hidden_states")
        _check_source(encoder_hidden_states, encoder_attention_mask, inputs_embeds)
        use_cache = self.config.use_cache if use_cache is None else use_cache
        use_cache = use_cache and not (self.gradient_checkpointing and self.training)
        asked = self._asked(output_attentions, output_hidden_states)
        cache = self._cache(past_key_values, use_cache)
        own = None if cache is None else cache.self_attention_cache
        given = Given(attention_mask, position_ids, rope_length, own, keywords)
        placed = self._placed(inputs_embeds, given)
        shared = self._share(inputs_embeds, given, placed, asked.maps)
        cross = self._share_cross(
            inputs_embeds, encoder_hidden_states, encoder_attention_mask, placed, cache, asked.maps
        )

        x, states, maps, cross_maps = inputs_embeds, [], [], []
        for layer, alike in self._alike.items():
            states.append(x)
            # The states by place: what checkpointing of old kind hands on by name loses its gradient.
            x, own_map, cross_map = self.layers[layer](
                x,
                encoder_hidden_states,
                shared[alike],
                cross,
                past_key_values=cache,
                output_attentions=asked.maps,
            )
            maps.append(own_map)
            cross_maps.append(cross_map)
        x = self.norm(x)
        return BaseModelOutputWithPastAndCrossAttentions(
            last_hidden_state=x,
            past_key_values=cache,
            hidden_states=(*states, x) if asked.states else None,
            attentions=tuple(maps) if asked.maps else None,
            cross_attentions=tuple(cross_maps) if asked.maps else None,
        )

    def _cache(self, given: Cache | None, use_cache: bool) -> EncoderDecoderCache | None:
        """The cache that was given, checked, or a new one if there is to be one."""
        if given is None:
            made = EncoderDecoderCache(new_cache(self._caches), DynamicCache())  # type: ignore[no-untyped-call]
            return made if use_cache else None
        if not isinstance(given, EncoderDecoderCache):
            raise ValueError(
                "past_key_values must be an EncoderDecoderCache, which has a half for each attention, not "
                f"{type(given).__name__}"
            )
        if any(given.cross_attention_cache.is_sliding):
            raise ValueError(
                "past_key_values would drop tokens of the source: make the cross-attention half without the decoder's "
                "configuration, whose windows are of its own tokens"
            )
        self._check_cache(given.self_attention_cache)
        return given

    def _share_cross(
        self,
        inputs_embeds: Tensor,
        source: Tensor,
        mask: Tensor | None,
        placed: Placed,
        cache: EncoderDecoderCache | None,
        output_attentions: bool,
    ) -> Shared:
        """What cross-attention of all layers is handed: made once a pass."""
        if placed.mask.documents is not None:
            raise ValueError(_PACKED)
        written = cache is not None and is_written(cache, 0)
        count = source.shape[1]
        keys = count if cache is None else _cross_keys(cache, count, written)
        real = None
        if mask is not None and has_padding(mask, None)[0]:
            real = (mask != 0).expand(source.shape[0], -1)
        theirs = source.new_zeros((1, 0), dtype=torch.long)
        if not written:
            slots = torch.arange(count, device=source.device)[None]
            theirs = slots if real is None else (real.long().cumsum(dim=-1) - 1).clamp(min=0)
        rotation = self.cross_position(placed.positions, theirs, None, inputs_embeds.dtype)
        if keys > count:
            # A cache of fixed size holds more keys than there are tokens.
            everything = torch.ones(source.shape[:2], dtype=torch.bool, device=source.device)
            real = F.pad(everything if real is None else real, (0, keys - count), value=False)
        variant = self._cross_layers()[0].cross_attn.variant
        visible = MaskSpec(key_padding=real)
        plans = self._plan(variant, inputs_embeds, visible, keys, output_attentions, source=source)
        return Shared(inputs_embeds.device, rotation, plans)

    def _cross_layers(self) -> list[ClearheadCrossLayer]:
        return cast(list[ClearheadCrossLayer], self.own_layers())


def _check_source(source: Tensor, mask: Tensor | None, inputs_embeds: Tensor) -> None:
    """ValueError unless there is a row of the source, and of its mask, for each row of the target."""
    batch = inputs_embeds.shape[0]
    if source.ndim != 3 or source.shape[0] != batch or source.shape[1] == 0:
        raise ValueError(
            f"encoder_hidden_states have shape {tuple(source.shape)}; expected ({batch}, tokens, width), a row for "
            "each row of the decoder"
        )
    if mask is None:
        return
    if mask.ndim != 2 or mask.shape[0] not in (1, batch) or mask.shape[1] != source.shape[1]:
        raise ValueError(
            f"the mask of the source has shape {tuple(mask.shape)}; cross-attention expects "
            f"({batch}, {source.shape[1]}), 1 for real tokens and 0 for padding, and no other"
        )


def _cross_keys(cache: EncoderDecoderCache, count: int, written: bool) -> int:
    """How many keys cross-attention will see; ValueError for a cache of another source."""
    layers: list[Any] = cache.cross_attention_cache.layers
    widest = layers[0].get_max_length() if layers else -1
    held = layers[0].keys.shape[-2] if written else count
    if 0 <= widest < count or (widest < 0 and held != count):
        raise ValueError(
            f"past_key_values hold cross keys of {held if widest < 0 else widest} tokens, but the source has {count}: "
            "a cache belongs to one source"
        )
    return max(held, widest)


_ARGUMENTS = inspect.signature(ClearheadCrossDecoder.forward).parameters

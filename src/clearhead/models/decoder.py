"""The decoder: token embedding, layers and a final norm.

Legend: B batch, H output heads, L queries, S keys.
"""

import inspect
from typing import Any

from torch import Tensor
from transformers.cache_utils import Cache
from transformers.modeling_outputs import BaseModelOutputWithPast
from transformers.utils.generic import can_return_tuple

from clearhead.models.arguments import check_keywords
from clearhead.models.blocks import ClearheadDecoderLayer
from clearhead.models.config import ClearheadConfig
from clearhead.models.forward_inputs import Given
from clearhead.models.growing_cache import new_cache
from clearhead.models.kinds import CacheSizes
from clearhead.models.serving import is_served
from clearhead.models.stack import ClearheadStack


class ClearheadModel(ClearheadStack):
    """Token embedding, decoder layers and a final norm."""

    layer_class = ClearheadDecoderLayer

    def __init__(self, config: ClearheadConfig) -> None:
        super().__init__(config)
        self._caches = CacheSizes(config)
        self.post_init()

    @can_return_tuple  # type: ignore[untyped-decorator]
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        rope_length: int | Tensor | None = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPast:
        """Token ids (B, L) to hidden states (B, L, hidden_size).

        attention_mask: (B, S) with 1 for real tokens and 0 for padding, or (B, 1 or H, L, S) bool or additive, which
            then says everything, windows too; keys that a layer with a window has dropped from its cache stay dropped.
        position_ids:   integers (B or 1, L). Without them they count real tokens. In a call that extends no cache,
            positions that restart among real tokens mean packed documents that cannot see each other. Without a mask
            one that does not follow its neighbour is a restart, as in transformers; beside one only one that goes back.
        rope_length:    the length of the whole request in tokens, or (B,) of each row's, for rope scalings that depend
            on it; others do not look at it. By default the longest position + 1 of the row, or of each packed document:
            no neighbour changes a row. Calls that extend a cache past the trained length must all be given the same
            one (`generate` does); one that is missing, or shorter than the request, is an error. A cache of fixed size
            counts as full, because asking how full it is would stall its device.
        output_attentions: effective maps (B, H, L, S) a layer, A1 − λ A2 for the differential variants, from the
            engine that has maps: chosen by itself under "clearhead", to be named otherwise ("eager"). What follows is
            computed from them, so they have gradients.
        kwargs: what transformers' tools hand to any model. cu_seq_lens_q and seq_idx mean packed documents too; another
            name that transformers' models do not have either is a TypeError. From a server (`models.serving`) they go
            to its attention function, and position_ids are those of many requests in one row.
        """
        served = is_served(self.config._attn_implementation, kwargs)
        keywords = kwargs if served else check_keywords(kwargs, _ARGUMENTS)
        inputs_embeds = self._embedded(input_ids, inputs_embeds)
        use_cache = self.config.use_cache if use_cache is None else use_cache
        use_cache = use_cache and not (self.gradient_checkpointing and self.training)
        asked = self._asked(output_attentions, output_hidden_states)

        if past_key_values is not None:
            self._check_cache(past_key_values)
        elif use_cache and not served:
            past_key_values = new_cache(self._caches)
        given = Given(attention_mask, position_ids, rope_length, past_key_values, keywords)
        handed: dict[str, Any] = {}
        if served:
            shared = self._share_with_server(inputs_embeds, given, asked.maps)
            handed = {**kwargs, "position_ids": position_ids}
        else:
            shared = self._share(inputs_embeds, given, self._placed(inputs_embeds, given), asked.maps)

        hidden_states, states, maps = self._through(
            inputs_embeds, shared, asked, past_key_values=past_key_values, **handed
        )
        return BaseModelOutputWithPast(
            last_hidden_state=hidden_states,
            past_key_values=past_key_values,
            hidden_states=states,
            attentions=maps,
        )

    def _check_cache(self, cache: Cache) -> None:
        """ValueError for keys and values that no layer here has written."""
        layers = getattr(cache, "layers", None)
        own = min(self._alike, default=0)
        held = getattr(layers[own], "keys", None) if layers and own < len(layers) else None
        if not isinstance(held, Tensor) or held.ndim != 4:
            return
        sizes = self._variant(own).sizes
        width = sizes.key_streams * sizes.key_width // (2 if self.config.compact_cache else 1)
        if (held.shape[1], held.shape[3]) != (sizes.kv_heads, width):
            compact = " with compact_cache" if self.config.compact_cache else ""
            raise ValueError(
                f"past_key_values hold keys of {held.shape[1]} heads, {held.shape[3]} wide; attention "
                f"{self.kinds[own].attention!r}{compact} has {sizes.kv_heads} heads, {width} wide. PEFT's prefix "
                "tuning makes keys for the Transformer twin and cannot be used here; prompt tuning and LoRA can"
            )


_ARGUMENTS = inspect.signature(ClearheadModel.forward).parameters

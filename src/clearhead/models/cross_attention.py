"""Attention of a decoder's tokens to an encoder's, and the decoder layer around it.

Legend: B batch, H output heads, L tokens of the decoder, S tokens of the encoder.
"""

from typing import TYPE_CHECKING, Any

from torch import Tensor
from transformers.cache_utils import Cache, EncoderDecoderCache

from clearhead.core.norm import RMSNorm
from clearhead.core.streams import Streams
from clearhead.models.blocks import ClearheadDecoderLayer
from clearhead.models.shared import Shared
from clearhead.nn import ProjectedAttention

if TYPE_CHECKING:
    from clearhead.models.seq2seq_config import ClearheadSeq2SeqConfig


class ClearheadCrossAttention(ProjectedAttention):
    """Cross-attention of one decoder layer: queries, and V2's λ(x), of the decoder's tokens; keys and values of the
    encoder's.

    A difference is one of two maps over the encoder's tokens, which every query sees all of. Keys and values are made
    at a request's first call, and kept in the cross-attention half of an `EncoderDecoderCache` from there on.
    """

    is_causal = False

    def __init__(self, config: "ClearheadSeq2SeqConfig", layer_idx: int) -> None:
        super().__init__(config.make_cross_variant(layer_idx), context_dim=config.sides[0].hidden_size)

    def forward(
        self,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        shared: Shared,
        past_key_values: EncoderDecoderCache | None = None,
        output_attentions: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """(B, L, hidden_size) and (B, S, the encoder's) to (B, L, hidden_size), and the effective map (B, H, L, S)."""
        here = shared.on(hidden_states.device)
        assert here.plans is not None
        heads = self._heads(hidden_states, encoder_hidden_states, here, past_key_values)
        return self.combine(heads, here.plans.prepared, output_attentions)

    def _heads(
        self, x: Tensor, context: Tensor, here: Shared, past_key_values: EncoderDecoderCache | None
    ) -> Streams:
        assert here.plans is not None
        opened, context = here.plans.takes_logits, context.to(x.device)
        if past_key_values is None:
            return self.project(x, context, here.rotation, opened=opened)
        cache = past_key_values.cross_attention_cache
        if not is_written(past_key_values, self.layer_idx):
            past_key_values.is_updated[self.layer_idx] = True
            return self.project(x, context, here.rotation, cache, opened=opened)
        held: Any = cache.layers[self.layer_idx]
        # No token of the context: what it has to say is in the cache.
        heads = self.project(x, context[:, :0], here.rotation, opened=opened)
        return heads.with_cached(held.keys.to(x.device), held.values.to(x.device))


class ClearheadCrossLayer(ClearheadDecoderLayer):
    """y = x + Attention(RMSNorm(x)); z = y + CrossAttention(RMSNorm(y), encoder); z + SwiGLU(RMSNorm(z)).

    `look_at` adds the cross-attention, whose configuration is the whole model's.
    """

    def look_at(self, config: "ClearheadSeq2SeqConfig", layer_idx: int) -> None:
        """Give the layer its cross-attention and the norm before it."""
        self.cross_attn = ClearheadCrossAttention(config, layer_idx)
        decoder = config.sides[1]
        self.cross_attention_layernorm = RMSNorm(decoder.hidden_size, decoder.rms_norm_eps)

    def forward(  # type: ignore[override]
        self,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        shared: Shared,
        cross: Shared,
        past_key_values: EncoderDecoderCache | None = None,
        output_attentions: bool = False,
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """(B, L, hidden_size) -> the same, and if asked the effective maps (B, H, L, L) and (B, H, L, S)."""
        own: Cache | None = None if past_key_values is None else past_key_values.self_attention_cache
        attended, maps = self.self_attn(self.input_layernorm(hidden_states), shared, own, output_attentions)
        hidden_states = hidden_states + attended
        crossed, cross_maps = self.cross_attn(
            self.cross_attention_layernorm(hidden_states),
            encoder_hidden_states,
            cross,
            past_key_values,
            output_attentions,
        )
        hidden_states = hidden_states + crossed
        return hidden_states + self.mlp(self.post_attention_layernorm(hidden_states)), maps, cross_maps


def is_written(cache: EncoderDecoderCache, layer_idx: int) -> bool:
    """Whether the layer's cross keys and values are in the cache."""
    return bool(cache.is_updated.get(layer_idx, False))

"""What `generate` has to know of encoder-decoders besides: whose mask is whose, and that the whole source is kept.

Legend: B batch, S tokens of the source.
"""

import inspect
from typing import Any, ClassVar

import torch
from torch import Tensor
from transformers.cache_utils import Cache, DynamicLayer, EncoderDecoderCache, StaticLayer
from transformers.generation.configuration_utils import GenerationConfig, GenerationMode

from clearhead.models.arguments import KNOWN
from clearhead.models.generation import ClearheadGeneration


class Seq2SeqGeneration(ClearheadGeneration):
    """Hooks of Hugging Face's `generate` for encoder-decoders."""

    rope_length_name: ClassVar[str] = "decoder_rope_length"

    @staticmethod
    def create_masks_for_generate(
        attention_mask: Tensor | None, past_key_values: Cache | None = None, **unused: Any
    ) -> Tensor | None:
        """That of the decoder, as wide as the half of the cache that is its own."""
        own = past_key_values
        if isinstance(past_key_values, EncoderDecoderCache):
            own = past_key_values.self_attention_cache
        return ClearheadGeneration.create_masks_for_generate(attention_mask, own)

    def reason_against_serving(self) -> str | None:
        return "an encoder-decoder has two sequences a request, and continuous batching lays out one"

    def _prepare_text_encoder_decoder_kwargs_for_generation(  # type: ignore[override]
        self, inputs_tensor: Tensor, model_kwargs: dict[str, Any], **rest: Any
    ) -> dict[str, Any]:
        """Hands the encoder what is its own: Seq2SeqTrainer's evaluation has labels there too."""
        known = KNOWN | set(inspect.signature(self.get_encoder().forward).parameters)  # type: ignore[attr-defined]
        own = {name: value for name, value in model_kwargs.items() if name in known}
        made = super()._prepare_text_encoder_decoder_kwargs_for_generation(inputs_tensor, own, **rest)  # type: ignore[misc]
        return {**model_kwargs, "encoder_outputs": made["encoder_outputs"]}

    def _prepare_cache_for_generation(  # type: ignore[override]
        self,
        generation_config: GenerationConfig,
        model_kwargs: dict[str, Any],
        generation_mode: GenerationMode,
        batch_size: int,
        max_cache_length: int,
    ) -> None:
        """Cross-attention sees all of the source, whatever windows the decoder's layers have."""
        given = model_kwargs.get("past_key_values")
        super()._prepare_cache_for_generation(
            generation_config, model_kwargs, generation_mode, batch_size, max_cache_length
        )
        cache = model_kwargs.get("past_key_values")
        if given is None and isinstance(cache, EncoderDecoderCache):
            tokens = model_kwargs["encoder_outputs"][0].shape[1]
            layers: list[Any] = cache.cross_attention_cache.layers
            for index, layer in enumerate(layers):
                if layer.is_sliding:
                    layers[index] = StaticLayer(tokens) if isinstance(layer, StaticLayer) else DynamicLayer()

    def _tokens_so_far(self, generation_config: GenerationConfig, model_kwargs: dict[str, Any]) -> Tensor:
        mask = model_kwargs.get("decoder_attention_mask")
        if mask is not None:
            counted: Tensor = mask.long().sum(dim=1)
            return counted
        encoded: Tensor = model_kwargs["encoder_outputs"][0]
        before = generation_config.max_length - generation_config._max_new_tokens  # type: ignore[operator,attr-defined]
        return torch.full((encoded.shape[0],), before, device=encoded.device)

"""Encoder-decoders: an encoder, a decoder that attends to it, and the language-modelling head.

Legend: B batch, L tokens of the target, S tokens of the source, V vocabulary.
"""

import inspect
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn
from transformers.cache_utils import EncoderDecoderCache
from transformers.distributed.configuration_utils import DistributedConfig
from transformers.distributed.utils import TransformersDeviceMesh
from transformers.generation.utils import GenerationMixin
from transformers.modeling_outputs import BaseModelOutput, Seq2SeqLMOutput, Seq2SeqModelOutput
from transformers.modeling_utils import slice_logits_to_keep
from transformers.utils.generic import can_return_tuple

from clearhead.models.arguments import check_keywords
from clearhead.models.cross_decoder import ClearheadCrossDecoder
from clearhead.models.encoder import ClearheadEncoderModel
from clearhead.models.pretrained import ClearheadPreTrainedModel
from clearhead.models.seq2seq_config import ClearheadSeq2SeqConfig
from clearhead.models.seq2seq_generation import Seq2SeqGeneration
from clearhead.positions.base import Position


class ClearheadSeq2SeqPreTrainedModel(ClearheadPreTrainedModel):
    """Loading, saving and initialisation of encoder-decoders."""

    config_class = ClearheadSeq2SeqConfig  # type: ignore[assignment]
    config: ClearheadSeq2SeqConfig  # type: ignore[assignment]
    _no_split_modules = ["ClearheadCrossLayer", "ClearheadEncoderLayer"]  # noqa: RUF012

    def post_init(self) -> None:
        super().post_init()
        # Those that the two sides bring would leave cross-attention whole beside shares of the rest.
        self._tp_plan, self._pp_plan = {}, {}

    @classmethod
    def maybe_distribute_model(
        cls,
        model: nn.Module,
        distributed_config: DistributedConfig | None,
        mesh_manager: TransformersDeviceMesh | None,
    ) -> nn.Module:
        """ValueError where layers or heads were to be shared out: no plan says how for cross-attention."""
        if (
            distributed_config is not None
            and max(distributed_config.tp_size or 1, distributed_config.pp_size or 1) > 1
        ):
            raise ValueError(
                "encoder-decoders are not shared out over processes by heads or layers: tp_size and pp_size must be 1"
            )
        return super().maybe_distribute_model(model, distributed_config, mesh_manager)

    def resize_token_embeddings(self, *args: Any, **kwargs: Any) -> nn.Embedding:
        """As Hugging Face's; both sides, which read one vocabulary."""
        encoder, decoder = self.get_encoder(), self.get_decoder()
        resized: nn.Embedding = super().resize_token_embeddings(*args, **kwargs)
        if not self.config.tie_word_embeddings:
            decoder.resize_token_embeddings(*args, **kwargs)
        else:
            self.tie_weights()
        for side in (encoder, decoder):
            side.config.vocab_size = side.vocab_size = resized.num_embeddings
        return resized


class ClearheadSeq2SeqModel(ClearheadSeq2SeqPreTrainedModel):
    """An encoder, and a decoder with attention to it, without a head."""

    _tied_weights_keys = {"encoder.embed_tokens.weight": "decoder.embed_tokens.weight"}  # noqa: RUF012

    def __init__(self, config: ClearheadSeq2SeqConfig) -> None:
        super().__init__(config)
        self.encoder = ClearheadEncoderModel(config.sides[0])
        self.decoder = ClearheadCrossDecoder(config)
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.encoder.embed_tokens

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.encoder.set_input_embeddings(value)
        if self.config.tie_word_embeddings:
            self.decoder.set_input_embeddings(value)

    @can_return_tuple  # type: ignore[untyped-decorator]
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        decoder_input_ids: Tensor | None = None,
        decoder_attention_mask: Tensor | None = None,
        decoder_position_ids: Tensor | None = None,
        encoder_outputs: BaseModelOutput | tuple[Any, ...] | None = None,
        past_key_values: EncoderDecoderCache | None = None,
        inputs_embeds: Tensor | None = None,
        decoder_inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        decoder_rope_length: int | Tensor | None = None,
        **kwargs: Any,
    ) -> Seq2SeqModelOutput:
        """Token ids of source (B, S) and target (B, L) to the decoder's hidden states (B, L, hidden_size).

        attention_mask:  (B, S) with 1 for real tokens of the source and 0 for padding, on either side.
        encoder_outputs: what the encoder gave for this source, in place of input_ids.
        decoder_attention_mask, decoder_position_ids, decoder_rope_length, past_key_values: the decoder's, as for
            `ClearheadModel.forward`; the cache is an `EncoderDecoderCache`.
        output_attentions: effective maps of all three attentions, A1 − λ A2 for the differential variants:
            encoder_attentions (B, H, S, S), decoder_attentions (B, H, L, L), cross_attentions (B, H, L, S).
        Raises ValueError without a source or a target, and for packed documents.
        """
        keywords = check_keywords(kwargs, _ARGUMENTS)
        maps = bool(self.config.output_attentions if output_attentions is None else output_attentions)
        states = bool(
            self.config.output_hidden_states if output_hidden_states is None else output_hidden_states
        )
        if decoder_input_ids is None and decoder_inputs_embeds is None:
            raise ValueError(
                "the decoder has nothing to read: give decoder_input_ids or decoder_inputs_embeds; "
                "prepare_decoder_input_ids_from_labels makes them of labels"
            )
        encoded = self._encoded(input_ids, attention_mask, inputs_embeds, encoder_outputs, maps, states)
        decoded = self.decoder(
            input_ids=decoder_input_ids,
            attention_mask=decoder_attention_mask,
            position_ids=decoder_position_ids,
            past_key_values=past_key_values,
            inputs_embeds=decoder_inputs_embeds,
            encoder_hidden_states=encoded.last_hidden_state,
            encoder_attention_mask=attention_mask,
            use_cache=self.config.use_cache if use_cache is None else use_cache,
            output_attentions=maps,
            output_hidden_states=states,
            return_dict=True,
            rope_length=decoder_rope_length,
            **keywords,
        )
        return Seq2SeqModelOutput(
            last_hidden_state=decoded.last_hidden_state,
            past_key_values=decoded.past_key_values,
            decoder_hidden_states=decoded.hidden_states,
            decoder_attentions=decoded.attentions,
            cross_attentions=decoded.cross_attentions,
            encoder_last_hidden_state=encoded.last_hidden_state,
            encoder_hidden_states=encoded.hidden_states,
            encoder_attentions=encoded.attentions,
        )

    def _encoded(
        self,
        input_ids: Tensor | None,
        attention_mask: Tensor | None,
        inputs_embeds: Tensor | None,
        given: BaseModelOutput | tuple[Any, ...] | None,
        maps: bool,
        states: bool,
    ) -> BaseModelOutput:
        """What the encoder says of the source, or has said."""
        if given is None:
            made: BaseModelOutput = self.encoder(
                input_ids=input_ids,
                attention_mask=attention_mask,
                inputs_embeds=inputs_embeds,
                output_attentions=maps,
                output_hidden_states=states,
                return_dict=True,
            )
            return made
        if isinstance(given, Mapping):
            return given if isinstance(given, BaseModelOutput) else BaseModelOutput(**given)
        names = ("last_hidden_state", "hidden_states", "attentions")
        return BaseModelOutput(**dict(zip(names, given, strict=False)))


# Hugging Face looks for its mixin among the direct bases.
class ClearheadForConditionalGeneration(ClearheadSeq2SeqPreTrainedModel, Seq2SeqGeneration, GenerationMixin):
    """An encoder-decoder language model, with any attention on each side and between them; used like T5 or BART."""

    # The loss divides by `num_items_in_batch`, so Trainer's gradient accumulation and averaging over devices are exact.
    accepts_loss_kwargs = True
    _tied_weights_keys = {  # noqa: RUF012
        "model.encoder.embed_tokens.weight": "model.decoder.embed_tokens.weight",
        "lm_head.weight": "model.decoder.embed_tokens.weight",
    }

    def __init__(self, config: ClearheadSeq2SeqConfig) -> None:
        super().__init__(config)
        decoder = config.sides[1]
        self.model = ClearheadSeq2SeqModel(config)
        self.vocab_size = decoder.vocab_size
        self.lm_head = nn.Linear(decoder.hidden_size, decoder.vocab_size, bias=False)
        # Labels are not shifted: the decoder's input is.
        self.loss_type = "ForMaskedLM"
        self.post_init()

    def position_methods(self) -> dict[str, Position]:
        """The decoder's."""
        return self.model.decoder.position_methods()

    @can_return_tuple  # type: ignore[untyped-decorator]
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        decoder_input_ids: Tensor | None = None,
        decoder_attention_mask: Tensor | None = None,
        decoder_position_ids: Tensor | None = None,
        encoder_outputs: BaseModelOutput | tuple[Any, ...] | None = None,
        past_key_values: EncoderDecoderCache | None = None,
        inputs_embeds: Tensor | None = None,
        decoder_inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        num_items_in_batch: int | Tensor | None = None,
        decoder_rope_length: int | Tensor | None = None,
        **kwargs: Any,
    ) -> Seq2SeqLMOutput:
        """Token ids of source (B, S) and target (B, L) to logits (B, L, V), and the loss in nats a token with labels.

        labels (B, L): the target itself, −100 is ignored. The decoder reads them shifted to the right, behind
        `decoder_start_token_id`, unless it is given something else. `num_items_in_batch` divides the summed loss
        instead of the number of labels here, for gradient accumulation. The rest as for
        `ClearheadSeq2SeqModel.forward`.
        """
        if labels is not None and decoder_input_ids is None and decoder_inputs_embeds is None:
            decoder_input_ids = self.prepare_decoder_input_ids_from_labels(labels)
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            decoder_input_ids=decoder_input_ids,
            decoder_attention_mask=decoder_attention_mask,
            decoder_position_ids=decoder_position_ids,
            encoder_outputs=encoder_outputs,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            decoder_inputs_embeds=decoder_inputs_embeds,
            use_cache=use_cache,
            output_attentions=output_attentions,
            output_hidden_states=output_hidden_states,
            return_dict=True,
            decoder_rope_length=decoder_rope_length,
            **kwargs,
        )
        logits = self.lm_head(slice_logits_to_keep(outputs.last_hidden_state, logits_to_keep))
        loss = None
        if labels is not None:
            loss = self.loss_function(
                logits=logits,
                labels=labels,
                vocab_size=self.vocab_size,
                num_items_in_batch=num_items_in_batch,
            )
        return Seq2SeqLMOutput(
            loss=loss,
            logits=logits,
            past_key_values=outputs.past_key_values,
            decoder_hidden_states=outputs.decoder_hidden_states,
            decoder_attentions=outputs.decoder_attentions,
            cross_attentions=outputs.cross_attentions,
            encoder_last_hidden_state=outputs.encoder_last_hidden_state,
            encoder_hidden_states=outputs.encoder_hidden_states,
            encoder_attentions=outputs.encoder_attentions,
        )

    def prepare_decoder_input_ids_from_labels(self, labels: Tensor) -> Tensor:
        """(B, L): the labels one place to the right behind `decoder_start_token_id`; −100 becomes padding.

        ValueError where the configuration has no start token, or no padding token and one is needed.
        """
        start, pad = self.config.decoder_start_token_id, self.config.pad_token_id
        if start is None:
            raise ValueError(
                "labels cannot be shifted: the configuration has no decoder_start_token_id or bos_token_id"
            )
        if pad is None:
            raise ValueError(
                "labels cannot be shifted: the configuration has no pad_token_id to put in place of −100"
            )
        shifted = labels.new_full(labels.shape, start)
        shifted[..., 1:] = labels[..., :-1]
        return shifted.masked_fill(shifted == -100, pad)


_ARGUMENTS = inspect.signature(ClearheadForConditionalGeneration.forward).parameters

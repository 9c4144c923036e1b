"""The language-modelling head on the decoder.

Legend: B batch, L queries, V vocabulary.
"""

from typing import Any, cast

from torch import Tensor, nn
from transformers.cache_utils import Cache
from transformers.generation.utils import GenerationMixin
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.modeling_utils import slice_logits_to_keep
from transformers.utils.generic import can_return_tuple

from clearhead.models.config import ClearheadConfig
from clearhead.models.decoder import ClearheadModel
from clearhead.models.diagnostics import diagnostics_of
from clearhead.models.generation import ClearheadGeneration
from clearhead.models.pretrained import ClearheadPreTrainedModel
from clearhead.positions.base import Position


# Hugging Face looks for its mixin among the direct bases.
class ClearheadForCausalLM(ClearheadPreTrainedModel, ClearheadGeneration, GenerationMixin):
    """A causal language model with any attention variant; used like LLaMA's."""

    # The loss divides by `num_items_in_batch`, so Trainer's gradient accumulation and averaging over devices are exact.
    accepts_loss_kwargs = True
    _tp_plan = {"lm_head": "colwise_gather_output"}  # noqa: RUF012
    _pp_plan: Any = {"lm_head": (["hidden_states"], ["logits"])}  # noqa: RUF012
    _fsdp_plan = {"lm_head": "keep_full_weight"}  # noqa: RUF012
    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}  # noqa: RUF012

    def __init__(self, config: ClearheadConfig) -> None:
        super().__init__(config)
        self.model = ClearheadModel(config)
        self.vocab_size = config.vocab_size
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def position_methods(self) -> dict[str, Position]:
        return self.model.position_methods()

    def reason_against_serving(self) -> str | None:
        return self.model.reason_against_serving()

    @can_return_tuple  # type: ignore[untyped-decorator]
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        num_items_in_batch: int | Tensor | None = None,
        shift_labels: Tensor | None = None,
        rope_length: int | Tensor | None = None,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """Token ids (B, L) to logits (B, L, V), and the loss in nats a token if labels (B, L) are given.

        labels are not shifted, shift_labels are and go before them; −100 is ignored. `num_items_in_batch` divides the
        summed loss instead of the number of labels here, for gradient accumulation. The rest as for
        `ClearheadModel.forward`.
        """
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            output_attentions=output_attentions,
            output_hidden_states=output_hidden_states,
            return_dict=True,
            rope_length=rope_length,
            **kwargs,
        )
        logits = self.lm_head(slice_logits_to_keep(outputs.last_hidden_state, logits_to_keep))
        loss = None
        if labels is not None or shift_labels is not None:
            loss = self.loss_function(
                logits=logits,
                labels=labels,
                shift_labels=shift_labels,
                vocab_size=self.config.vocab_size,
                num_items_in_batch=num_items_in_batch,
            )
        return CausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )

    def lambdas(self, input_ids: Tensor | None = None) -> dict[int, float]:
        """Mean λ of each differential layer: for V2 over heads and tokens of `input_ids` (B, L).

        Layers without λ, and V2 layers when no tokens are given, are left out.
        """
        return self.diagnostics(input_ids).get("lambda", {})

    def diagnostics(self, input_ids: Tensor | None = None) -> dict[str, dict[int, float]]:
        """What the layers' variants have for a log (`Variant.diagnostics`), by name, then by layer.

        What depends on the input is of the tokens `input_ids` (B, L), and left out without them.
        """

        def states() -> tuple[Tensor, ...]:
            outputs = self.model(input_ids=input_ids, use_cache=False, output_hidden_states=True)
            return cast(tuple[Tensor, ...], outputs.hidden_states)

        return diagnostics_of(self.model.own_layers(), None if input_ids is None else states)

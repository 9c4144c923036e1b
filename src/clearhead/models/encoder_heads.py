"""The encoder under heads: for masked tokens, for classes of texts and of tokens, for answers and for choices.

Legend: B batch, L tokens, V vocabulary.
"""

from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn
from transformers.modeling_outputs import (
    MaskedLMOutput,
    MultipleChoiceModelOutput,
    QuestionAnsweringModelOutput,
    SequenceClassifierOutput,
    TokenClassifierOutput,
)
from transformers.utils.generic import can_return_tuple

from clearhead.core.norm import RMSNorm
from clearhead.models.encoder import ClearheadEncoderModel, ClearheadEncoderPreTrainedModel
from clearhead.models.encoder_config import ClearheadEncoderConfig
from clearhead.models.pooling import pool

_PIPELINE = {
    "head": (["hidden_states"], ["hidden_states"]),
    "lm_head": (["hidden_states"], ["logits"]),
}


class PredictionHead(nn.Module):
    """RMSNorm(gelu(W x)), what stands before the last matrix of every head, as in ModernBERT.

    All heads have it under the name `head`, so that fine-tuning begins with what the masked language model learned.
    """

    def __init__(self, config: ClearheadEncoderConfig) -> None:
        super().__init__()
        self.dense = nn.Linear(config.hidden_size, config.hidden_size, bias=False)
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.norm(F.gelu(self.dense(x)))
        return out


class ClearheadForMaskedLM(ClearheadEncoderPreTrainedModel):
    """A masked language model with any attention variant; used like BERT's."""

    # The loss divides by `num_items_in_batch`, so Trainer's gradient accumulation and averaging over devices are exact.
    accepts_loss_kwargs = True
    _tp_plan = {"lm_head": "colwise_gather_output"}  # noqa: RUF012
    _pp_plan: Any = _PIPELINE
    _fsdp_plan = dict.fromkeys(_PIPELINE, "keep_full_weight")
    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}  # noqa: RUF012

    def __init__(self, config: ClearheadEncoderConfig) -> None:
        super().__init__(config)
        self.model = ClearheadEncoderModel(config)
        self.head = PredictionHead(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=True)
        self.post_init()

    @can_return_tuple  # type: ignore[untyped-decorator]
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        num_items_in_batch: int | Tensor | None = None,
        return_dict: bool | None = None,
        **kwargs: Any,
    ) -> MaskedLMOutput:
        """Token ids (B, L) to logits (B, L, V), and the loss in nats a labelled token if labels (B, L) are given.

        labels are the tokens that were masked, each at its own place; −100 is ignored. `num_items_in_batch` divides the
        summed loss instead of the number of labels here. With `config.sparse_prediction` and labels, logits are those
        of the labelled tokens, (labelled, V). The rest as for `ClearheadEncoderModel.forward`.
        """
        outputs = self.model(
            input_ids, attention_mask, position_ids, inputs_embeds, return_dict=True, **kwargs
        )
        states = outputs.last_hidden_state
        if self.config.sparse_prediction and labels is not None:
            sought = labels != -100
            states, labels = states[sought], labels[sought]
        logits = self.lm_head(self.head(states))
        loss = None
        if labels is not None:
            loss = self.loss_function(
                logits=logits,
                labels=labels,
                vocab_size=self.config.vocab_size,
                num_items_in_batch=num_items_in_batch,
            )
        return MaskedLMOutput(loss, logits, outputs.hidden_states, outputs.attentions)


class _Classifier(ClearheadEncoderPreTrainedModel):
    """An encoder, the prediction head, dropout and one last matrix of `outputs` rows, by default one a label."""

    def __init__(self, config: ClearheadEncoderConfig, outputs: int | None = None) -> None:
        super().__init__(config)
        rows = config.num_labels if outputs is None else outputs
        assert rows is not None
        self.num_labels = rows
        self.model = ClearheadEncoderModel(config)
        self.head = PredictionHead(config)
        self.dropout = nn.Dropout(config.classifier_dropout)
        self.classifier = nn.Linear(config.hidden_size, rows)
        self.post_init()

    def _judge(self, states: Tensor) -> Tensor:
        judged: Tensor = self.classifier(self.dropout(self.head(states)))
        return judged


class ClearheadEncoderForSequenceClassification(_Classifier):
    """One of `config.num_labels` classes, or numbers, for each text: logits (B, num_labels).

    They read the mean of the text's tokens, or its first one: `config.classifier_pooling`. labels (B,): classes;
    floating point for one label (squared error); (B, num_labels) floating point for several at once.
    """

    @can_return_tuple  # type: ignore[untyped-decorator]
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        return_dict: bool | None = None,
        **kwargs: Any,
    ) -> SequenceClassifierOutput:
        """One text a row: ValueError for a mask of 4 dimensions, which does not say what is padding."""
        outputs = self.model(
            input_ids, attention_mask, position_ids, inputs_embeds, return_dict=True, **kwargs
        )
        pooled = pool(
            outputs.last_hidden_state, attention_mask, position_ids, kwargs, self.config.classifier_pooling
        )
        logits = self._judge(pooled)
        loss = None
        if labels is not None:
            loss = self.loss_function(labels=labels, pooled_logits=logits, config=self.config)
        return SequenceClassifierOutput(loss, logits, outputs.hidden_states, outputs.attentions)


class ClearheadEncoderForTokenClassification(_Classifier):
    """One of `config.num_labels` classes for each token: logits (B, L, num_labels). labels (B, L): −100 is ignored."""

    @can_return_tuple  # type: ignore[untyped-decorator]
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        return_dict: bool | None = None,
        **kwargs: Any,
    ) -> TokenClassifierOutput:
        """As for `ClearheadEncoderModel.forward`."""
        outputs = self.model(
            input_ids, attention_mask, position_ids, inputs_embeds, return_dict=True, **kwargs
        )
        logits = self._judge(outputs.last_hidden_state)
        loss = None if labels is None else self.loss_function(logits, labels, self.config)
        return TokenClassifierOutput(loss, logits, outputs.hidden_states, outputs.attentions)


class ClearheadEncoderForQuestionAnswering(_Classifier):
    """Where in a text an answer begins and ends: start_logits and end_logits (B, L).

    start_positions, end_positions (B,): token numbers; one past the text is ignored.
    """

    def __init__(self, config: ClearheadEncoderConfig) -> None:
        super().__init__(config, 2)

    @can_return_tuple  # type: ignore[untyped-decorator]
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        start_positions: Tensor | None = None,
        end_positions: Tensor | None = None,
        return_dict: bool | None = None,
        **kwargs: Any,
    ) -> QuestionAnsweringModelOutput:
        """As for `ClearheadEncoderModel.forward`."""
        outputs = self.model(
            input_ids, attention_mask, position_ids, inputs_embeds, return_dict=True, **kwargs
        )
        starts, ends = self._judge(outputs.last_hidden_state).unbind(dim=-1)
        loss = None
        if start_positions is not None and end_positions is not None:
            loss = self.loss_function(starts, ends, start_positions, end_positions)
        return QuestionAnsweringModelOutput(loss, starts, ends, outputs.hidden_states, outputs.attentions)


class ClearheadEncoderForMultipleChoice(_Classifier):
    """Which of several texts it is: token ids (B, choices, L) to logits (B, choices); labels (B,).

    Pooled as `ClearheadEncoderForSequenceClassification` does.
    """

    def __init__(self, config: ClearheadEncoderConfig) -> None:
        super().__init__(config, 1)

    @can_return_tuple  # type: ignore[untyped-decorator]
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        return_dict: bool | None = None,
        **kwargs: Any,
    ) -> MultipleChoiceModelOutput:
        """Every argument of `ClearheadEncoderModel.forward` has a dimension for the choices behind the batch's."""
        given = input_ids if input_ids is not None else inputs_embeds
        if given is None:
            raise ValueError("give exactly one of input_ids and inputs_embeds")
        batch, choices = given.shape[:2]
        rows = [
            None if x is None else x.flatten(0, 1)
            for x in (input_ids, attention_mask, position_ids, inputs_embeds)
        ]
        outputs = self.model(*rows, return_dict=True, **kwargs)
        pooled = pool(outputs.last_hidden_state, rows[1], rows[2], kwargs, self.config.classifier_pooling)
        logits = self._judge(pooled).reshape(batch, choices)
        loss = None if labels is None else F.cross_entropy(logits, labels)
        return MultipleChoiceModelOutput(loss, logits, outputs.hidden_states, outputs.attentions)

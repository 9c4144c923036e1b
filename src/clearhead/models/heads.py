"""The decoder under other heads than the language model's: Hugging Face's own, as LLaMA has them.

Legend: B batch, L tokens.
"""

from transformers.modeling_layers import (
    GenericForQuestionAnswering,
    GenericForSequenceClassification,
    GenericForTokenClassification,
)

from clearhead.models.pretrained import ClearheadPreTrainedModel


class ClearheadForSequenceClassification(GenericForSequenceClassification, ClearheadPreTrainedModel):
    """One of `config.num_labels` classes, or numbers, for each text: logits (B, num_labels).

    They are the linear image of the state of the last token that is not `config.pad_token_id`, so padding may stand on
    either side. labels (B,): classes; floating point for one label (squared error); (B, num_labels) floating point for
    several at once. ValueError for a batch without `pad_token_id`.
    """


class ClearheadForTokenClassification(GenericForTokenClassification, ClearheadPreTrainedModel):
    """One of `config.num_labels` classes for each token: logits (B, L, num_labels).

    labels (B, L): classes, −100 is ignored. Each token sees the ones before it, not those behind.
    """


class ClearheadForQuestionAnswering(GenericForQuestionAnswering, ClearheadPreTrainedModel):
    """Where in a text an answer begins and ends: start_logits and end_logits (B, L).

    start_positions, end_positions (B,): token numbers; one past the text is ignored.
    """

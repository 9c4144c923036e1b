"""The configuration of an encoder."""

from typing import Any, ClassVar, Literal, get_args

from huggingface_hub.dataclasses import strict

from clearhead.models import plans
from clearhead.models.config import ClearheadConfig
from clearhead.registry import resolve

Pooling = Literal["mean", "first"]
_NO_CACHE = "an encoder reads a text once and keeps no keys and values"


@strict
class ClearheadEncoderConfig(ClearheadConfig):
    """Sizes and choices of an encoder: every token sees those before and behind it, with any attention.

    Keys are those of `ClearheadConfig`, and so are the twins. What is not the same:

    position:           rope or alibi (by |m − n|). Refused: what is defined for causal attention alone (xpos), and
        "nope" in every layer, which would leave a text without order; in some layers it may be.
    sliding_window:     a query sees keys fewer than so many tokens away on either side, 2 · sliding_window − 1 in all;
        ModernBERT's local_attention = 128 is sliding_window = 65 here.
    layers:             as there; ModernBERT's pattern is [{}, {"sliding_window": 65}, {"sliding_window": 65}].
    tie_word_embeddings: the head for masked tokens has the embedding's matrix, by default, as in ModernBERT.
    sparse_prediction:  with labels, logits are made of the labelled tokens alone, (labelled, V) in place of (B, L, V),
        as ModernBERT has it: the same loss for a part of the head's work.
    classifier_pooling: what a head for texts reads: "mean" of the real tokens, or the "first" of them, for tokenizers
        that put a [CLS] there.
    classifier_dropout: before the last matrix of the heads for classes and answers, in training.
    mask_token_id, cls_token_id, sep_token_id: the tokenizer's, for tools that ask; nothing here looks at them.
    use_cache, compact_cache, twin_heads: refused, because an encoder has no cache.
    Raises ValueError as `ClearheadConfig` does.
    """

    model_type = "clearhead_encoder"
    causal: ClassVar[bool] = False
    keys_to_ignore_at_inference: ClassVar = []
    base_model_pp_plan: ClassVar[Any] = plans.ENCODER_PIPELINE

    tie_word_embeddings: bool = True
    use_cache: bool = False
    mask_token_id: int | None = None
    cls_token_id: int | None = None
    sep_token_id: int | None = None
    sparse_prediction: bool = False
    classifier_pooling: str = "mean"
    classifier_dropout: float = 0.0

    def validate_architecture(self) -> None:
        """Part of the strict validation: raises for what no encoder can be built from."""
        for key in ("use_cache", "compact_cache", "twin_heads"):
            if getattr(self, key):
                raise ValueError(f"{key} has no meaning here: {_NO_CACHE}")
        if self.classifier_pooling not in get_args(Pooling):
            raise ValueError(
                f"classifier_pooling must be one of {', '.join(get_args(Pooling))}, not {self.classifier_pooling!r}"
            )
        if not 0 <= self.classifier_dropout < 1:
            raise ValueError(
                f"classifier_dropout must be at least 0 and below 1, not {self.classifier_dropout}"
            )
        super().validate_architecture()
        named = dict.fromkeys(kind.position for kind in self.layer_kinds)
        for name in named:
            if resolve("positions", name).causal_only:
                raise ValueError(
                    f"position {name!r} is defined for causal attention only: it grows without bound towards later "
                    "keys, which the tokens of an encoder see"
                )
        if set(named) == {"nope"}:
            raise ValueError(
                'position "nope" in every layer leaves an encoder without the order of its tokens: only a causal mask '
                "would tell it; give some layers another position"
            )

    @property
    def mirrored(self) -> bool:
        """Whether a text read backwards gives the same outputs backwards: nothing tells before from behind.

        So it is where every layer's logits are even in the distance: collinear attention that is exact or strict, whose
        angles start at zero for every pair, and any attention under ALiBi's |m − n| or without a position.
        """
        kinds = self.layer_kinds
        for kind in dict.fromkeys(kinds):
            placement = self.make_variant(kinds.index(kind)).placement
            even = placement is not None and placement.mode != "slack"
            if resolve("positions", kind.position).rotates and not even:
                return False
        return True

"""Hugging Face models: decoders, encoders and both together, every variant.

Importing this module registers them with the Auto classes, and by name in the tables that Trainer (label smoothing),
pipelines and lm-evaluation-harness look a class up in, and in the namespace of transformers, where `transformers serve`
and TRL do.
"""

from collections.abc import Mapping
from types import ModuleType
from typing import Any

from clearhead.extras import need

need("clearhead.models", "hf")

import transformers
from transformers import AutoConfig
from transformers.models.auto import modeling_auto

from clearhead.models.autoload import FAMILIES
from clearhead.models.causal import ClearheadForCausalLM
from clearhead.models.config import ClearheadConfig
from clearhead.models.decoder import ClearheadModel
from clearhead.models.encoder import ClearheadEncoderModel
from clearhead.models.encoder_config import ClearheadEncoderConfig
from clearhead.models.encoder_heads import (
    ClearheadEncoderForMultipleChoice,
    ClearheadEncoderForQuestionAnswering,
    ClearheadEncoderForSequenceClassification,
    ClearheadEncoderForTokenClassification,
    ClearheadForMaskedLM,
)
from clearhead.models.evicting_cache import EvictingCache
from clearhead.models.growing_cache import GrowingCache
from clearhead.models.heads import (
    ClearheadForQuestionAnswering,
    ClearheadForSequenceClassification,
    ClearheadForTokenClassification,
)
from clearhead.models.quantised_cache import QuantisedCache
from clearhead.models.seq2seq import ClearheadForConditionalGeneration, ClearheadSeq2SeqModel
from clearhead.models.seq2seq_config import ClearheadSeq2SeqConfig

__all__ = [
    "ClearheadConfig",
    "ClearheadEncoderConfig",
    "ClearheadEncoderForMultipleChoice",
    "ClearheadEncoderForQuestionAnswering",
    "ClearheadEncoderForSequenceClassification",
    "ClearheadEncoderForTokenClassification",
    "ClearheadEncoderModel",
    "ClearheadForCausalLM",
    "ClearheadForConditionalGeneration",
    "ClearheadForMaskedLM",
    "ClearheadForQuestionAnswering",
    "ClearheadForSequenceClassification",
    "ClearheadForTokenClassification",
    "ClearheadModel",
    "ClearheadSeq2SeqConfig",
    "ClearheadSeq2SeqModel",
    "EvictingCache",
    "GrowingCache",
    "QuantisedCache",
]

# Where transformers looks the name of a class up, by the Auto class that makes it.
_NAMES: dict[str, Any] = {
    "AutoModel": modeling_auto.MODEL_MAPPING_NAMES,
    "AutoModelForCausalLM": modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    "AutoModelForMaskedLM": modeling_auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES,
    "AutoModelForSeq2SeqLM": modeling_auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES,
    "AutoModelForSequenceClassification": modeling_auto.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES,
    "AutoModelForTokenClassification": modeling_auto.MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING_NAMES,
    "AutoModelForQuestionAnswering": modeling_auto.MODEL_FOR_QUESTION_ANSWERING_MAPPING_NAMES,
    "AutoModelForMultipleChoice": modeling_auto.MODEL_FOR_MULTIPLE_CHOICE_MAPPING_NAMES,
}
# transformers makes its top module anew when it loads its processors and a client holds either: their class has both.
_namespace = transformers if type(transformers) is ModuleType else type(transformers)


def _register(model_type: str, classes: Mapping[str, str]) -> None:
    made = {auto: globals()[name] for auto, name in classes.items()}
    config = made.pop("AutoConfig")
    AutoConfig.register(model_type, config)
    setattr(_namespace, config.__name__, config)
    for auto, model in made.items():
        getattr(transformers, auto).register(config, model)
        _NAMES[auto][model_type] = model.__name__
        setattr(_namespace, model.__name__, model)


for _model_type, _classes in FAMILIES.items():
    _register(_model_type, _classes)
del _model_type, _classes

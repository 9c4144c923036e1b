"""Hugging Face models: one family, every variant.

Importing this module registers them with the Auto classes, and by name in the tables that Trainer (label smoothing),
pipelines and lm-evaluation-harness look a class up in, and in the namespace of transformers, where `transformers serve`
and TRL do.
"""

from types import ModuleType
from typing import Any

from clearhead.extras import need

need("clearhead.models", "hf")

import transformers
from transformers import AutoConfig
from transformers.models.auto import modeling_auto

from clearhead.models.autoload import CLASSES
from clearhead.models.causal import ClearheadForCausalLM
from clearhead.models.config import ClearheadConfig
from clearhead.models.decoder import ClearheadModel
from clearhead.models.evicting_cache import EvictingCache
from clearhead.models.heads import (
    ClearheadForQuestionAnswering,
    ClearheadForSequenceClassification,
    ClearheadForTokenClassification,
)
from clearhead.models.quantised_cache import QuantisedCache

__all__ = [
    "ClearheadConfig",
    "ClearheadForCausalLM",
    "ClearheadForQuestionAnswering",
    "ClearheadForSequenceClassification",
    "ClearheadForTokenClassification",
    "ClearheadModel",
    "EvictingCache",
    "QuantisedCache",
]

_NAMES: dict[str, Any] = {
    "AutoModel": modeling_auto.MODEL_MAPPING_NAMES,
    "AutoModelForCausalLM": modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    "AutoModelForSequenceClassification": modeling_auto.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES,
    "AutoModelForTokenClassification": modeling_auto.MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING_NAMES,
    "AutoModelForQuestionAnswering": modeling_auto.MODEL_FOR_QUESTION_ANSWERING_MAPPING_NAMES,
}

AutoConfig.register(ClearheadConfig.model_type, ClearheadConfig)
for _auto, _table in _NAMES.items():
    getattr(transformers, _auto).register(ClearheadConfig, globals()[CLASSES[_auto]])
    _table[ClearheadConfig.model_type] = CLASSES[_auto]
# transformers makes its top module anew when it loads its processors and a client holds either: their class has both.
_namespace = transformers if type(transformers) is ModuleType else type(transformers)
for _name in CLASSES.values():
    setattr(_namespace, _name, globals()[_name])
del _auto, _table, _name, _namespace

"""Hugging Face models: one family, every variant.

Importing this module registers them with `AutoConfig` and `AutoModelForCausalLM`, and by name in the tables of causal
language models that Trainer (label smoothing), pipelines, serving and lm-evaluation-harness look their class up in.
"""

from clearhead.extras import need

need("clearhead.models", "hf")

from transformers import AutoConfig, AutoModel, AutoModelForCausalLM
from transformers.models.auto import modeling_auto

from clearhead.models.causal import ClearheadForCausalLM, ClearheadModel
from clearhead.models.config import ClearheadConfig

AutoConfig.register("clearhead", ClearheadConfig)
AutoModel.register(ClearheadConfig, ClearheadModel)
AutoModelForCausalLM.register(ClearheadConfig, ClearheadForCausalLM)
modeling_auto.MODEL_MAPPING_NAMES[ClearheadConfig.model_type] = ClearheadModel.__name__
modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[ClearheadConfig.model_type] = ClearheadForCausalLM.__name__

__all__ = ["ClearheadConfig", "ClearheadForCausalLM", "ClearheadModel"]

"""Hugging Face models: one family, every variant.

Importing this module registers them with `AutoConfig` and `AutoModelForCausalLM`.
"""

from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

from clearhead.models.causal import ClearheadForCausalLM, ClearheadModel
from clearhead.models.config import ClearheadConfig

AutoConfig.register("clearhead", ClearheadConfig)
AutoModel.register(ClearheadConfig, ClearheadModel)
AutoModelForCausalLM.register(ClearheadConfig, ClearheadForCausalLM)

__all__ = ["ClearheadConfig", "ClearheadForCausalLM", "ClearheadModel"]

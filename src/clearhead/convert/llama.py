"""LLaMA of transformers: the softmax twin under its names, both ways."""

from typing import Any

from clearhead.convert.base import refuse
from clearhead.convert.family import LlamaFamily, rope_for, shared_keys
from clearhead.models.config import ClearheadConfig


class Llama(LlamaFamily):
    """`LlamaForCausalLM`: LLaMA 1 to 3, SmolLM2, TinyLlama and everything else with that class."""

    model_type = "llama"
    class_name = "LlamaForCausalLM"
    exports = True

    def written(self, config: ClearheadConfig) -> dict[str, Any]:
        if config.attention != "softmax":
            raise refuse("attention", config.attention, "LlamaForCausalLM computes 'softmax' only")
        if (config.attention_options or {}).get("head_norm"):
            raise refuse("attention_options", config.attention_options, "LlamaForCausalLM has no head norm")
        from transformers import LlamaConfig

        rope, length = rope_for(config, "LlamaForCausalLM")
        made = LlamaConfig(
            **shared_keys(config),
            head_dim=config.head_dim,
            max_position_embeddings=length,
            rope_parameters=rope,
            architectures=[self.class_name],
        )
        return dict(made.to_diff_dict())


class Mistral(LlamaFamily):
    """`MistralForCausalLM`, with its sliding window."""

    model_type = "mistral"
    class_name = "MistralForCausalLM"

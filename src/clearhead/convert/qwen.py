"""Qwen 2 and 3 of transformers: recognised, and refused with the reason."""

from typing import Any

from clearhead.convert.base import refuse
from clearhead.convert.family import LlamaFamily


class Qwen2(LlamaFamily):
    """`Qwen2ForCausalLM` adds biases to queries, keys and values."""

    model_type = "qwen2"
    class_name = "Qwen2ForCausalLM"

    def check(self, config: Any) -> None:
        raise refuse(
            "model_type",
            self.model_type,
            "Qwen 2 has biases on q_proj, k_proj and v_proj; clearhead models have none",
        )


class Qwen3(LlamaFamily):
    """`Qwen3ForCausalLM` norms the queries and keys of each head."""

    model_type = "qwen3"
    class_name = "Qwen3ForCausalLM"

    def check(self, config: Any) -> None:
        raise refuse(
            "model_type",
            self.model_type,
            "Qwen 3 norms queries and keys (q_norm, k_norm); clearhead models do not",
        )

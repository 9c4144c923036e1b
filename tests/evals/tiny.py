"""Tiny models and a tiny tokenizer, made in the test: ours and Hugging Face's, and one that copies what it has read."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import (
    DynamicCache,
    GenerationMixin,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)
from transformers.modeling_outputs import CausalLMOutputWithPast

from clearhead.data.store import TokenStore
from clearhead.data.tokenizer import train_bpe, wrap
from clearhead.evals.subject import Subject
from clearhead.models import ClearheadConfig, ClearheadForCausalLM

WORDS = (
    "The grass is green and the sky is blue; there are 0123456789 keys, and what is hidden here? A passkey."
)
SIZES = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}


def tokenizer(size: int = 320) -> PreTrainedTokenizerFast:
    """A byte-level BPE that knows a few words; bos is 1."""
    return wrap(train_bpe([WORDS] * 4, size))


def llama(vocabulary: int = 320, **settings: Any) -> LlamaForCausalLM:
    """A random LLaMA whose weights are large enough that context matters."""
    torch.manual_seed(0)
    sizes = {**SIZES, "num_key_value_heads": 2, "max_position_embeddings": 16, "initializer_range": 0.2}
    config = LlamaConfig(vocab_size=vocabulary, **{**sizes, **settings})
    return LlamaForCausalLM(config).eval()


def ours(vocabulary: int = 320, **settings: Any) -> ClearheadForCausalLM:
    """A random model of this library."""
    torch.manual_seed(0)
    sizes = {**SIZES, "max_position_embeddings": 16, "initializer_range": 0.2}
    config = ClearheadConfig(vocab_size=vocabulary, **{**sizes, **settings})
    return ClearheadForCausalLM(config).eval()


def gpt2(vocabulary: int = 320) -> GPT2LMHeadModel:
    """A model whose table of positions ends at 32."""
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=vocabulary, n_embd=32, n_layer=1, n_head=4, n_positions=32, bos_token_id=1, eos_token_id=2
    )
    return GPT2LMHeadModel(config).eval()


def store(lengths: Sequence[int], vocabulary: int = 320, seed: int = 0) -> TokenStore:
    """Documents of random tokens, none of them special."""
    rng = np.random.default_rng(seed)
    documents = [rng.integers(3, vocabulary, size).tolist() for size in lengths]
    return TokenStore.from_documents(documents, bos_token_id=1)


def subject(model: Any, documents: TokenStore | None = None, **settings: Any) -> Subject:
    """A subject around a model; its training length is 16."""
    return Subject(
        model=model,
        tokenizer=settings.pop("tokenizer", None) or tokenizer(),
        open_documents=lambda: documents if documents is not None else store([40, 40, 40, 40]),
        device=torch.device("cpu"),
        untrained=lambda: model,
        seed=0,
        **{"training_length": 16, **settings},
    )


def save(folder: Path, model: PreTrainedModel | None = None, **settings: Any) -> Path:
    """A directory with a model and its tokenizer, as from the hub."""
    words = settings.pop("tokenizer", None) or tokenizer()
    (model or llama(len(words), **settings)).save_pretrained(folder)
    words.save_pretrained(folder)
    return folder


class CopyConfig(PreTrainedConfig):
    model_type = "copy"
    vocab_size: int = 320
    num_hidden_layers: int = 1
    pad_token_id: int | None = 0


class CopyModel(PreTrainedModel, GenerationMixin):
    """Goes on as the last four tokens did where they first stood; its key-value cache holds the ids it has read."""

    config_class = CopyConfig

    def __init__(self, config: CopyConfig, suffix: int = 4) -> None:
        super().__init__(config)
        self.unused = nn.Parameter(torch.zeros(1))
        self.suffix = suffix
        self.calls = 0
        self.post_init()

    def forward(
        self,
        input_ids: Tensor,
        past_key_values: DynamicCache | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int = 0,
        **unused: Any,
    ) -> CausalLMOutputWithPast:
        self.calls += 1
        read = input_ids
        if past_key_values is not None:
            kept, _ = past_key_values.update(
                input_ids[:, None, :, None].float(), input_ids[:, None, :, None].float(), 0
            )
            read = kept[:, 0, :, 0].long()
        logits = torch.zeros(*input_ids.shape, self.config.vocab_size)
        for row, ids in enumerate(read.tolist()):
            logits[row, -1, self._next(ids)] = 9.0
        return CausalLMOutputWithPast(logits=logits, past_key_values=past_key_values)

    def _next(self, ids: list[int]) -> int:
        for size in range(self.suffix, 0, -1):
            end = ids[-size:]
            for start in range(len(ids) - size):
                if ids[start : start + size] == end:
                    return ids[start + size]
        return ids[0]

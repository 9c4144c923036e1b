"""Tiny models with a tokenizer of words, for looking at."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from clearhead.models import ClearheadConfig, ClearheadForCausalLM

TEXT = "the red fox saw a grey dog </script> and the dog saw the fox; who saw the <b>fox</b>? the dog"


def tokenizer() -> PreTrainedTokenizerFast:
    """Bytes, so that every text can be read."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    inner = Tokenizer(models.BPE({one: i for i, one in enumerate(["<s>", *alphabet])}, []))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=inner, bos_token="<s>")


def model(attention: str, **options: Any) -> ClearheadForCausalLM:
    """Spread out enough that maps are far from even."""
    torch.manual_seed(3)
    sizes: dict[str, Any] = {
        "vocab_size": 257,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "initializer_range": 0.4,
    }
    return ClearheadForCausalLM(ClearheadConfig(attention=attention, **sizes | options)).eval()


def saved(made: PreTrainedModel, folder: Path) -> Path:
    made.save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return folder

"""Real servers on a directory that `clearhead convert --to serving` wrote.

`transformers serve` takes a minute: set CLEARHEAD_SERVE=1. vLLM runs where it is installed.
"""

import importlib.util
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer

from clearhead.convert.run import convert
from clearhead.models import ClearheadForCausalLM
from tests.evals import tiny
from tests.load.server_process import PATIENCE, serving

TEXTS = ["The grass", "The sky is blue; there are", "A passkey", "what is hidden here? A"]
CONTINUOUS = [
    "--continuous-batching",
    "--cb-num-blocks",
    "64",
    "--cb-block-size",
    "16",
    "--cb-max-batch-tokens",
    "64",
]
SERVED = ["softmax", "differential", "differential_v2", "collinear", "differential_v2_collinear"]


def directories(root: Path, attention: str, **settings: Any) -> tuple[Path, Path]:
    """A model as it is saved, and for servers."""
    model = tiny.ours(
        attention=attention, bos_token_id=1, eos_token_id=2, max_position_embeddings=128, **settings
    )
    words = tiny.tokenizer()
    with torch.no_grad():
        # Bytes that are no text come out of streams otherwise than at once: a zero is never the largest logit.
        for token in range(model.config.vocab_size):
            if not words.decode([token]).isascii():
                model.lm_head.weight[token] = 0.0
    source = tiny.save(root / "model", model)
    convert(str(source), root / "served", to="serving")
    return source, root / "served"


@torch.no_grad()
def answers(source: Path, texts: list[str], new: int) -> list[list[int]]:
    model, words = ClearheadForCausalLM.from_pretrained(source), AutoTokenizer.from_pretrained(source)
    found = []
    for text in texts:
        ids = words(text, return_tensors="pt")["input_ids"]
        found.append(model.generate(ids, max_new_tokens=new, do_sample=False)[0, ids.shape[1] :].tolist())
    return found


@pytest.fixture(params=SERVED)
def server(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[tuple[str, Path, Path]]:
    source, served = directories(tmp_path, request.param, pad_token_id=0)
    with serving(served, tmp_path, CONTINUOUS) as address:
        yield address, source, served


@pytest.mark.skipif(
    not os.environ.get("CLEARHEAD_SERVE"), reason="set CLEARHEAD_SERVE=1: it takes a minute a model"
)
def test_transformers_serve_with_continuous_batching(server: tuple[str, Path, Path]) -> None:
    from openai import OpenAI

    address, source, served = server
    client = OpenAI(base_url=address, api_key="none", timeout=PATIENCE, max_retries=0)
    words = AutoTokenizer.from_pretrained(source)
    for text, tokens in zip(TEXTS, answers(source, TEXTS, 6), strict=True):
        expected = words.decode(tokens, skip_special_tokens=True)
        asked: dict[str, Any] = {"model": str(served), "prompt": text, "max_tokens": 6, "temperature": 0}
        assert client.completions.create(**asked).choices[0].text == expected
        streamed = client.completions.create(**asked, stream=True)
        assert "".join(part.choices[0].text for part in streamed) == expected


@pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vLLM is not installed")
@pytest.mark.parametrize("attention", SERVED)
def test_vllm(attention: str, tmp_path: Path) -> None:
    """Twenty requests of mixed length through its Transformers backend, greedily, in float32."""
    import vllm

    # Heads as wide as its kernels take.
    sizes = {"hidden_size": 128, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 64}
    source, served = directories(tmp_path, attention, **sizes)
    texts = [tiny.WORDS[: 4 + 3 * number] for number in range(20)]
    model = vllm.LLM(
        model=str(served),
        model_impl="transformers",
        trust_remote_code=True,
        dtype="float32",
        max_model_len=128,
        enforce_eager=True,
        gpu_memory_utilization=0.3,
    )
    found = model.generate(texts, vllm.SamplingParams(temperature=0, max_tokens=6))
    assert [list(made.outputs[0].token_ids) for made in found] == answers(source, texts, 6)

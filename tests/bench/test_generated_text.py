"""`benchmarks/generated_text.py`: what it counts, and that its caches are those that `generate` would write behind."""

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache

from clearhead.models import ClearheadConfig, ClearheadForCausalLM, QuantisedCache

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "generated_text.py"
VOCABULARY, NEW = 40, 6


@pytest.fixture(scope="module")
def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("benchmarks_generated_text", SCRIPT)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    # Its dataclasses look their module up.
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def model() -> ClearheadForCausalLM:
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "vocab_size": VOCABULARY}
    return ClearheadForCausalLM(ClearheadConfig(**sizes, initializer_range=0.3)).eval()


def prompt() -> Tensor:
    return torch.randint(3, VOCABULARY, (3, 200), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("bits", [8, 4])
def test_the_text_is_the_one_that_generate_writes(
    bits: int, script: ModuleType, model: ClearheadForCausalLM
) -> None:
    ids, read = prompt(), DynamicCache(config=model.config)
    with torch.no_grad():
        first = model(ids, past_key_values=read, logits_to_keep=1).logits[:, -1]
        cache = script.filled(model, script.FORMS[f"int{bits}, newest 32"], read)
        found = script.write(model, cache, first, NEW)
        expected = model.generate(
            ids,
            past_key_values=QuantisedCache(model.config, bits),
            max_new_tokens=NEW,
            do_sample=False,
            eos_token_id=None,
        )
    assert cache.layers[0].held.tokens == 128
    assert torch.equal(found.tokens, expected[:, 200:])


def test_every_form_gives_a_record(script: ModuleType, model: ClearheadForCausalLM) -> None:
    records = {entry["form"]: entry for entry in script.study(model, prompt(), NEW, [*script.FORMS])}
    assert list(records) == list(script.FORMS)
    error = {name: entry["relative_logits_error"] for name, entry in records.items()}
    assert error[script.CONTROL] < 1e-5
    assert 1e-5 < error["bfloat16 (imitated)"] < error["int4, newest 32"]
    # Codes and their imitation lose equally much; half of it, or its first token, is less.
    assert 0.5 < error["int8, newest 32"] / error["int8, imitated"] < 2
    for part in ("keys alone", "values alone", "first token whole"):
        assert 0 < error[f"int8, {part} (imitated)"] < error["int4, newest 32"]


def test_what_is_counted(script: ModuleType) -> None:
    logits = torch.zeros(2, 4, 3)
    logits[..., 1], logits[..., 2] = 2.0, 1.5
    reference = script.Written(logits.argmax(-1), logits)
    moved = logits.clone()
    moved[1, 2, 2] = 2.25
    fed = script.Written(moved.argmax(-1), moved)
    free = reference.tokens.clone()
    free[1, 2:] = torch.tensor([2, 0])
    found = script.compared(reference, free, fed)
    assert found["equal"] == 6 / 8 and found["agree"] == 5 / 6 and found["texts_equal"] == 1
    assert found["first_difference"] == [None, 2] and found["margin_at_first_difference"] == [0.5]
    assert found["moved_largest"] == 0.75 and found["margin_median"] == 0.5
    assert found["kl_nats"] > 0

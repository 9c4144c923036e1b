"""Formats of transformers: the same function here as there, and the same bits when converted there and back."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    DiffLlamaConfig,
    DiffLlamaForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
)

from clearhead.convert.base import ConversionError
from clearhead.convert.run import convert
from clearhead.models import ClearheadForCausalLM
from tests.convert.support import IDS, SIZES, ours, same_bits, save, tensors

SCALINGS: dict[str, dict[str, Any]] = {
    "llama3": {
        "rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 32,
    },
    "yarn": {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 32},
    "dynamic": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0},
    "linear": {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0},
}  # fmt: skip


def difference(first: Path, second: Path) -> float:
    with torch.no_grad():
        one, other = (AutoModelForCausalLM.from_pretrained(f).eval()(IDS).logits for f in (first, second))
    return float((one - other).abs().max())


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("kv_heads", [8, 2])
def test_llama_there_and_back(kv_heads: int, tied: bool, tmp_path: Path) -> None:
    config = LlamaConfig(num_key_value_heads=kv_heads, tie_word_embeddings=tied, pad_token_id=0, **SIZES)
    theirs = save(tmp_path / "theirs", LlamaForCausalLM(config))
    agreement = convert(str(theirs), tmp_path / "ours")
    assert agreement.holds and agreement.dtype == torch.float64 and agreement.difference <= 1e-10
    assert difference(theirs, tmp_path / "ours") <= 1e-5
    assert type(AutoModelForCausalLM.from_pretrained(tmp_path / "ours")) is ClearheadForCausalLM
    convert(str(tmp_path / "ours"), tmp_path / "back", to="llama")
    assert same_bits(theirs, tmp_path / "back")
    assert type(AutoModelForCausalLM.from_pretrained(tmp_path / "back")) is LlamaForCausalLM
    before, after = (json.loads((f / "config.json").read_text()) for f in (theirs, tmp_path / "back"))
    assert {key: after[key] for key in before} == before


@pytest.mark.parametrize("kv_heads", [8, 4, 2])
def test_diff_llama_there_and_back(kv_heads: int, tmp_path: Path) -> None:
    config = DiffLlamaConfig(num_key_value_heads=kv_heads, **{**SIZES, "rms_norm_eps": 1e-6})
    theirs = save(tmp_path / "theirs", DiffLlamaForCausalLM(config))
    agreement = convert(str(theirs), tmp_path / "ours")
    assert agreement.dtype == torch.float64 and agreement.difference <= 1e-10
    # Logits go to 6; transformers' own eager and sdpa differ by 8e-6 there.
    assert difference(theirs, tmp_path / "ours") <= 2e-5
    convert(str(tmp_path / "ours"), tmp_path / "back", to="diff_llama")
    assert same_bits(theirs, tmp_path / "back")


def test_mistral_without_a_window_is_the_softmax_twin(tmp_path: Path) -> None:
    config = MistralConfig(num_key_value_heads=4, sliding_window=None, **SIZES)
    theirs = save(tmp_path / "theirs", MistralForCausalLM(config))
    assert convert(str(theirs), tmp_path / "ours").difference <= 1e-10
    assert difference(theirs, tmp_path / "ours") <= 1e-5
    # And so it is a LLaMA too.
    convert(str(theirs), tmp_path / "llama", to="llama")
    assert same_bits(theirs, tmp_path / "llama") and difference(theirs, tmp_path / "llama") <= 1e-5


def test_mistral_keeps_its_window(tmp_path: Path) -> None:
    config = MistralConfig(num_key_value_heads=4, sliding_window=5, **SIZES)
    theirs = save(tmp_path / "theirs", MistralForCausalLM(config))
    assert convert(str(theirs), tmp_path / "ours").difference <= 1e-10
    assert ClearheadForCausalLM.from_pretrained(tmp_path / "ours").config.sliding_window == 5
    assert difference(theirs, tmp_path / "ours") <= 1e-5
    with pytest.raises(ConversionError, match="sliding_window is 5: LlamaForCausalLM has one kind of layer"):
        convert(str(tmp_path / "ours"), tmp_path / "llama", to="llama")
    assert not (tmp_path / "llama").exists()


@pytest.mark.parametrize("kind", SCALINGS)
def test_rotary_scalings_come_and_go(kind: str, tmp_path: Path) -> None:
    config = LlamaConfig(num_key_value_heads=4, **{**SIZES, "rope_parameters": SCALINGS[kind]})
    theirs = save(tmp_path / "theirs", LlamaForCausalLM(config))
    assert convert(str(theirs), tmp_path / "ours").difference <= 1e-10
    convert(str(tmp_path / "ours"), tmp_path / "back", to="llama")
    assert difference(theirs, tmp_path / "back") == 0.0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_v1_becomes_a_diff_llama(dtype: torch.dtype, tmp_path: Path) -> None:
    """With a head norm of its own, whose weight goes into the output projection: exactly, from bfloat16 too."""
    source = ours(tmp_path / "ours", dtype, attention="differential", num_key_value_heads=4)
    agreement = convert(str(source), tmp_path / "theirs", to="diff_llama")
    assert agreement.holds and agreement.difference <= (1e-10 if dtype == torch.bfloat16 else 1e-5)
    loaded = DiffLlamaForCausalLM.from_pretrained(tmp_path / "theirs")
    assert loaded.dtype == torch.float32
    with torch.no_grad():
        mine = ClearheadForCausalLM.from_pretrained(source, dtype=torch.float32)
        assert float((mine(IDS).logits - loaded(IDS).logits).abs().max()) <= 2e-5


@pytest.mark.parametrize(("attention", "to"), [("softmax", "llama"), ("differential", "diff_llama")])
def test_the_interleaved_layout_is_turned(attention: str, to: str, tmp_path: Path) -> None:
    rope = {"rope_type": "default", "rope_theta": 10000.0, "layout": "interleaved"}
    source = ours(tmp_path / "ours", attention=attention, num_key_value_heads=4, rope_parameters=rope)
    assert convert(str(source), tmp_path / "theirs", to=to).holds
    assert difference(source, tmp_path / "theirs") <= 2e-5
    name = "model.layers.1.self_attn.q_proj.weight"
    assert not torch.equal(tensors(source)[name], tensors(tmp_path / "theirs")[name])


@pytest.mark.parametrize(
    ("attention", "position"),
    [
        ("differential_v2", "xpos"),
        ("collinear", "rope"),
        ("differential_v2_collinear", "rope"),
        ("differential", "alibi"),
        ("softmax", "nope"),
    ],
)
def test_our_own_are_carried(attention: str, position: str, tmp_path: Path) -> None:
    settings = {"attention": attention, "position": position, "num_key_value_heads": 2}
    source = ours(tmp_path / "a", torch.bfloat16, **settings)
    assert convert(str(source), tmp_path / "b").difference == 0.0
    assert same_bits(source, tmp_path / "b")


def test_float64_stays_float64(tmp_path: Path) -> None:
    source = ours(tmp_path / "ours", torch.float64, attention="differential", num_key_value_heads=4)
    agreement = convert(str(source), tmp_path / "theirs", to="diff_llama")
    assert agreement.difference <= 1e-10 and agreement.limit == 1e-10
    assert {value.dtype for value in tensors(tmp_path / "theirs").values()} == {torch.float64}


def test_a_softmax_model_becomes_v2_with_the_same_logits(tmp_path: Path) -> None:
    source = ours(tmp_path / "ours", num_key_value_heads=4)
    assert convert(str(source), tmp_path / "v2", attention="differential_v2").difference <= 1e-10
    assert difference(source, tmp_path / "v2") <= 1e-5
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "v2")
    assert model.config.attention == "differential_v2"


@pytest.mark.parametrize("attention", ["differential", "collinear", "differential_collinear"])
def test_other_attention_is_a_start_and_said_to_be(attention: str, tmp_path: Path) -> None:
    source = ours(tmp_path / "ours", num_key_value_heads=4)
    said: list[str] = []
    convert(str(source), tmp_path / "new", attention=attention, say=said.append)
    assert any("a start for training, not the same function" in line for line in said)
    record = json.loads((tmp_path / "new/conversion.json").read_text())
    assert record["same_function"] is False and record["check"]["max_difference"] > 0.01
    before, after = tensors(source), tensors(tmp_path / "new")
    assert all(torch.equal(after[name], before[name]) for name in before)
    # The same seed: the same start.
    convert(str(source), tmp_path / "again", attention=attention)
    assert same_bits(tmp_path / "new", tmp_path / "again")

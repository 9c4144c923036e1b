"""What cannot be converted says why in one sentence and leaves nothing behind."""

from __future__ import annotations

import errno
import json
import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from clearhead.cli.main import main
from clearhead.convert import run
from clearhead.convert.run import convert
from clearhead.convert.weights import ConversionError
from clearhead.models import ClearheadConfig, ClearheadForTokenClassification
from clearhead.runs.lock import exclusive
from tests.convert.support import SIZES, nothing_left, ours, save, tensors


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(tmp_path_factory.mktemp("models") / "llama", LlamaForCausalLM(LlamaConfig(**SIZES)))


@pytest.fixture
def copy(llama: Path, tmp_path: Path) -> Path:
    shutil.copytree(llama, tmp_path / "copy")
    return tmp_path / "copy"


def refused(source: Path | str, out: Path, words: str, **options: Any) -> None:
    with pytest.raises(ConversionError) as error:
        convert(str(source), out, **options)
    message = str(error.value)
    assert words in message, message
    assert "\n" not in message and nothing_left(out)


def configured(folder: Path, **changes: Any) -> None:
    file = folder / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"attention_bias": True}, "the configuration's attention_bias is True: clearhead models have no biases"),
        ({"mlp_bias": True}, "mlp_bias is True"),
        ({"hidden_act": "gelu"}, "hidden_act is 'gelu'"),
        ({"attention_dropout": 0.1}, "attention_dropout is 0.1"),
        ({"quantization_config": {"quant_method": "gptq"}}, "quantization_config is 'gptq'"),
        ({"rope_parameters": {"rope_type": "proportional", "rope_theta": 1e4}}, "rope_parameters cannot be taken over"),
        ({"model_type": "bamba"}, "the model type 'bamba' and tensors of none of the formats"),
        ({"model_type": "clearhead_encoder"}, "is an encoder; causal language models alone are converted"),
        ({"model_type": "clearhead_seq2seq"}, "is an encoder-decoder; causal language models alone"),
        ({"model_type": "gpt_neox"}, "model_type is 'gpt_neox': GPT-NeoX, the released CoCA's too"),
        ({"num_key_value_heads": 3}, "num_attention_heads (8) must be a multiple of num_key_value_heads (3)"),
        ({"num_hidden_layers": 3}, "it has no tensor 'model.layers.2."),
        ({"num_hidden_layers": 1}, "which would be lost"),
        ({"vocab_size": 62}, "'model.embed_tokens.weight' has the shape [61, 32]"),
        ({"num_attention_heads": "many"}, "the configuration is not one of a 'llama' model"),
        ({"tie_word_embeddings": True}, "an lm_head.weight of its own"),
    ],
)  # fmt: skip
def test_a_configuration_that_does_not_fit(
    copy: Path, tmp_path: Path, changes: dict[str, Any], words: str
) -> None:
    configured(copy, **changes)
    refused(copy, tmp_path / "out", words)


WITHOUT_WIDTH = {key: value for key, value in SIZES.items() if key != "head_dim"}
OTHERS: dict[str, tuple[Callable[[], Any], str]] = {
    "biases": (
        lambda: Qwen2ForCausalLM(Qwen2Config(num_key_value_heads=4, **WITHOUT_WIDTH)),
        "model_type is 'qwen2': Qwen 2 has biases",
    ),
    "norms": (
        lambda: Qwen3ForCausalLM(Qwen3Config(num_key_value_heads=4, **SIZES)),
        "model_type is 'qwen3': Qwen 3 norms queries and keys",
    ),
    "head": (
        lambda: LlamaForSequenceClassification(LlamaConfig(pad_token_id=0, **SIZES)),
        "architectures is 'LlamaForSequenceClassification'",
    ),
    "own head": (
        lambda: ClearheadForTokenClassification(ClearheadConfig(**SIZES)),
        "architectures is 'ClearheadForTokenClassification': only ClearheadForCausalLM can be converted",
    ),
    "family": (
        lambda: GPT2LMHeadModel(GPT2Config(vocab_size=61, n_embd=32, n_layer=1, n_head=4, eos_token_id=2)),
        "the model type 'gpt2'",
    ),
}  # fmt: skip


@pytest.mark.parametrize("kind", OTHERS)
def test_another_architecture(kind: str, tmp_path: Path) -> None:
    make, words = OTHERS[kind]
    refused(save(tmp_path / "theirs", make()), tmp_path / "out", words)


@pytest.mark.parametrize(
    ("settings", "to", "words"),
    [
        ({"attention": "differential_v2"}, "llama", "attention is 'differential_v2': LlamaForCausalLM computes"),
        ({"attention": "collinear"}, "diff_llama", "attention is 'collinear': DiffLlamaForCausalLM computes"),
        ({"attention_options": {"head_norm": True}}, "llama", "has no head norm"),
        ({"position": "alibi"}, "llama", "position is 'alibi'"),
        ({"nope_interval": 2}, "llama", "nope_interval is 2"),
        (
            {"attention": "differential", "attention_options": {"lambda_init": 0.8}},
            "diff_llama",
            "attention_options['lambda_init'] is 0.8: DiffLlamaForCausalLM has 'depth'",
        ),
        (
            {"attention": "differential", "rms_norm_eps": 1e-6},
            "diff_llama",
            "attention_options['norm_eps'] is 1e-05",
        ),
        ({}, "mistral", "'mistral' can be read only"),
        ({}, "lama", "did you mean 'llama'?"),
    ],
)  # fmt: skip
def test_a_target_that_cannot_be(tmp_path: Path, settings: dict[str, Any], to: str, words: str) -> None:
    refused(ours(tmp_path / "ours", **settings), tmp_path / "out", words, to=to)


def test_attention_that_cannot_be(llama: Path, tmp_path: Path) -> None:
    odd = ours(tmp_path / "odd", num_attention_heads=3, num_key_value_heads=3)
    refused(odd, tmp_path / "out", "so num_attention_heads must be even, not 3", attention="differential")
    v2 = ours(tmp_path / "v2", attention="differential_v2")
    refused(v2, tmp_path / "out", "can be given to softmax models only", attention="collinear")
    with pytest.raises(ValueError, match="did you mean 'collinear'"):
        convert(str(llama), tmp_path / "out", attention="colinear")


def test_odd_heads_in_a_diff_llama(tmp_path: Path) -> None:
    theirs = ours(tmp_path / "theirs", num_attention_heads=9, num_key_value_heads=9, hidden_size=36)
    configured(theirs, model_type="diffllama", architectures=["DiffLlamaForCausalLM"])
    refused(theirs, tmp_path / "out", "so num_attention_heads must be even, not 9")


def test_damaged_files(copy: Path, tmp_path: Path) -> None:
    file = copy / "model.safetensors"
    content = file.read_bytes()
    for damaged, words in (
        (content[:-100], "it is incomplete; get it again"),
        (content[:200], "is not a safetensors file, or damaged"),
        (b"\xff" * 64, "is not a safetensors file, or damaged"),
        (b"", "is not a safetensors file, or damaged"),
        (content[:8] + b"?" + content[9:], "is not a safetensors file, or damaged"),
    ):
        file.write_bytes(damaged)
        refused(copy, tmp_path / "out", words)
    file.write_bytes(content)
    (copy / "config.json").write_text("{")
    refused(copy, tmp_path / "out", "config.json' cannot be read")


def test_weights_that_are_not_there(copy: Path, tmp_path: Path) -> None:
    (copy / "model.safetensors").rename(copy / "pytorch_model.bin")
    refused(copy, tmp_path / "out", "has its weights in a pickle (pytorch_model.bin), which can run any code")
    refused(copy / "pytorch_model.bin", tmp_path / "out", "safetensors.torch.save_file")
    (copy / "pytorch_model.bin").unlink()
    refused(copy, tmp_path / "out", "holds no weights (no model.safetensors)")
    refused(tmp_path / "nowhere", tmp_path / "out", "there is no model at")
    with pytest.raises(ValueError, match="there is no GGUF file"):
        convert(str(tmp_path / "nowhere.gguf"), tmp_path / "out")
    (copy / "model.safetensors.index.json").write_text('{"weight_map": {"a": "one.safetensors"}}')
    refused(copy, tmp_path / "out", "names 'one.safetensors', which is not there")


def test_quantised_tensors(copy: Path, tmp_path: Path) -> None:
    weights = tensors(copy)
    name = "model.layers.0.mlp.up_proj.weight"
    weights[name] = weights[name].to(torch.float8_e4m3fn)
    save_file(weights, copy / "model.safetensors")
    refused(copy, tmp_path / "out", "in float8_e4m3fn: quantised weights cannot be converted")


def test_a_file_of_microsoft_s_attention_alone(tmp_path: Path) -> None:
    bare = {"q_proj.weight": torch.ones(8, 8), "subln.weight": torch.ones(4), "lambda_q1": torch.ones(2)}
    save_file(
        {f"layers.0.self_attn.{name}": value for name, value in bare.items()}, tmp_path / "m.safetensors"
    )
    refused(
        tmp_path / "m.safetensors", tmp_path / "out", "is expected inside LLaMA's decoder, under its names"
    )


def test_logits_that_do_not_agree(llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A converter with a wrong permutation is found out on text, and so are weights that are not numbers."""
    from clearhead.convert import diff_llama

    source = ours(tmp_path / "v1", attention="differential")
    monkeypatch.setattr(diff_llama, "stripes_to_chunks", lambda rows, heads: rows)
    refused(source, tmp_path / "out", "the logits of the result differ", to="diff_llama")
    weights = tensors(llama)
    weights["model.norm.weight"][3] = float("nan")
    shutil.copytree(llama, tmp_path / "nan")
    save_file(weights, tmp_path / "nan/model.safetensors")
    refused(tmp_path / "nan", tmp_path / "out", "the logits of the result differ from the source's by nan")


def test_an_output_that_is_there(llama: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    with pytest.raises(ConversionError, match="exists already; choose another --out"):
        convert(str(llama), tmp_path / "out")
    assert not list((tmp_path / "out").iterdir())
    (tmp_path / "file").write_text("")
    refused(llama, tmp_path / "file" / "out", "cannot write to")


def test_no_space(llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(run.shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10, 9, 1))  # type: ignore[attr-defined]
        refused(llama, tmp_path / "out", "the result needs 17 MB of disk but only 0 MB are free in")

    def full(*arguments: Any) -> Any:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        # Not even for the lock.
        patch.setattr("clearhead.runs.lock.os.getpid", full)
        refused(llama, tmp_path / "new/out", "no space is left for")
        assert not (tmp_path / "new").exists()
    monkeypatch.setattr(run, "write_weights", full)
    refused(llama, tmp_path / "out", "no space is left for")


def test_an_interruption_leaves_nothing_and_the_same_command_works(
    llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*arguments: Any) -> Any:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(run, "_check", interrupted)
        with pytest.raises(KeyboardInterrupt):
            convert(str(llama), tmp_path / "out")
    assert nothing_left(tmp_path / "out")
    # Killed outright it leaves a partial directory, which the next call takes over.
    part = tmp_path / ".out.partial"
    (part / "deep").mkdir(parents=True)
    (part / "model-00001-of-00002.safetensors").write_bytes(b"half")
    with exclusive(part, "this"), pytest.raises(ValueError, match="in use by another clearhead process"):
        convert(str(llama), tmp_path / "out")
    convert(str(llama), tmp_path / "out")
    assert not part.exists()
    names = {file.name for file in (tmp_path / "out").iterdir()}
    weights = {"config.json", "generation_config.json", "model.safetensors", "modeling_clearhead.py"}
    assert names == {"conversion.json", *weights}


def test_the_command_says_it_in_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(
        sys, "argv", ["clearhead", "convert", str(tmp_path / "x"), "--out", str(tmp_path / "y")]
    )
    with pytest.raises(SystemExit) as end:
        main()
    assert end.value.code == 2
    out, errors = capsys.readouterr()
    assert out == "" and len(errors.strip().splitlines()) == 1 and "there is no model at" in errors

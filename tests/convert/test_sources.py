"""Where weights come from and what goes with them: shards, one file, GGUF, tokenizer, settings, licence, sums."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM
from typer.testing import CliRunner

from clearhead.cli.main import app
from clearhead.convert.run import convert
from clearhead.convert.weights import FileWeights
from tests.convert.support import IDS, SIZES, ours, same_bits, save, tensors
from tests.evals import tiny
from tests.evals.test_gguf import write


def test_shards_in_and_out(tmp_path: Path) -> None:
    config = LlamaConfig(num_key_value_heads=4, **SIZES)
    theirs = save(tmp_path / "theirs", LlamaForCausalLM(config), max_shard_size="20KB")
    assert (theirs / "model.safetensors.index.json").exists()
    convert(str(theirs), tmp_path / "ours", shard_bytes=15_000)
    files = sorted(tmp_path.glob("ours/*.safetensors"))
    assert len(files) > 2 and files[0].name == f"model-00001-of-{len(files):05}.safetensors"
    assert same_bits(theirs, tmp_path / "ours")
    with torch.no_grad():
        model = AutoModelForCausalLM.from_pretrained(tmp_path / "ours")
        assert (
            float((model(IDS).logits - LlamaForCausalLM.from_pretrained(theirs)(IDS).logits).abs().max())
            < 1e-5
        )
    record = json.loads((tmp_path / "ours/conversion.json").read_text())
    for folder, sums in ((theirs, record["source"]["files"]), (tmp_path / "ours", record["result"]["files"])):
        assert {file.name for file in folder.glob("*.safetensors")} <= set(sums)
        for name, found in sums.items():
            assert hashlib.sha256((folder / name).read_bytes()).hexdigest() == found


def test_files_are_written_as_safetensors_reads_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Numbers of two widths in one file, aligned; blocks of rows are the rows."""
    source = ours(tmp_path / "ours", torch.bfloat16, attention="differential")
    weights = {n: value.float() if "lambda" in n else value for n, value in tensors(source).items()}
    save_file(weights, source / "model.safetensors")
    monkeypatch.setattr("clearhead.convert.weights.BLOCK", 512)
    convert(str(source), tmp_path / "out")
    assert same_bits(source, tmp_path / "out")
    assert weights["model.layers.0.self_attn.variant.lambda_q1"].dtype == torch.float32
    read = FileWeights([tmp_path / "out/model.safetensors"])
    for name, value in load_file(tmp_path / "out/model.safetensors").items():
        blocks = list(read.blocks(name))
        assert torch.equal(read.read(name), value) and torch.equal(torch.cat(blocks), value)
        assert all(block.numel() * block.itemsize <= 512 for block in blocks)
    name = "model.embed_tokens.weight"
    assert torch.equal(read.take(name, [5, 0, 5]), weights[name][[5, 0, 5]])


def test_tokenizer_settings_and_licence_go_along(tmp_path: Path) -> None:
    theirs = tiny.save(tmp_path / "theirs")
    (theirs / "LICENSE").write_text("Apache License")
    (theirs / "README.md").write_text("about the source")
    (theirs / "generation_config.json").write_text(
        '{"eos_token_id": [2, 7], "temperature": 0.5, "do_sample": true}'
    )
    # A tokenizer whose class only the model type named.
    file = theirs / "tokenizer_config.json"
    settings = json.loads(file.read_text())
    settings.pop("tokenizer_class")
    file.write_text(json.dumps(settings))
    convert(str(theirs), tmp_path / "ours")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "ours")
    assert model.generation_config.eos_token_id == [2, 7] and model.generation_config.temperature == 0.5
    text = "The grass is green."
    before, after = (AutoTokenizer.from_pretrained(f) for f in (theirs, tmp_path / "ours"))
    assert before.encode(text) == after.encode(text)
    assert (tmp_path / "ours/LICENSE").read_text() == "Apache License"
    assert not (tmp_path / "ours/README.md").exists(), "a card speaks of one model"


def test_a_gguf_file(tmp_path: Path) -> None:
    words = tiny.tokenizer()
    model = write(tmp_path / "m.gguf", tiny.llama(len(words), intermediate_size=64), words)
    agreement = convert(str(tmp_path / "m.gguf"), tmp_path / "ours")
    assert agreement.difference <= 1e-10
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "ours")
    ids = torch.tensor([words.encode("The grass is green")])
    with torch.no_grad():
        assert float((loaded(ids).logits - model(ids).logits).abs().max()) <= 1e-5
    found = AutoTokenizer.from_pretrained(tmp_path / "ours")
    assert found.encode("The sky is blue", add_special_tokens=False) == words.encode("The sky is blue")
    record = json.loads((tmp_path / "ours/conversion.json").read_text())
    assert "dequantised to float32 from" in record["source"]["note"]


def test_what_carries_nothing_is_left_behind(tmp_path: Path) -> None:
    theirs = save(tmp_path / "theirs", LlamaForCausalLM(LlamaConfig(tie_word_embeddings=True, **SIZES)))
    weights = tensors(theirs)
    weights["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(2)
    weights["lm_head.weight"] = weights["model.embed_tokens.weight"].clone()
    save_file(weights, theirs / "model.safetensors")
    convert(str(theirs), tmp_path / "ours")
    assert set(tensors(tmp_path / "ours")) == set(weights) - {
        "lm_head.weight",
        "model.layers.0.self_attn.rotary_emb.inv_freq",
    }


def test_the_command_line(tmp_path: Path) -> None:
    job = tmp_path / "job"
    ours(job / "model", attention="differential")
    done = CliRunner().invoke(
        app, ["convert", str(job), "--out", str(tmp_path / "out"), "--to", "diff_llama"]
    )
    assert done.exit_code == 0, done.output
    assert "the same function: largest difference of logits" in done.output
    assert type(AutoModelForCausalLM.from_pretrained(tmp_path / "out")).__name__ == "DiffLlamaForCausalLM"


def test_a_repository_of_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    theirs = save(tmp_path / "snapshot", LlamaForCausalLM(LlamaConfig(**SIZES)))
    asked: list[str] = []

    def download(name: str, allow_patterns: list[str]) -> str:
        asked.append(name)
        assert "*.bin" not in allow_patterns
        return str(theirs)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    convert("owner/model", tmp_path / "ours")
    assert asked == ["owner/model"] and same_bits(theirs, tmp_path / "ours")
    record = json.loads((tmp_path / "ours/conversion.json").read_text())
    assert record["source"]["name"] == "owner/model"

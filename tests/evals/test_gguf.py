"""GGUF files: the weights that were written come out again, and every file that cannot be read says why."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType, GGUFWriter
from gguf.quants import dequantize, quantize
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast
from typer.testing import CliRunner

from clearhead.cli.main import app
from clearhead.evals.runner import evaluate_external
from clearhead.evals.subjects.external import ExternalLoader, ExternalSpec, is_external
from clearhead.evals.subjects.gguf import open_gguf
from clearhead.report.build import build_report
from clearhead.runs.results import load_run
from tests.evals import tiny

NAMES = {
    "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down", "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm",
}  # fmt: skip
ENDS = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
TEXT = "The grass is green and the sky is blue; 0123456789 keys.\n"


def called(name: str) -> str:
    """``model.layers.0.mlp.up_proj.weight`` in llama.cpp's words."""
    stem = name.removesuffix(".weight")
    if stem in ENDS:
        return f"{ENDS[stem]}.weight"
    layer, part = stem.removeprefix("model.layers.").split(".", 1)
    return f"blk.{layer}.{NAMES[part]}.weight"


def interleaved(weight: np.ndarray, heads: int) -> np.ndarray:
    """Rows in llama.cpp's order: it rotates neighbours, Hugging Face the two halves of a head."""
    return weight.reshape(heads, 2, -1, weight.shape[1]).swapaxes(1, 2).reshape(weight.shape)


def separated(weight: np.ndarray, heads: int) -> np.ndarray:
    return weight.reshape(heads, -1, 2, weight.shape[1]).swapaxes(1, 2).reshape(weight.shape)


def write(
    path: Path,
    model: LlamaForCausalLM,
    words: PreTrainedTokenizerFast,
    *,
    architecture: str = "llama",
    leave_out: str = "",
    scaling: bool = False,
) -> LlamaForCausalLM:
    """Write ``model`` with matrices in Q8_0; returns it with the weights that are in the file."""
    config = model.config
    writer = GGUFWriter(path, architecture)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_rope_dimension_count(config.head_dim)
    spelled = json.loads(words.backend_tokenizer.to_str())["model"]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(words.convert_ids_to_tokens(range(len(words))))
    writer.add_token_types([3 if i in words.all_special_ids else 1 for i in range(len(words))])
    writer.add_token_merges([" ".join(pair) for pair in spelled["merges"]])
    writer.add_bos_token_id(words.bos_token_id)
    writer.add_eos_token_id(words.eos_token_id)
    if scaling:
        writer.add_tensor("rope_freqs.weight", np.full(config.head_dim // 2, 8.0, np.float32))
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
    kept = {}
    for name, tensor in model.state_dict().items():
        count = next((n for part, n in heads.items() if part in name), None)
        raw = tensor.numpy() if count is None else interleaved(tensor.numpy(), count)
        plain = raw.ndim == 1
        if not leave_out or leave_out not in name:
            packed = raw if plain else quantize(raw, GGMLQuantizationType.Q8_0)
            kind = None if plain else GGMLQuantizationType.Q8_0
            writer.add_tensor(called(name), packed, raw_dtype=kind)
            raw = raw if plain else dequantize(packed, GGMLQuantizationType.Q8_0)
        kept[name] = torch.from_numpy(np.copy(raw if count is None else separated(raw, count)))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    model.load_state_dict(kept)
    return model


@pytest.fixture(scope="module")
def words() -> PreTrainedTokenizerFast:
    return tiny.tokenizer()


def llama(words: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    return tiny.llama(len(words), intermediate_size=64, tie_word_embeddings=False, rope_theta=500.0)


@pytest.fixture(scope="module")
def both(tmp_path_factory: pytest.TempPathFactory, words: PreTrainedTokenizerFast) -> tuple[Path, Path]:
    """The file, and a directory with the same weights."""
    folder = tmp_path_factory.mktemp("gguf")
    model = write(folder / "Tiny-1.Q8_0.gguf", llama(words), words)
    # What lies beside a file is not its own.
    (folder / "tokenizer_config.json").write_text('{"model_max_length": 3, "bos_token": "grass"}')
    return folder / "Tiny-1.Q8_0.gguf", tiny.save(folder / "same", model, tokenizer=words)


def test_a_file_gives_the_numbers_of_its_weights(
    both: tuple[Path, Path], words: PreTrainedTokenizerFast
) -> None:
    file, folder = both
    found = ExternalLoader(ExternalSpec(str(file)))
    theirs = ExternalLoader(ExternalSpec(str(folder)))
    assert found.spec.name == "Tiny-1.Q8_0" and is_external(str(file)) and found.training_length == 16
    ids = words(TEXT * 3, return_tensors="pt")["input_ids"]
    assert found.subject.tokenizer(TEXT * 3)["input_ids"] == ids[0].tolist()
    # transformers makes an <|endoftext|> up and puts it behind the vocabulary.
    assert len(found.subject.tokenizer) == len(words) == found.subject.model.config.vocab_size  # type: ignore[arg-type]
    assert found.tokenizer.bos_token == words.bos_token and found.tokenizer.model_max_length > 10**6
    with torch.inference_mode():
        ours, same = found.subject.model(ids).logits, theirs.subject.model(ids).logits
        exact = theirs.subject.model.double()(ids).logits
    # One product in another order is all that may differ.
    assert (ours - exact).abs().max() <= 2 * (same - exact).abs().max() + 1e-6 * exact.abs().max()
    assert found.subject.model.dtype == torch.float32
    # It is a model like any other: it can be made anew and be saved.
    assert sum(p.numel() for p in found.subject.untrained().parameters()) == sum(
        p.numel() for p in found.subject.model.parameters()
    )
    found.subject.model.save_pretrained(folder.parent / "again")


def test_it_is_evaluated_reported_and_gone_on_with(both: tuple[Path, Path], tmp_path: Path) -> None:
    file, _ = both
    corpus = tmp_path / "text.txt"
    corpus.write_text(TEXT * 12)
    arguments = ["evaluate", str(file), "--corpus", str(corpus), "--suite", "perplexity"]
    options = ["--set", "lengths=[16]", "--set", "max_documents=1", "--out", str(tmp_path / "run")]
    done = CliRunner().invoke(app, [*arguments, *options])
    assert done.exit_code == 0, done.output
    results = load_run(tmp_path / "run")
    assert [arm.name for arm in results.arms] == ["Tiny-1.Q8_0"]
    told = "dequantised to float32 from 16 Q8_0 and 5 F32 tensors"
    assert told in results.recipe["description"] and told in build_report(tmp_path / "run").read_text()
    again = CliRunner().invoke(
        app, ["evaluate", str(tmp_path / "run"), "--suite", "initial_angles", "--set", "documents=1"]
    )
    assert again.exit_code == 0, again.output
    assert sorted(path.stem for path in tmp_path.glob("run/arms/*/seed-0/results/*.json")) == [
        "initial_angles",
        "perplexity",
    ]
    spec, done_before = ExternalSpec(str(file), str(corpus)), {"initial_angles": {"documents": 1}}
    assert evaluate_external(spec, tmp_path / "run", ["initial_angles"], options=done_before) == []


def refused(path: Path, tmp_path: Path) -> str:
    with pytest.raises(ValueError) as error:
        evaluate_external(ExternalSpec(str(path)), tmp_path / "run", ["initial_angles"])
    assert not (tmp_path / "run").exists() and "\n" not in str(error.value)
    return str(error.value)


def test_what_cannot_be_read_says_why(
    both: tuple[Path, Path],
    words: PreTrainedTokenizerFast,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert "there is no GGUF file" in refused(tmp_path / "none.gguf", tmp_path)
    (tmp_path / "page.gguf").write_text("<!doctype html>")
    assert "does not begin with 'GGUF'" in refused(tmp_path / "page.gguf", tmp_path)
    (tmp_path / "half.gguf").write_bytes(both[0].read_bytes()[:600])
    assert "damaged" in refused(tmp_path / "half.gguf", tmp_path)
    (tmp_path / "short.gguf").write_bytes(both[0].read_bytes()[:-5000])
    assert "ends before its tensors do" in refused(tmp_path / "short.gguf", tmp_path)
    write(tmp_path / "new.gguf", llama(words), words, architecture="brandnew")
    message = refused(tmp_path / "new.gguf", tmp_path)
    assert "architecture 'brandnew'" in message and "original model's directory" in message
    write(tmp_path / "scaled.gguf", llama(words), words, scaling=True)
    assert "rotary scaling (rope_freqs.weight)" in refused(tmp_path / "scaled.gguf", tmp_path)
    write(tmp_path / "holes.gguf", llama(words), words, leave_out="layers.1.mlp.up_proj")
    with pytest.raises(ValueError, match=r"1 weights are not in the file, 'model\.layers\.1\.mlp\.up_proj"):
        assert ExternalLoader(ExternalSpec(str(tmp_path / "holes.gguf"))).subject
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert "pip install 'clearhead[gguf]'" in refused(both[0], tmp_path)


def test_types_are_counted(both: tuple[Path, Path]) -> None:
    found = open_gguf(both[0])
    assert found.types == {"Q8_0": 16, "F32": 5} and found.architecture == "llama" and found.scaling is None

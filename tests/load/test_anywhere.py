"""A saved directory is loaded by whatever knows transformers alone: asked of processes that import nothing else."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM

from clearhead.convert.run import convert
from clearhead.models import ClearheadConfig, ClearheadForCausalLM
from clearhead.models.autoload import FAMILIES, MODULE_FILE, auto_map, module_text
from tests.contracts.encoder_cases import make_encoder
from tests.contracts.seq2seq_cases import make_seq2seq
from tests.evals import tiny

AUTO_MAP = auto_map("clearhead")

READER = """
import sys, torch
import transformers
from safetensors.torch import load_file, save_file
out, *folders = sys.argv[1:]
ids = load_file(out + "/ids.safetensors")["ids"]
trust = {"trust_remote_code": True}
assert not any(name.partition(".")[0] == "clearhead" for name in sys.modules)
found = {}
for index, folder in enumerate(folders):
    for name in ("Model", "ModelForCausalLM"):
        model = getattr(transformers, "Auto" + name).from_pretrained(folder, **trust)
        with torch.no_grad():
            found[f"{index}{name}"] = model(ids)[0].contiguous()
for name in ("SequenceClassification", "TokenClassification", "QuestionAnswering"):
    model = getattr(transformers, "AutoModelFor" + name).from_pretrained(folders[0], **trust)
    found[name] = model.model.layers[0].mlp.up_proj.weight.detach().clone()
    assert type(model).__name__ == "ClearheadFor" + name
pipe = transformers.pipeline("text-generation", model=folders[0], **trust)
text = pipe("The grass", max_new_tokens=4, do_sample=False, return_full_text=False)[0]["generated_text"]
found["text"] = torch.tensor(list(text.encode()))
save_file(found, out + "/found.safetensors")
"""


def alone(code: str, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """`code` in a process of its own; remote code is copied to a folder of the test's."""
    return subprocess.run(
        [sys.executable, "-c", code, *arguments],
        capture_output=True,
        text=True,
        env={**os.environ, "HF_HUB_OFFLINE": "1", "TQDM_DISABLE": "1", **environment},
        stdin=subprocess.DEVNULL,
    )


@torch.no_grad()
def test_every_auto_class_and_a_pipeline_in_a_process_that_imports_nothing(tmp_path: Path) -> None:
    saved = tiny.save(tmp_path / "saved", tiny.ours(attention="differential", pad_token_id=0, eos_token_id=2))
    convert(str(saved), tmp_path / "converted")
    model = ClearheadForCausalLM.from_pretrained(saved)
    ids = torch.tensor([[5, 9, 260, 33, 7]])
    save_file({"ids": ids}, tmp_path / "ids.safetensors")
    done = alone(
        READER, str(tmp_path), str(saved), str(tmp_path / "converted"), HF_MODULES_CACHE=str(tmp_path / "m")
    )
    assert done.returncode == 0, done.stderr[-2000:]
    found = load_file(tmp_path / "found.safetensors")
    for index in "01":
        assert torch.equal(found[f"{index}ModelForCausalLM"], model(ids).logits)
        assert torch.equal(found[f"{index}Model"], model.model(ids).last_hidden_state)
    for name in ("SequenceClassification", "TokenClassification", "QuestionAnswering"):
        assert torch.equal(found[name], model.model.layers[0].mlp.up_proj.weight)
    words = tiny.tokenizer()
    given = words("The grass", return_tensors="pt")["input_ids"]
    expected = words.decode(model.generate(given, max_new_tokens=4, do_sample=False)[0, given.shape[1] :])
    assert bytes(found["text"].tolist()).decode() == expected


ENCODER_READER = """
import sys, torch
import transformers
from safetensors.torch import load_file, save_file
out, folder = sys.argv[1:]
ids = load_file(out + "/ids.safetensors")["ids"]
trust = {"trust_remote_code": True}
assert not any(name.partition(".")[0] == "clearhead" for name in sys.modules)
found = {}
for name in ("Model", "ModelForMaskedLM"):
    model = getattr(transformers, "Auto" + name).from_pretrained(folder, **trust)
    with torch.no_grad():
        found[name] = model(ids)[0].contiguous()
for name in ("SequenceClassification", "TokenClassification", "QuestionAnswering", "MultipleChoice"):
    model = getattr(transformers, "AutoModelFor" + name).from_pretrained(folder, **trust)
    found[name] = model.head.dense.weight.detach().clone()
    assert type(model).__name__ == "ClearheadEncoderFor" + name
pipe = transformers.pipeline("fill-mask", model=folder, **trust)
(best, *_) = pipe("The gr" + pipe.tokenizer.mask_token + "ss", top_k=3)
found["token"] = torch.tensor([best["token"]])
save_file(found, out + "/found.safetensors")
"""


@torch.no_grad()
def test_every_auto_class_of_an_encoder_and_its_pipeline(tmp_path: Path) -> None:
    words = tiny.tokenizer()
    words.add_special_tokens({"mask_token": "<mask>"})
    model = make_encoder("differential", vocab_size=len(words), pad_token_id=None)
    saved = tiny.save(tmp_path / "saved", model, tokenizer=words)
    ids = torch.tensor([[5, 9, 26, 33, 7]])
    save_file({"ids": ids}, tmp_path / "ids.safetensors")
    done = alone(ENCODER_READER, str(tmp_path), str(saved), HF_MODULES_CACHE=str(tmp_path / "m"))
    assert done.returncode == 0, done.stderr[-2000:]
    found = load_file(tmp_path / "found.safetensors")
    assert torch.equal(found["ModelForMaskedLM"], model(ids).logits)
    assert torch.equal(found["Model"], model.model(ids).last_hidden_state)
    for name in ("SequenceClassification", "TokenClassification", "QuestionAnswering", "MultipleChoice"):
        assert torch.equal(found[name], model.head.dense.weight)
    given = words("The gr<mask>ss", return_tensors="pt")["input_ids"]
    (where,) = (given[0] == words.mask_token_id).nonzero().flatten().tolist()
    assert found["token"].item() == model(given).logits[0, where].argmax().item()
    assert (saved / MODULE_FILE).read_text() == module_text("clearhead_encoder")


SEQ2SEQ_READER = """
import sys, torch
import transformers
from safetensors.torch import load_file, save_file
out, folder = sys.argv[1:]
given = load_file(out + "/ids.safetensors")
trust = {"trust_remote_code": True}
assert not any(name.partition(".")[0] == "clearhead" for name in sys.modules)
found = {}
for name in ("Model", "ModelForSeq2SeqLM"):
    model = getattr(transformers, "Auto" + name).from_pretrained(folder, **trust)
    with torch.no_grad():
        found[name] = model(given["source"], decoder_input_ids=given["target"])[0].contiguous()
found["generated"] = model.generate(given["source"], max_new_tokens=5, do_sample=False, num_beams=2)
save_file(found, out + "/found.safetensors")
"""


@torch.no_grad()
def test_every_auto_class_of_an_encoder_decoder(tmp_path: Path) -> None:
    model = make_seq2seq("differential_v2_collinear", cross_position="rope")
    model.save_pretrained(tmp_path / "saved")
    source, target = torch.tensor([[5, 9, 26, 33, 7]]), torch.tensor([[1, 4, 8]])
    save_file({"source": source, "target": target}, tmp_path / "ids.safetensors")
    done = alone(SEQ2SEQ_READER, str(tmp_path), str(tmp_path / "saved"), HF_MODULES_CACHE=str(tmp_path / "m"))
    assert done.returncode == 0, done.stderr[-2000:]
    found = load_file(tmp_path / "found.safetensors")
    assert torch.equal(found["ModelForSeq2SeqLM"], model(source, decoder_input_ids=target).logits)
    states = model.model(source, decoder_input_ids=target).last_hidden_state
    assert torch.equal(found["Model"], states)
    generated = model.generate(source, max_new_tokens=5, do_sample=False, num_beams=2)
    assert torch.equal(found["generated"], generated)
    assert (tmp_path / "saved" / MODULE_FILE).read_text() == module_text("clearhead_seq2seq")


def test_the_module_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "clearhead.models")
    monkeypatch.delitem(sys.modules, "clearhead")
    monkeypatch.setattr(sys, "meta_path", [])
    with pytest.raises(
        ImportError, match=r"needs the package clearhead, which is not installed: pip install clearhead$"
    ):
        exec(module_text("clearhead"), {})


def test_the_module_says_that_the_package_is_too_old(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr("clearhead.models.ClearheadForTokenClassification")
    with pytest.raises(ImportError, match=r"newer clearhead .*: pip install --upgrade clearhead"):
        exec(module_text("clearhead"), {})


def test_only_what_is_written_names_the_module(tmp_path: Path) -> None:
    """In memory a configuration has it for those that ask, and is otherwise what it was."""
    config = ClearheadConfig(num_hidden_layers=1)
    config.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["auto_map"] == AUTO_MAP
    assert (tmp_path / MODULE_FILE).read_text() == module_text("clearhead")
    read = AutoConfig.from_pretrained(tmp_path, trust_remote_code=True)
    assert type(read) is ClearheadConfig and read._auto_class is None
    for each in (config, read):
        assert "auto_map" not in each.to_dict() and each.auto_map == AUTO_MAP


def test_with_the_package_imported_remote_code_is_not_looked_at(tmp_path: Path) -> None:
    tiny.ours().save_pretrained(tmp_path)
    (tmp_path / MODULE_FILE).write_text("raise AssertionError")
    for trust in (None, True, False):
        found = AutoModelForCausalLM.from_pretrained(tmp_path, trust_remote_code=trust)
        assert type(found) is ClearheadForCausalLM


def test_registering_before_saving_changes_nothing_for_own_classes_and_all_for_others(tmp_path: Path) -> None:
    ClearheadConfig.register_for_auto_class()
    ClearheadForCausalLM.register_for_auto_class("AutoModelForCausalLM")
    tiny.ours().save_pretrained(tmp_path / "own")
    assert json.loads((tmp_path / "own/config.json").read_text())["auto_map"] == AUTO_MAP
    assert not [*(tmp_path / "own").glob("causal*"), *(tmp_path / "own").glob("config.py")]

    class Mine(ClearheadForCausalLM):
        pass

    Mine.register_for_auto_class("AutoModelForCausalLM")
    Mine(ClearheadConfig(num_hidden_layers=1, hidden_size=32, vocab_size=8)).save_pretrained(
        tmp_path / "mine"
    )
    written = json.loads((tmp_path / "mine/config.json").read_text())["auto_map"]
    assert written == AUTO_MAP | {"AutoModelForCausalLM": "test_anywhere.Mine"}
    assert ClearheadConfig.from_pretrained(tmp_path / "mine").to_dict()["auto_map"] == {
        "AutoModelForCausalLM": "test_anywhere.Mine"
    }


def test_tools_find_the_classes_by_name() -> None:
    """`transformers serve` and TRL look in the namespace of transformers, pipelines in the tables of names."""
    import transformers
    import transformers.processing_utils

    import clearhead.models

    held = clearhead.models.transformers
    # The two may differ: transformers makes its top module anew once its processors are loaded.
    for classes in FAMILIES.values():
        for auto, name in classes.items():
            for module in (held, transformers):
                assert getattr(module, name) is getattr(clearhead.models, name), auto

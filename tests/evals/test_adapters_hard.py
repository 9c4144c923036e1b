"""Adapters that are damaged, of another model or of another kind: one sentence, and never the base's numbers alone."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from clearhead.evals.subjects.adapters import base_of, is_adapter, merged
from clearhead.evals.subjects.external import reopened
from tests.evals import tiny

peft = pytest.importorskip("peft")


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("adapter")
    config = peft.LoraConfig(task_type="CAUSAL_LM", r=2, target_modules=["q_proj"], init_lora_weights=False)
    peft.get_peft_model(tiny.ours(), config).save_pretrained(folder)
    return folder


@pytest.fixture
def adapter(saved: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(saved, tmp_path / "adapter"))


def changed(folder: Path, **values: Any) -> None:
    file = folder / "adapter_config.json"
    file.write_text(
        json.dumps({**json.loads(file.read_text()), "base_model_name_or_path": "the-base", **values})
    )


def refused(folder: Path, said: str, model: Any = None) -> None:
    with pytest.raises(ValueError, match=said) as caught:
        merged(model or tiny.ours(), folder)
    assert "\n" not in str(caught.value) and str(folder) in str(caught.value)


def test_weights_that_are_missing_or_left_over_are_refused(adapter: Path) -> None:
    changed(adapter)
    file = adapter / "adapter_model.safetensors"
    weights = load_file(file)
    fewer = {key: value for key, value in weights.items() if "layers.1." not in key}
    save_file(fewer, file)
    refused(adapter, "does not fit 'the-base': Found missing adapter keys")
    more = {
        key.replace("layers.1.", "layers.9."): value.clone()
        for key, value in weights.items()
        if "layers.1." in key
    }
    save_file({**weights, **more}, file)
    refused(adapter, r"2 of its weights have no place there, .*layers\.9")
    save_file(weights, file)
    ids = torch.arange(3, 30)[None]
    with torch.no_grad():
        assert (merged(tiny.ours(), adapter)(ids).logits - tiny.ours()(ids).logits).abs().max() > 1e-3


def test_a_file_cut_short_is_refused(adapter: Path) -> None:
    changed(adapter)
    file = adapter / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:200])
    refused(adapter, "does not fit 'the-base'")


@pytest.mark.parametrize("text", ["{", "[]", "[" * 100_000, '{"r": ' + "9" * 5000 + "}"])
def test_a_configuration_that_cannot_be_read_is_named(text: str, adapter: Path) -> None:
    (adapter / "adapter_config.json").write_text(text)
    with pytest.raises(ValueError, match=r"adapter_config\.json' .*get the adapter again"):
        base_of(adapter)


def test_an_adapter_that_is_no_change_of_weights_is_named(tmp_path: Path) -> None:
    config = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)
    peft.get_peft_model(tiny.llama(), config).save_pretrained(tmp_path / "prompt")
    changed(tmp_path / "prompt")
    refused(tmp_path / "prompt", "of the type PROMPT_TUNING, which cannot be merged", tiny.llama())


def test_a_bases_configuration_beside_it_makes_no_model_of_it(adapter: Path) -> None:
    (adapter / "config.json").write_text("{}")
    assert is_adapter(adapter)
    (adapter / "model.safetensors").touch()
    assert not is_adapter(adapter)


@pytest.mark.parametrize("told", [{"model": "m", "more": 1}, {"corpus": "x"}, {"model": None}])
def test_a_run_that_does_not_say_what_it_evaluated_is_named(told: Any, tmp_path: Path) -> None:
    file = tmp_path / "arms/m/seed-0/subject.json"
    file.parent.mkdir(parents=True)
    file.write_text(json.dumps(told))
    with pytest.raises(ValueError, match=r"subject\.json does not say what was evaluated"):
        reopened(tmp_path)

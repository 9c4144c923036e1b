"""A LoRA adapter's directory is evaluated with its base, or named for what it is."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from clearhead.evals.subjects.adapters import base_of, is_adapter, merged
from clearhead.evals.subjects.external import ExternalLoader, ExternalSpec, is_external
from tests.evals import tiny

peft = pytest.importorskip("peft")


@pytest.fixture(params=["ours", "llama"])
def adapter(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[Path, Any]:
    """A saved adapter, and the model with it merged in as PEFT does."""
    base = getattr(tiny, request.param)()
    base.save_pretrained(tmp_path / "base")
    tiny.tokenizer().save_pretrained(tmp_path / "base")
    options = {"r": 2, "target_modules": ["q_proj", "v_proj"], "init_lora_weights": False}
    model = peft.get_peft_model(base, peft.LoraConfig(task_type="CAUSAL_LM", **options))
    folder = tmp_path / "adapter"
    model.save_pretrained(folder)
    written = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(
        json.dumps({**written, "base_model_name_or_path": str(tmp_path / "base")})
    )
    return folder, model.merge_and_unload()


def test_it_is_merged_into_its_base(adapter: tuple[Path, Any]) -> None:
    folder, expected = adapter
    assert is_adapter(folder) and is_external(str(folder))
    loader = ExternalLoader(ExternalSpec(str(folder)))
    ids = torch.arange(3, 40)[None]
    with torch.no_grad():
        found = loader.subject.model(ids).logits
        assert torch.allclose(found, expected.eval()(ids).logits, atol=1e-5)
    assert "an adapter, merged into" in loader.description
    assert loader.tokenizer.encode("the sky") == tiny.tokenizer().encode("the sky")


def test_what_is_wrong_with_it_is_said(
    adapter: tuple[Path, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, _ = adapter
    with pytest.raises(ValueError, match="does not fit"):
        merged(tiny.gpt2(), folder)
    found = importlib.util.find_spec
    with monkeypatch.context() as patch:
        patch.setattr("importlib.util.find_spec", lambda name: None if name == "peft" else found(name))
        with pytest.raises(ValueError, match=r"needs peft: pip install 'clearhead\[adapters\]'"):
            merged(None, folder)
    (folder / "adapter_model.safetensors").rename(folder / "adapter_model.bin")
    with pytest.raises(ValueError, match="pickled weights are not loaded"):
        merged(tiny.llama(), folder)
    (folder / "adapter_config.json").write_text("{}")
    with pytest.raises(ValueError, match="names no base model"):
        base_of(folder)

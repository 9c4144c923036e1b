"""A model that is pushed takes its card along: asked of transformers' own upload, with a hub that is not there."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from huggingface_hub import ModelCard
from huggingface_hub.errors import EntryNotFoundError
from transformers.utils import hub

from clearhead.models import ClearheadForCausalLM
from clearhead.report.card import write_card
from tests.convert.support import ours

PERSONS = "---\nlicense: mit\n---\n# Mine\n"


class NoHub:
    """What is asked of a hub; `files` are what it was given, `there` is the card of the repository."""

    def __init__(self) -> None:
        self.files: dict[str, str] = {}
        self.there: str | None = None

    def create_repo(self, repo_id: str, **options: Any) -> Any:
        return SimpleNamespace(repo_id=repo_id)

    def create_commit(self, repo_id: str, operations: list[Any], **options: Any) -> Any:
        for one in operations:
            if not one.path_in_repo.endswith(".safetensors"):
                self.files[one.path_in_repo] = Path(one.path_or_fileobj).read_text(encoding="utf-8")
        return SimpleNamespace()

    def load(self, *arguments: Any, **options: Any) -> ModelCard:
        if self.there is None:
            raise EntryNotFoundError("no card")
        return ModelCard(self.there)


@pytest.fixture
def no_hub(monkeypatch: pytest.MonkeyPatch) -> NoHub:
    made = NoHub()
    monkeypatch.setattr(hub, "hf_api", lambda *a, **k: made)
    monkeypatch.setattr("transformers.modeling_utils.hf_api", lambda *a, **k: made)
    monkeypatch.setattr(hub.ModelCard, "load", made.load)
    return made


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    folder = ours(tmp_path / "model", attention="differential")
    write_card(folder, licence="apache-2.0")
    return folder


def test_the_card_beside_the_weights_is_pushed(saved: Path, no_hub: NoHub) -> None:
    card = (saved / "README.md").read_text()
    model = ClearheadForCausalLM.from_pretrained(saved)
    model.push_to_hub("owner/model")
    assert no_hub.files["README.md"] == card and "modeling_clearhead.py" in no_hub.files
    assert "from_pretrained" in card and "differential attention V1" in card
    # A card of an earlier push is replaced, one that a person wrote is not.
    no_hub.there = card.replace("apache-2.0", "mit")
    model.push_to_hub("owner/model")
    assert no_hub.files["README.md"] == card
    no_hub.there = PERSONS
    model.push_to_hub("owner/model")
    assert "# Mine" in no_hub.files["README.md"]


def test_saving_into_the_directory_and_pushing_keeps_its_card(saved: Path, no_hub: NoHub) -> None:
    card = (saved / "README.md").read_text()
    model = ClearheadForCausalLM.from_pretrained(saved)
    model.save_pretrained(saved, push_to_hub=True, repo_id="owner/model")
    assert (saved / "README.md").read_text() == card == no_hub.files["README.md"]


def test_without_a_card_it_is_transformers_own(
    tmp_path: Path, no_hub: NoHub, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also for a model of no directory, wherever it is pushed from."""
    (tmp_path / "README.md").write_text("of another project")
    monkeypatch.chdir(tmp_path)
    model = ClearheadForCausalLM.from_pretrained(ours(tmp_path / "model"))
    for each in (model, ClearheadForCausalLM(model.config.__class__(num_hidden_layers=1, vocab_size=8))):
        each.push_to_hub("owner/model")
        assert "automatically generated" in no_hub.files["README.md"]

"""Code beside a model or tokenizer is run by no command, and nobody is asked at the terminal whether it may be."""

import ast
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from clearhead.cli.explain import _models
from clearhead.cli.models import load_model
from clearhead.data.opening import NeedsCode, open_pretrained
from clearhead.data.tokenizer import load_pretrained
from clearhead.evals.faithfulness.judges.loading import load_judge
from clearhead.evals.subjects.external import ExternalLoader, ExternalSpec
from clearhead.evals.text.kept import opened
from tests.evals import tiny

SOURCE = Path(__file__).parents[2] / "src" / "clearhead"
# Classes that are installed, whatever the source says: they look for no other.
CONCRETE = {"ClearheadConfig", "PreTrainedTokenizerFast", "PeftModel", "config_class", "super()"}


@pytest.fixture
def planted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A directory of a model and a tokenizer whose classes lie beside them; importing them makes tmp_path/run."""
    monkeypatch.setattr("builtins.input", lambda *question: pytest.fail("transformers asked at the terminal"))
    # Where transformers copies the code that it runs, as its own variable says when it is imported.
    monkeypatch.setattr(
        "transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"), raising=True
    )
    folder = tiny.save(tmp_path / "theirs", tiny.llama())
    config = json.loads((folder / "config.json").read_text())
    config["model_type"] = "theirs"
    config["auto_map"] = {"AutoConfig": "theirs.Config", "AutoModelForCausalLM": "theirs.Model"}
    (folder / "config.json").write_text(json.dumps(config))
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    settings |= {"tokenizer_class": "Theirs", "auto_map": {"AutoTokenizer": ["theirs.Words", None]}}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    (folder / "theirs.py").write_text(
        f"import os\nos.makedirs({str(tmp_path / 'run')!r}, exist_ok=True)\n"
        "from transformers import LlamaConfig\nclass Config(LlamaConfig): model_type = 'theirs'\n"
    )
    return folder


WAYS: dict[str, Callable[[Path], Any]] = {
    "the tokenizer of a recipe": lambda folder: load_pretrained(str(folder)),
    "the configuration of evaluate": lambda folder: ExternalLoader(ExternalSpec(str(folder))).config,
    "the tokenizer of evaluate": lambda folder: ExternalLoader(ExternalSpec(str(folder))).tokenizer,
    "a judge that writes": lambda folder: load_judge(AutoModelForCausalLM, str(folder)),
    "a judge of entailment": lambda folder: load_judge(AutoModelForSequenceClassification, str(folder)),
    "an original beside its conversion": lambda folder: opened(str(folder), tiny.subject(tiny.llama())),
    "chat": load_model,
    "explain": lambda folder: _models(folder, [], None),
}


@pytest.mark.parametrize("way", WAYS)
def test_it_is_refused_in_a_sentence(way: str, planted: Path) -> None:
    with pytest.raises(Exception, match="needs code of its own, which is not run") as caught:
        WAYS[way](planted)
    assert "trust_remote_code" not in str(caught.value) and "\n" not in str(caught.value)
    assert not (planted.parent / "run").exists()


def test_what_is_planted_would_be_seen(planted: Path) -> None:
    AutoConfig.from_pretrained(planted, trust_remote_code=True)
    assert (planted.parent / "run").exists()


def test_a_class_that_is_installed_goes_before_one_that_lies_there(planted: Path, tmp_path: Path) -> None:
    """As our own saved models have it: their module is never looked at here."""
    model = tiny.llama()
    folder = tiny.save(tmp_path / "llama", model)
    config = json.loads((folder / "config.json").read_text())
    config["auto_map"] = {"AutoConfig": "theirs.Config", "AutoModelForCausalLM": "theirs.Model"}
    (folder / "config.json").write_text(json.dumps(config))
    shutil.copy(planted / "theirs.py", folder)
    assert type(open_pretrained(AutoModelForCausalLM, folder)) is type(model)
    assert len(open_pretrained(AutoTokenizer, folder)) == len(tiny.tokenizer())
    assert not (tmp_path / "run").exists()
    with pytest.raises(OSError):
        open_pretrained(AutoConfig, tmp_path / "nothing")
    with pytest.raises(NeedsCode):
        open_pretrained(AutoConfig, planted)


def test_every_auto_class_is_opened_in_one_place() -> None:
    """A call of `from_pretrained` elsewhere is one of a class that has no other."""
    found = []
    for file in sorted(SOURCE.rglob("*.py")):
        for node in ast.walk(ast.parse(file.read_text())):
            if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Attribute):
                continue
            if node.func.attr == "from_pretrained":
                owner = ast.unparse(node.func.value).rpartition(".")[2]
                if owner not in CONCRETE:
                    found.append((file.relative_to(SOURCE).as_posix(), owner))
    assert found == [("data/opening.py", "kind")]

"""A broken small file, wherever it lies, is answered with one sentence that names it; refusals leave nothing behind."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from clearhead.cli.results import print_results
from clearhead.data.prepare import DataSpec, prepare
from clearhead.data.readers import CorpusError
from clearhead.evals.subjects.external import load, reopened
from clearhead.runs.directory import kept_data
from clearhead.runs.lock import exclusive
from clearhead.runs.recipe_io import load_job
from clearhead.runs.results import load_run, read_json, read_metrics
from clearhead.runs.status import read_status
from clearhead.train.callbacks import Journal
from clearhead.train.sweep import chosen_rates

BROKEN = {
    "empty": b"",
    "cut": b'{"state": "tr',
    "a list": b"[1]",
    "deep": b"[" * 100_000,
    "not UTF-8": b'{"state": "\xff"}',
    "another key": b'{"state": "queued", "mood": "fine"}',
    "another type": b'{"state": 7, "arms": 7, "model": [], "data": 3}',
    "null": b"null",
}
# File -> what reads it from the folder it lies in.
READERS: dict[str, Callable[[Path], Any]] = {
    "status.json": lambda path: read_status(path.parent),
    "job.json": load_job,
    "sweep.json": lambda path: chosen_rates(path.parent),
}


@pytest.mark.parametrize("content", BROKEN.values(), ids=BROKEN)
@pytest.mark.parametrize("name", READERS)
def test_a_broken_file_is_named(tmp_path: Path, name: str, content: bytes) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError) as caught:
        READERS[name](tmp_path / name)
    assert str(tmp_path / name) in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("content", [BROKEN[key] for key in ("empty", "cut", "a list", "deep", "not UTF-8")])
@pytest.mark.parametrize(
    "read", [kept_data, lambda run: print_results(run), lambda run: read_json(run / "data.json")]
)
def test_a_file_that_is_no_object_is_named(
    tmp_path: Path, read: Callable[[Path], Any], content: bytes
) -> None:
    for name in ("data.json", "summary.json"):
        (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=r"(data|summary)\.json (is not valid JSON|holds a)"):
        read(tmp_path)


@pytest.mark.parametrize("line", ["{", "7", "{}", '{"step": "x"}', "[" * 100_000])
def test_a_broken_line_is_named_and_half_a_last_line_passed_over(tmp_path: Path, line: str) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text(f'{{"step": 1}}\n{line}\n{{"step": 3}}\n')
    for read in (read_metrics, lambda path: Journal(path, 5)):
        with pytest.raises(ValueError, match=r"metrics\.jsonl, line 2, is not valid JSON"):
            read(path)
    path.write_text(f'{{"step": 1}}\n{line}')
    assert read_metrics(path) == [{"step": 1}]
    assert read_metrics(tmp_path / "none.jsonl") == []


@pytest.mark.parametrize(
    "text",
    [
        "name = ",
        "seeds = 3\n",
        "seeds = ['x']\n",
        "arms = [{}]\n",
        "arms = [3]\n",
        "arms = 3\n",
        "[arms]\nx=1\n",
    ],
)
def test_a_broken_recipe_of_a_run_is_named(tmp_path: Path, text: str) -> None:
    (tmp_path / "recipe.toml").write_text(text)
    with pytest.raises(ValueError, match=r"recipe\.toml"):
        load_run(tmp_path)


def test_a_broken_subject_is_named(tmp_path: Path) -> None:
    path = tmp_path / "arms" / "a" / "seed-0" / "subject.json"
    path.parent.mkdir(parents=True)
    path.write_text('{"model": "m", "mood": "fine"}')
    with pytest.raises(ValueError, match=r"subject\.json.*mood"):
        reopened(tmp_path)


@pytest.mark.parametrize("place", ["/proc/nope", "file/below"])
def test_a_cache_that_cannot_be_made_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: str
) -> None:
    for name in ("a.txt", "b.txt"):
        (tmp_path / name).write_text(name * 100)
    (tmp_path / "file").touch()
    monkeypatch.setenv("CLEARHEAD_CACHE", str(tmp_path / place))
    with pytest.raises(CorpusError, match=r"cannot be written under .*set CLEARHEAD_CACHE to another"):
        prepare(DataSpec(source=str(tmp_path / "[ab].txt"), vocab_size=300))


def test_a_refusal_leaves_no_lock(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").touch()
    with pytest.raises(ValueError, match="refused"), exclusive(tmp_path, "the run"):
        raise ValueError("refused")
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]
    with exclusive(tmp_path, "the run"):
        pass
    # A lock that was there before stays: another process may wait for it.
    with pytest.raises(ValueError, match="refused"), exclusive(tmp_path, "the run"):
        raise ValueError("refused")
    assert (tmp_path / ".lock").exists()


def test_a_lock_that_was_removed_meanwhile_is_none(tmp_path: Path) -> None:
    with exclusive(tmp_path, "the run"):
        (tmp_path / ".lock").unlink()
        with exclusive(tmp_path, "the run"):
            assert (tmp_path / ".lock").read_text() == str(os.getpid())


def test_weights_in_pickles_are_not_read(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    config = {"model_type": "gpt2", "n_embd": 4, "n_head": 1, "n_layer": 1, "vocab_size": 8, "n_positions": 8}
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "pytorch_model.bin").write_bytes(b"cos\nsystem\n(S'false'\ntR.")
    with pytest.raises(ValueError, match=r"the model in .* cannot be loaded: .*model\.safetensors"):
        load(AutoModelForCausalLM, str(tmp_path), "the model")


def test_a_name_that_is_not_ascii_in_an_ascii_locale() -> None:
    environment = {**os.environ, "LC_ALL": "C", "PYTHONUTF8": "0"}
    done = subprocess.run(
        [sys.executable, "-c", "from clearhead.cli.main import main; main()", "compare", "größe.toml"],
        env=environment,
        capture_output=True,
    )
    assert done.returncode == 2
    assert "there is no recipe 'größe.toml'" in done.stderr.decode("utf-8")

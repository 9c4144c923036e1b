"""What a run began with (text, tokens, tokenizer, evaluation sets) holds for every job, evaluation and later call."""

import json
from pathlib import Path
from typing import Any

import pytest

from clearhead.data import began
from clearhead.data import prepare as preparing
from clearhead.data.prepare import DataSpec, prepare
from clearhead.data.readers import CorpusError
from clearhead.runs.directory import keep_data, kept_data
from clearhead.runs.lock import RunError
from clearhead.runs.recipe import Recipe
from clearhead.runs.recipe_io import parse_recipe
from clearhead.train.comparison import arm_tasks, prepare_rows
from clearhead.train.pool import place


@pytest.fixture
def corpus(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("CLEARHEAD_CACHE", str(tmp_path / "cache"))
    folder = tmp_path / "text"
    folder.mkdir()
    for number in range(6):
        words = (chr(97 + (number * j + j // 7) % 26) * (j % 4 + 1) for j in range(400))
        (folder / f"{number}.txt").write_text(" ".join(words))
    return folder


def recipe(corpus: Path, **tables: Any) -> Recipe:
    raw = {
        "name": "t",
        "corpus": {"source": str(corpus), "validation_fraction": 0.3},
        "tokenizer": {"vocab_size": 300},
        "data": {"length": 32},
        "train": {"tokens": 640, "batch_tokens": 64},
        "arms": [{"name": "A"}, {"name": "B", "attention": "differential"}],
        **tables,
    }
    return parse_recipe(raw, source="test")


def silent(text: str) -> None:
    pass


def test_text_that_changes_after_the_parent_looked_is_refused_by_the_job(
    corpus: Path, tmp_path: Path
) -> None:
    """The parent prepared the data, the first arm trains; before the second starts the files are replaced."""
    asked = recipe(corpus)
    tasks = arm_tasks(asked, tmp_path / "run")
    (tmp_path / "run").mkdir()
    handed = prepare_rows(asked, tmp_path / "run", silent)
    for task in tasks:
        place(task, handed)
    (corpus / "3.txt").write_text("another text " * 300)
    (corpus / "new.txt").write_text("one more text " * 300)
    (corpus / "4.txt").unlink()
    from clearhead.train.trainer import train_job

    with pytest.raises(CorpusError, match=r"'3\.txt' differs, '4\.txt' is gone, 'new\.txt' is new"):
        train_job(tasks[1].job, tasks[1].directory)
    assert not (tasks[1].directory / "model").exists()
    with pytest.raises(CorpusError, match=r"has changed since the run began.*--fresh"):
        prepare_rows(asked, tmp_path / "run", silent)


def test_an_evaluation_is_held_to_the_text_of_the_training(corpus: Path, tmp_path: Path) -> None:
    asked = recipe(corpus)
    task = arm_tasks(asked, tmp_path / "run")[0]
    (tmp_path / "run").mkdir()
    place(task, prepare_rows(asked, tmp_path / "run", silent))
    (corpus / "0.txt").write_text("another text " * 300)
    from clearhead.evals.runner import JobLoader

    with pytest.raises(CorpusError, match=r"'0\.txt' differs"):
        _ = JobLoader(task.job, task.directory).subject


def test_a_job_of_an_older_run_is_held_to_what_its_run_says(corpus: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    run.mkdir()
    task = arm_tasks(recipe(corpus), run)[0]
    place(task)
    assert kept_data(task.directory) is None
    (run / "recipe.toml").touch()
    keep_data(run, {"corpus": {"sha256": "a"}, "tokenizer_files": None})
    assert (kept_data(task.directory) or {})["corpus"] == {"sha256": "a"}


def test_other_tokens_of_the_same_source_are_refused(corpus: Path) -> None:
    """A dataset of the hub is known by its name alone: what it gave is compared."""
    spec = DataSpec(source=str(corpus), vocab_size=300)
    first = prepare(spec).identity
    changed = {**first, "files": {**first["files"], "train/tokens.bin": "0"}}
    with pytest.raises(CorpusError, match=r"train/tokens\.bin differs"):
        prepare(spec, began=changed)
    assert prepare(spec, began=first).identity == first


def test_text_that_changes_while_it_is_read_is_refused(corpus: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    build = preparing.build

    def late(*arguments: Any) -> None:
        (corpus / "1.txt").write_text("another text " * 300)
        build(*arguments)

    monkeypatch.setattr(preparing, "build", late)
    with pytest.raises(CorpusError, match=r"'1\.txt' differs"):
        prepare(DataSpec(source=str(corpus), vocab_size=300))


def test_evaluation_sets_are_kept_and_held_to(corpus: Path, tmp_path: Path) -> None:
    data = tmp_path / "set.jsonl"
    data.write_text("{}\n")
    asked = recipe(
        corpus,
        evaluate={"suites": ["perplexity"], "perplexity": {"texts": [str(data), str(corpus), "stdlib"]}},
    )
    run = tmp_path / "run"
    run.mkdir()
    handed = prepare_rows(asked, run, silent)
    assert set(handed["evaluation_sets"]) == {str(data), "stdlib", *map(str, corpus.iterdir())}
    task = arm_tasks(asked, run)[0]
    place(task, handed)
    data.write_text('{"changed": 1}\n')
    with pytest.raises(RunError, match=r"set\.jsonl.* has changed since the run began"):
        prepare_rows(asked, run, silent)
    from clearhead.evals.runner import run_suites

    with pytest.raises(CorpusError, match=r"set\.jsonl.* has changed since the run began"):
        run_suites(None, task.directory, {"perplexity": {"texts": [str(data)]}}, "A", 0, None)  # type: ignore[arg-type]


def test_a_result_of_other_sets_is_no_result(tmp_path: Path) -> None:
    from clearhead.evals.runner import _is_done

    target = tmp_path / "x.json"
    target.write_text(json.dumps({"config": {"a": 1}, "values": {}, "sets": {"s": "1"}}))
    assert _is_done(target, {"a": 1}, {"s": "1"})
    assert not _is_done(target, {"a": 1}, {"s": "2"})


def test_nothing_but_the_options_that_name_sets_is_looked_at(
    corpus: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(corpus)
    assert began.set_stamps({"label_field": "0.txt", "samples": 3, "texts": None}) == {}
    assert set(began.set_stamps({"haystack": ["[01].txt"], "data": "trec"})) == {"0.txt", "1.txt"}

"""What a run is told of its text before it trains: how often it is read, and that one held-out document is none."""

from pathlib import Path
from typing import Any

import pytest
from tests.train.small import write_corpus

from clearhead.data.prepare import PreparedData, prepare
from clearhead.runs.recipe import Job
from clearhead.runs.recipe_io import parse_recipe
from clearhead.runs.rows import check_validation, data_spec, describe_text, epochs_by_source, training_rows
from clearhead.train.comparison import prepare_rows


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CLEARHEAD_CACHE", str(tmp_path / "cache"))


def raw(corpus: Path, fraction: float, data: dict[str, Any], tokens: int) -> dict[str, Any]:
    return {
        "name": "rows",
        "corpus": {"source": str(corpus), "validation_fraction": fraction},
        "tokenizer": {"vocab_size": 300},
        "data": {"length": 32, "needles": {"lengths": [24, 32], "needles": [1, 2], "questions": 1}, **data},
        "train": {"tokens": tokens, "batch_tokens": 64},
        "evaluate": {"suites": []},
        "arms": [{"name": "A"}],
    }


def prepared(corpus: Path, fraction: float, data: dict[str, Any], tokens: int) -> tuple[Job, PreparedData]:
    job = parse_recipe(raw(corpus, fraction, data, tokens), source="test").for_arm("A", 0)
    return job, prepare(data_spec(job))


@pytest.mark.parametrize(
    "data",
    [
        {},
        {"needle_share": 0.3, "pair_share": 0.2},
        {"needle_share": 0.25, "pairs_first": 0.5},
        {"needle_share": 0.5, "pair_share": 0.5},
    ],
)
def test_epochs_are_those_of_the_rows(data: dict[str, Any], tmp_path: Path) -> None:
    job, found = prepared(write_corpus(tmp_path / "text"), 0.3, data, 64_000)
    rows = training_rows(job, found)
    text = sum(rows.kind(index) == "text" for index in range(len(rows)))
    (epochs,) = epochs_by_source(job, found).values()
    assert epochs == pytest.approx(text / len(rows.text), rel=0.01)  # type: ignore[arg-type]


def test_a_text_that_is_read_too_often_is_said(tmp_path: Path) -> None:
    corpus = write_corpus(tmp_path / "text")
    often = describe_text(*prepared(corpus, 0.3, {}, 64_000))
    assert "a run reads the text" in often and "learned by heart" in often
    assert "learned by heart" not in describe_text(*prepared(corpus, 0.3, {}, 640))
    assert "reads the text" not in describe_text(*prepared(corpus, 0.3, {"needle_share": 1.0}, 640))


def test_one_held_out_document_is_refused_before_a_run_begins(tmp_path: Path) -> None:
    corpus = write_corpus(tmp_path / "text")
    job, found = prepared(corpus, 0.001, {}, 640)
    assert len(found.validation) == 1
    with pytest.raises(ValueError, match=r"validation_fraction 0.001 of 12 documents in .* holds out 1"):
        check_validation(job, found)
    run = tmp_path / "run"
    run.mkdir()
    recipe = parse_recipe(raw(corpus, 0.001, {}, 640), source="test")
    with pytest.raises(ValueError, match="holds out 1"):
        prepare_rows(recipe, run, lambda text: None)
    assert not (run / "data.json").exists()
    # A run that had begun before this was refused goes on.
    (run / "data.json").write_text("{}")
    said: list[str] = []
    prepare_rows(recipe, run, said.append)
    assert any(text.startswith("reading 12 files (12 .txt)") for text in said)
    check_validation(*prepared(corpus, 0.3, {}, 640))

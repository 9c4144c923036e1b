"""Suites as files: checked like recipes, run on any model, their data named when they are used."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from clearhead.cli.main import app
from clearhead.evals.suite import load_suite
from clearhead.runs.recipe import RecipeError
from tests.evals import tiny

SHIPPED = sorted((Path(__file__).parents[2] / "recipes" / "evaluate").glob("*.toml"))
SUITE = """
[corpus]
source = "nowhere"
[evaluate]
suites = ["initial_angles", "knowledge_conflicts"]
[evaluate.initial_angles]
documents = 2
positions = 8
[evaluate.knowledge_conflicts]
data = "{sets}/conflicts.jsonl"
samples = 2
"""


@pytest.fixture
def suite(tmp_path: Path) -> Path:
    (tmp_path / "suite.toml").write_text(SUITE)
    return tmp_path / "suite.toml"


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_shipped_suites_are_valid(path: Path, tmp_path: Path) -> None:
    alone, whole = load_suite(path), load_suite(path, tmp_path)
    assert whole.evaluate.suites == alone.evaluate.suites and not whole.left_out
    assert {"many_shot", "long_document_qa"} <= set(alone.left_out) < set(alone.evaluate.suites)
    assert str(tmp_path) in str(whole.evaluate) and "{sets}" not in str(whole.evaluate)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (("documents = 2", "documnets = 2"), "'evaluate.initial_angles.documnets'; did you mean 'documents'"),
        (("documents = 2", "documents = -2"), "evaluate.initial_angles.documents"),
        (('"initial_angles", ', '"initial_angels", '), "unknown evaluation 'initial_angels'; did you mean"),
        (("[evaluate.initial_angles]", "[evaluate.angles]"), "unknown key 'evaluate.angles'"),
        (('suites = ["initial_angles", "knowledge_conflicts"]', ""), "names no evaluation"),
        (("[corpus]", "[train]\ntokens = 3\n[corpus]"), "unknown key 'train'"),
        (("[corpus]", "[corpus"), "not valid TOML"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_named(suite: Path, change: tuple[str, str], message: str) -> None:
    suite.write_text(SUITE.replace(*change))
    with pytest.raises(RecipeError) as error:
        load_suite(suite)
    assert message in str(error.value) and str(suite) in str(error.value)


def test_sets_that_are_not_there_are_named(suite: Path, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="there is no directory"):
        load_suite(suite, tmp_path / "none")
    with pytest.raises(RecipeError, match="there is no suite of evaluations"):
        load_suite(tmp_path / "none.toml")


def test_a_model_is_put_through_it(suite: Path, tmp_path: Path) -> None:
    model, text = tiny.save(tmp_path / "tiny-llama"), tmp_path / "text.txt"
    text.write_text("The grass is green and the sky is blue.\n" * 40)
    run = tmp_path / "run"
    arguments = ["evaluate", str(model), "--config", str(suite), "--corpus", str(text), "--out", str(run)]
    done = CliRunner().invoke(app, [*arguments, "--set", "initial_angles.positions=4"])
    assert done.exit_code == 0, done.output
    assert "knowledge_conflicts is left out: name the directory of its data with --sets" in done.output
    record = json.loads((run / "arms/tiny-llama/seed-0/results/initial_angles.json").read_text())
    assert record["config"]["documents"] == 2 and record["config"]["positions"] == 4
    assert [path.stem for path in run.glob("arms/*/*/results/*.json")] == ["initial_angles"]
    asked = "Context: Rome.\nQuestion: Where?\nAnswer:"
    conflict = {"input": asked, "target": "Rome", "target_scores": {"Rome": 1, "Oslo": 0}}
    (tmp_path / "conflicts.jsonl").write_text(json.dumps(conflict) + "\n")
    again = CliRunner().invoke(app, [*arguments, "--sets", str(tmp_path), "--suite", "knowledge_conflicts"])
    assert again.exit_code == 0, again.output
    assert (run / "arms/tiny-llama/seed-0/results/knowledge_conflicts.json").exists()
    none = CliRunner().invoke(app, [*arguments, "--suite", "knowledge_conflicts"])
    assert isinstance(none.exception, RecipeError) and "no evaluation is left" in str(none.exception)

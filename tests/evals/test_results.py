"""Reading run directories: killed processes, resumed logs, foreign files."""

from __future__ import annotations

from pathlib import Path

import pytest

from clearhead.runs.recipe import Arm
from clearhead.runs.results import ArmResults, RunResults, SeedResults, load_run, read_metrics, slugify


def test_a_half_written_last_line_is_ignored_and_a_broken_one_before_it_is_named(tmp_path: Path) -> None:
    log = tmp_path / "metrics.jsonl"
    log.write_text('{"step": 1, "tokens": 10}\n{"step": 2, "tok')
    assert read_metrics(log) == [{"step": 1, "tokens": 10}]
    log.write_text('{"step": 1, "tok\n{"step": 2, "tokens": 20}\n')
    with pytest.raises(ValueError, match="line 1, is not valid JSON"):
        read_metrics(log)


def test_a_resumed_run_counts_each_step_once(tmp_path: Path) -> None:
    log = tmp_path / "metrics.jsonl"
    log.write_text(
        '{"step": 1, "loss": 3}\n{"step": 2, "loss": 9}\n{"step": 2, "probe": {}}\n{"step": 2, "loss": 2}\n'
    )
    assert read_metrics(log) == [{"step": 1, "loss": 3}, {"step": 2, "loss": 2}, {"step": 2, "probe": {}}]


def test_a_directory_that_is_no_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"is not a run directory: it has no recipe\.toml"):
        load_run(tmp_path)
    (tmp_path / "recipe.toml").write_text('name = "x"\n')
    with pytest.raises(ValueError, match="names no arms"):
        load_run(tmp_path)


@pytest.mark.parametrize("name", ["Transformer", "DIFF V1", "CoCA (exact)", "softmax + head norm"])
def test_directories_are_named_as_the_recipe_names_them(name: str) -> None:
    assert slugify(name) == Arm(name=name).slug


def test_only_results_with_the_same_options_are_compared() -> None:
    def seed(samples: int, **values: object) -> SeedResults:
        return SeedResults(
            results={"x": {"config": {"samples": samples}, "values": {"n": samples, **values}}}
        )

    arms = [
        ArmResults("A", "a", "softmax", {0: seed(20), 1: seed(10)}),
        ArmResults("B", "b", "softmax", {0: seed(10), 1: seed(10, skipped="too long")}),
        ArmResults("C", "c", "softmax", {0: SeedResults()}),
    ]
    run = RunResults({}, {}, arms)
    assert run.values("x") == {"A": {1: {"n": 10}}, "B": {0: {"n": 10}}}
    assert run.skipped("x") == [
        "A: measured with other options than the rest; clearhead evaluate measures it again",
        "B: too long",
    ]
    assert run.values("y") == {} and run.skipped("y") == []

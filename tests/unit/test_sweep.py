"""The learning rate of an arm: fewest tokens until mastery, else the lowest final loss."""

import json
from pathlib import Path
from typing import Any

import pytest

from clearhead.runs.recipe import Recipe
from clearhead.runs.recipe_io import parse_recipe
from clearhead.train.sweep import choose, sweep_tasks

RATES = (1e-3, 2e-3, 4e-3)
BUDGET = 100_000


@pytest.fixture
def recipe() -> Recipe:
    sweep = {"learning_rate": list(RATES), "seeds": [7, 8], "tokens": BUDGET}
    raw = {"name": "s", "arms": [{"name": "A"}, {"name": "B"}], "sweep": sweep}
    return parse_recipe({**raw, "train": {"mastery": 0.8}}, source="test")


def log(probes: list[tuple[int, float, float]], losses: list[float]) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = [
        {"step": step, "tokens": step, "loss": loss} for step, loss in enumerate(losses)
    ]
    for tokens, accuracy, loss in probes:
        probe = {"needle_accuracy": accuracy, "validation_loss": loss}
        found.append({"step": tokens, "tokens": tokens, "probe": probe})
    return found


def chosen(recipe: Recipe, run: Path, logs: dict[float, list[list[dict[str, Any]]]]) -> dict[str, float]:
    """Give both arms the same logs by learning rate, one a seed."""
    tasks = sweep_tasks(recipe, run)
    for task in tasks:
        task.directory.mkdir(parents=True)
        records = logs[task.job.train.learning_rate][recipe.sweep.seeds.index(task.job.seed)]  # type: ignore[union-attr]
        (task.directory / "metrics.jsonl").write_text(
            "".join(json.dumps(record) + "\n" for record in records)
        )
    return choose(recipe, tasks, run)


def test_tasks(recipe: Recipe, tmp_path: Path) -> None:
    tasks = sweep_tasks(recipe, tmp_path)
    assert len({task.directory for task in tasks}) == len(tasks) == 2 * 3 * 2
    assert {task.job.train.tokens for task in tasks} == {BUDGET}
    assert {task.job.seed for task in tasks} == {7, 8}
    assert all(task.job.evaluate.suites == [] for task in tasks)


def test_mastery_decides_and_censored_runs_count_as_the_budget(recipe: Recipe, tmp_path: Path) -> None:
    never, late, early = (
        log([(50, 0.1, 1.0)], [2.0]),
        log([(70_000, 0.9, 3.0)], [3.0]),
        log([(9_000, 0.8, 3.0)], [3.0]),
    )
    # 54,500 on average, against 70,000 twice; the lowest loss does not count.
    logs = {1e-3: [late, late], 2e-3: [early, never], 4e-3: [never, never]}
    assert chosen(recipe, tmp_path, logs) == {"A": 2e-3, "B": 2e-3}
    written = json.loads((tmp_path / "sweep.json").read_text())["arms"]["A"]
    assert written["decided_by"] == "tokens until mastery"
    assert [round(candidate["score"]) for candidate in written["candidates"]] == [70_000, 54_500, 100_000]


def test_validation_loss_decides_when_none_masters(recipe: Recipe, tmp_path: Path) -> None:
    logs = {
        rate: [log([(1, 0.7, 9.0), (2, 0.7, loss)], [1.0])] * 2
        for rate, loss in zip(RATES, (3.0, 2.5, 2.7), strict=True)
    }
    assert chosen(recipe, tmp_path, logs)["A"] == 2e-3


def test_training_loss_stands_in_without_probes(recipe: Recipe, tmp_path: Path) -> None:
    logs = {
        rate: [log([], [9.0] * 19 + [loss, loss])] * 2
        for rate, loss in zip(RATES, (3.0, 2.5, float("nan")), strict=True)
    }
    assert chosen(recipe, tmp_path, logs)["A"] == 2e-3

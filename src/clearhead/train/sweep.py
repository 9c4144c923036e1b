"""Choosing each arm's learning rate before the comparison, on seeds of its own.

The rule, written into `sweep.json` with its outcome: among the learning rates of an arm take the one with the fewest
tokens until mastery on average over the sweep's seeds, a run that never masters counting as its whole budget. When no
run of the arm masters, take the one with the lowest validation loss at the end, averaged over the seeds; without
`train.probe_every` there is no validation loss, and the training loss over the last tenth of the run stands in.
"""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from clearhead.runs.files import MEND, BrokenFile, read_lines, read_object, write_json
from clearhead.runs.recipe import Recipe
from clearhead.train.pool import TrainingTask

RULE = "fewest tokens until mastery (runs without it count as their budget); if no run masters, the lowest final loss"


def sweep_tasks(recipe: Recipe, run_dir: Path) -> list[TrainingTask]:
    """One training per arm, learning rate and sweep seed, without evaluations."""
    assert recipe.sweep is not None
    tasks = []
    for seed in recipe.sweep.seeds:
        for rate in recipe.sweep.learning_rate:
            for arm in recipe.arms:
                job = recipe.for_arm(arm.name, seed, learning_rate=rate, tokens=recipe.sweep.tokens)
                job = job.model_copy(update={"evaluate": job.evaluate.model_copy(update={"suites": []})})
                directory = run_dir / "sweep" / arm.slug / f"lr-{rate:g}" / f"seed-{seed}"
                tasks.append(TrainingTask(job, directory, f"{arm.name} (learning rate {rate:g})"))
    return tasks


def choose(recipe: Recipe, tasks: Sequence[TrainingTask], run_dir: Path) -> dict[str, float]:
    """The learning rate of each arm by name, from finished sweep tasks; writes `sweep.json`."""
    outcomes: dict[str, dict[float, list[dict[str, Any]]]] = {}
    for task in tasks:
        rates = outcomes.setdefault(task.job.arm, {})
        rates.setdefault(task.job.train.learning_rate, []).append(outcome(task))
    chosen = {}
    arms = {}
    for arm, rates in outcomes.items():
        mastered = any(run["mastered_at"] is not None for runs in rates.values() for run in runs)
        scores = {rate: _score(runs, mastered) for rate, runs in rates.items()}
        chosen[arm] = min(scores, key=lambda rate: scores[rate])
        arms[arm] = {
            "learning_rate": chosen[arm],
            "decided_by": "tokens until mastery" if mastered else "final loss",
            "candidates": [
                {"learning_rate": rate, "score": scores[rate], "runs": runs} for rate, runs in rates.items()
            ],
        }
    write_json(run_dir / "sweep.json", {"rule": RULE, "arms": arms})
    return chosen


def chosen_rates(run_dir: Path) -> dict[str, float]:
    """The learning rate of each arm by name from `sweep.json`; empty when there is none."""
    path = run_dir / "sweep.json"
    if not path.exists():
        return {}
    try:
        return {name: float(arm["learning_rate"]) for name, arm in read_object(path)["arms"].items()}
    except (KeyError, TypeError, AttributeError) as error:
        raise BrokenFile(f"{str(path)!r} does not hold the outcome of a sweep ({error}); {MEND}") from error


def outcome(task: TrainingTask) -> dict[str, Any]:
    """Tokens at the first probe that reached mastery (None if none did), the budget, and the final loss."""
    mastered_at = None
    probe_loss = None
    losses = []
    for record in read_lines(task.directory / "metrics.jsonl"):
        probe = record.get("probe")
        if probe is None:
            # Null is a loss that was no number.
            losses.append(math.inf if record["loss"] is None else record["loss"])
            continue
        probe_loss = probe.get("validation_loss") or probe_loss
        if mastered_at is None and probe.get("needle_accuracy", 0.0) >= task.job.train.mastery:
            mastered_at = record["tokens"]
    last = losses[-max(1, len(losses) // 10) :]
    return {
        "seed": task.job.seed,
        "mastered_at": mastered_at,
        "budget": task.job.train.tokens,
        "final_loss": probe_loss if probe_loss is not None else sum(last) / len(last) if last else math.inf,
    }


def _score(runs: Sequence[dict[str, Any]], mastered: bool) -> float:
    if mastered:
        values = [run["budget"] if run["mastered_at"] is None else run["mastered_at"] for run in runs]
    else:
        values = [math.inf if run["final_loss"] is None else run["final_loss"] for run in runs]
        values = [value if math.isfinite(value) else math.inf for value in values]
    return float(sum(values) / len(values))

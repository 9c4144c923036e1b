"""Many jobs side by side: what is finished is not run again, what fails does not stop the rest, Ctrl-C stops all."""

import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from tests.cli.fake_worker import FAILS, FINE, HANGS, KILLED, SILENT

from clearhead.runs.lock import RunError
from clearhead.runs.recipe_io import parse_recipe
from clearhead.runs.status import read_status
from clearhead.train.comparison import arm_tasks
from clearhead.train.pool import ProgressRow, Silent, TrainingTask, Watcher, parallelism, run_tasks

WORKER = "tests.cli.fake_worker"
ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def importable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT / "src"), str(ROOT)]))


def tasks(directory: Path, seeds: Sequence[int], **train: Any) -> list[TrainingTask]:
    raw = {"name": "t", "seeds": list(seeds), "arms": [{"name": "A"}], "train": {"workers": 2, **train}}
    return arm_tasks(parse_recipe(raw, source="test"), directory)


def calls(task: TrainingTask) -> int:
    path = task.directory / "calls"
    return len(path.read_text()) if path.exists() else 0


def test_finished_jobs_are_not_run_again(tmp_path: Path) -> None:
    jobs = tasks(tmp_path, [FINE, 10, 11])
    for _ in range(2):
        rows = run_tasks(jobs, Silent(), worker=WORKER)
        assert [row.status.state for row in rows] == ["evaluated"] * 3
    assert [calls(job) for job in jobs] == [1, 1, 1]
    assert not any(row.running for row in rows)


def test_a_failed_job_does_not_stop_the_others(tmp_path: Path) -> None:
    jobs = tasks(tmp_path, [FAILS, KILLED, SILENT, FINE])
    rows = run_tasks(jobs, Silent(), worker=WORKER)
    assert [row.status.state for row in rows] == ["failed", "failed", "failed", "evaluated"]
    assert rows[0].status.error == "the reason"
    assert "killed by SIGKILL" in (rows[1].status.error or "")
    assert "exit code 3" in (rows[2].status.error or "")
    run_tasks(jobs, Silent(), worker=WORKER)
    assert [calls(job) for job in jobs] == [2, 2, 2, 1]


def test_other_evaluations_are_run_again_without_training(tmp_path: Path) -> None:
    job = tasks(tmp_path, [FINE])[0]
    run_tasks([job], Silent(), worker=WORKER)
    evaluate = job.job.evaluate.model_copy(update={"suites": ["needles"]})
    changed = TrainingTask(job.job.model_copy(update={"evaluate": evaluate}), job.directory, job.label)
    run_tasks([changed], Silent(), worker=WORKER)
    assert calls(changed) == 2


def test_another_training_in_the_same_place_is_refused(tmp_path: Path) -> None:
    (job,) = tasks(tmp_path, [FINE])
    run_tasks([job], Silent(), worker=WORKER)
    (other,) = tasks(tmp_path, [FINE], learning_rate=0.5)
    with pytest.raises(RunError, match=r"train\.learning_rate: 0\.001 -> 0\.5"):
        run_tasks([other], Silent(), worker=WORKER)
    run_tasks(tasks(tmp_path, [FINE], workers=1, save_every=7), Silent(), worker=WORKER)
    assert calls(job) == 1


class InterruptWhenRunning(Watcher):
    def update(self, rows: Sequence[ProgressRow]) -> None:
        if sum(row.running and row.status.state == "training" for row in rows) == 2:
            raise KeyboardInterrupt


def test_an_interruption_stops_every_worker(tmp_path: Path) -> None:
    raw = {"name": "t", "seeds": [HANGS], "arms": [{"name": "A"}, {"name": "B"}], "train": {"workers": 2}}
    jobs = arm_tasks(parse_recipe(raw, source="test"), tmp_path)
    start = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        run_tasks(jobs, InterruptWhenRunning(), worker=WORKER)
    assert time.monotonic() - start < 50
    assert [read_status(job.directory).state for job in jobs] == ["training", "training"]
    assert [row.status.state for row in run_tasks(jobs, Silent(), worker=WORKER)] == [
        "evaluated",
        "evaluated",
    ]


def test_parallelism(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("clearhead.train.pool.cores", lambda: 8)
    many = range(20, 40)
    assert parallelism(tasks(tmp_path, many, workers=0)) == (8, 1)
    assert parallelism(tasks(tmp_path, many, workers=0, threads=4)) == (2, 4)
    assert parallelism(tasks(tmp_path, many, workers=2, threads=0)) == (2, 4)
    assert parallelism(tasks(tmp_path, [20], workers=0, threads=0)) == (1, 8)

"""A whole comparison through the command line, killed and interrupted on the way."""

import json
import os
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import Any

import pytest
from click.testing import Result
from tests.train import small
from typer.testing import CliRunner

from clearhead.cli import main
from clearhead.cli.main import app
from clearhead.train import comparison, trainer, worker
from clearhead.train import pool as jobs
from clearhead.train.pool import TrainingTask

ROOT = Path(__file__).parents[2]
RECIPE = """
name = "small"
[corpus]
source = "text"
validation_fraction = 0.2
[tokenizer]
vocab_size = 300
[data]
length = 32
needle_share = 0.3
pair_share = 0.3
[data.needles]
lengths = [24, 32]
needles = [1, 2]
questions = 1
[model]
hidden_size = 16
num_hidden_layers = 1
num_attention_heads = 2
[train]
tokens = 768
batch_tokens = 64
save_every = 4
log_every = 3
workers = 2
[evaluate]
suites = ["language_modelling"]
[[arms]]
name = "Transformer"
[[arms]]
name = "DIFF V1"
attention = "differential"
"""
JOBS = ("transformer/seed-0", "diff-v1/seed-0")
# Seconds until a test gives up on an event; none is expected to take nearly as long.
PATIENCE = 300


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    small.write_corpus(tmp_path / "text")
    (tmp_path / "small.toml").write_text(RECIPE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("CLEARHEAD_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT / "src"), str(ROOT)]))
    return tmp_path


def call(*arguments: str) -> Result:
    """Run a verb in this process, which has everything loaded."""
    return CliRunner().invoke(app, arguments, catch_exceptions=False)


def wait_for(event: Callable[[], bool], process: ForkServerProcess | None = None) -> None:
    deadline = time.monotonic() + PATIENCE
    while not event():
        assert process is None or process.is_alive(), process.exitcode
        assert time.monotonic() < deadline
        time.sleep(0.02)


def statuses(run: Path) -> list[tuple[str, int]]:
    found = [json.loads((run / "arms" / job / "status.json").read_text()) for job in JOBS]
    return [(status["state"], status["step"]) for status in found]


@dataclass
class Forked:
    """A worker that was forked and not begun from nothing, to the parent as if it were."""

    process: ForkServerProcess

    def poll(self) -> int | None:
        return self.process.exitcode

    def terminate(self) -> None:
        self.process.terminate()

    def wait(self, timeout: float | None = None) -> None:
        self.process.join(timeout)

    def kill(self) -> None:
        self.process.kill()


def work(directory: Path, parent: int, environment: dict[str, str]) -> None:
    """The worker's own main, which dies while DIFF V1 writes its second checkpoint."""
    os.environ |= environment
    os.chdir(directory.parents[3])
    mark = trainer.mark_complete

    def die(folder: Path) -> None:
        if folder.name == "checkpoint-8" and "diff-v1" in str(folder):
            os.kill(os.getpid(), signal.SIGKILL)
        mark(folder)

    trainer.mark_complete = die
    worker._end_with = lambda parent: None  # the fork server is its parent
    sys.argv = ["worker", str(directory), "--threads", "1", "--parent", str(parent)]
    raise SystemExit(worker.main())


def test_a_killed_worker_is_reported_and_the_next_call_ends_with_the_same_weights(
    project: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = project / "run"
    environment = {"CLEARHEAD_CACHE": str(project / "cache"), "OMP_NUM_THREADS": "1"}

    def start(task: TrainingTask, threads: int, worker: str) -> Any:
        return Forked(small.process(work, task.directory.absolute(), os.getpid(), environment))

    with monkeypatch.context() as patch:
        patch.setattr(jobs, "_start", start)
        done = call("compare", "small.toml", "--out", str(run))
    assert done.exit_code == 1
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("1 of 2 jobs failed; DIFF V1, seed 0: killed by SIGKILL")
    assert last.endswith("arms/diff-v1/seed-0/log.txt")
    assert [state for state, _ in statuses(run)] == ["evaluated", "failed"]
    assert "Transformer" in done.stdout
    assert (run / "arms" / JOBS[1] / "checkpoints" / "checkpoint-4" / "complete").exists()

    done = call("compare", "small.toml", "--out", str(run), "train.threads=1")
    assert done.exit_code == 0, done.stderr
    assert statuses(run) == [("evaluated", 12)] * 2
    assert "All 2 runs trained and evaluated." in done.stdout
    assert (run / "report.html").exists()

    model = run / "arms" / JOBS[1]
    assert call("generate", str(model), "word", "--max-new-tokens", "3").stdout.startswith("word")
    assert "FlashDiffAttn_1" in call("explain", str(model)).stdout
    assert call("evaluate", str(model), "--suite", "loss_by_position").exit_code == 0
    assert (model / "results" / "loss_by_position.json").exists()
    assert call("report", str(run)).exit_code == 0

    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        other = project / "uninterrupted"
        assert call("train", "small.toml", "--arm", "DIFF V1", "--out", str(other)).exit_code == 0
    finally:
        torch.set_num_threads(before)
    weights = Path("arms") / JOBS[1] / "model" / "model.safetensors"
    assert (run / weights).read_bytes() == (other / weights).read_bytes()


def command(arguments: list[str], folder: Path, environment: dict[str, str]) -> None:
    """`clearhead` with workers that wait, its standard error in a file."""
    os.environ |= environment
    os.chdir(folder)
    comparison.WORKER = "tests.cli.waiting_worker"
    # Also when whoever started the tests in the background had Ctrl-C ignored.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    sys.argv = ["clearhead", *arguments]
    sys.stderr = (folder / "errors.txt").open("w", encoding="utf-8")
    try:
        main.main()
    finally:
        sys.stderr.close()


def alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    state = Path(f"/proc/{pid}/stat")
    return not state.exists() or state.read_text().rpartition(")")[2].split()[0] != "Z"


@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGKILL, -9), (signal.SIGINT, 130), (signal.SIGTERM, 130)]
)
def test_a_killed_or_interrupted_parent_takes_its_workers_along(
    project: Path, number: signal.Signals, code: int
) -> None:
    run = project / "run"
    arguments = ["compare", "small.toml", "--out", str(run)]
    environment = {name: os.environ[name] for name in ("CLEARHEAD_CACHE", "PYTHONPATH")}
    parent = small.process(command, arguments, project, environment)
    waiting = [run / "arms" / job / "waits" for job in JOBS]
    wait_for(lambda: all(path.exists() for path in waiting), parent)
    pids = [int(path.read_text()) for path in waiting]
    assert all(map(alive, pids))
    with pytest.raises(ValueError, match=rf"in use by another clearhead process \(pid {parent.pid}\)"):
        call(*arguments)

    assert parent.pid is not None
    os.kill(parent.pid, number)
    parent.join(PATIENCE)
    assert parent.exitcode == code
    wait_for(lambda: not any(map(alive, pids)))
    if code == 130:
        last = (project / "errors.txt").read_text().strip().splitlines()[-1]
        assert last == "interrupted: the same command goes on from the last checkpoints"

"""Run many jobs side by side, each in its own process, and survive whatever happens to any of them."""

import contextlib
import os
import signal
import subprocess
import sys
import time
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from clearhead.runs.directory import drop_free, keep_data
from clearhead.runs.environment import cores
from clearhead.runs.files import write_text
from clearhead.runs.lock import RunError
from clearhead.runs.recipe import Job
from clearhead.runs.recipe_io import differences, load_job
from clearhead.runs.status import Status, read_status, write_status

WORKER = "clearhead.train.worker"
POLL_SECONDS = 0.25
STOP_SECONDS = 10.0


@dataclass(frozen=True)
class TrainingTask:
    """A job, the directory it lives in, and how to call it in the progress display."""

    job: Job
    directory: Path
    label: str

    @property
    def log(self) -> Path:
        """What the job printed."""
        return self.directory / "log.txt"


@dataclass(frozen=True)
class ProgressRow:
    """A task as a progress display sees it."""

    task: TrainingTask
    status: Status
    running: bool


class Watcher(ABC):
    """Is told how far all tasks are, several times a second."""

    @abstractmethod
    def update(self, rows: Sequence[ProgressRow]) -> None: ...


class Silent(Watcher):
    def update(self, rows: Sequence[ProgressRow]) -> None:
        pass


def place(task: TrainingTask, began: Mapping[str, Any] | None = None) -> None:
    """Write the task's `job.json`. A finished job whose evaluations are asked for differently is evaluated again.

    began: what the run began with, text, tokenizer and evaluation sets; the job's process is held to it.
    Raises RunError when the directory holds a different training, or one on other text.
    """
    task.directory.mkdir(parents=True, exist_ok=True)
    path = task.directory / "job.json"
    status = read_status(task.directory)
    if path.exists():
        before = load_job(path)
        changed = differences(_training(before), _training(task.job))
        if changed and status.state != "queued":
            raise RunError(
                f"{str(task.directory)!r} holds another training ({'; '.join(changed[:5])}); move it away"
            )
        if status.state == "evaluated" and before.evaluate != task.job.evaluate:
            status = replace(status, state="trained")
    if began is not None:
        keep_data(task.directory, began, began.get("evaluation_sets"))
    if status.state in ("failed", "training"):
        # Not done yet: it goes on from its last checkpoint, or with its evaluation.
        status = replace(status, state="trained" if is_trained(task.directory) else "queued", error=None)
    write_text(path, task.job.model_dump_json(indent=2) + "\n")
    write_status(task.directory, replace(status, steps=task.job.steps, note=None))


def _training(job: Job) -> dict[str, Any]:
    """What decides the trained model."""
    plain = job.model_dump(mode="json", exclude={"evaluate"})
    drop_free(plain["train"])
    return plain


def is_trained(job_dir: Path) -> bool:
    """Whether training is complete: the model appears in one step when it is."""
    return (job_dir / "model" / "config.json").exists()


def run_tasks(
    tasks: Sequence[TrainingTask],
    watcher: Watcher,
    *,
    worker: str = WORKER,
    began: Mapping[str, Any] | None = None,
) -> list[ProgressRow]:
    """Run all tasks that are not finished, several at a time; returns every task with its final status.

    `worker` is the module that runs one job in its own process, `began` what the run began with (`place`).

    A task that fails does not stop the others. When this call is interrupted the running ones are stopped; the next
    call goes on from their last checkpoints.
    """
    for task in tasks:
        place(task, began)
    workers, threads = parallelism(tasks)
    waiting = [task for task in tasks if read_status(task.directory).state != "evaluated"]
    running: dict[Path, tuple[TrainingTask, subprocess.Popen[bytes]]] = {}
    try:
        while waiting or running:
            while waiting and len(running) < workers:
                task = waiting.pop(0)
                running[task.directory] = (task, _start(task, threads, worker))
            watcher.update(_rows(tasks, running))
            time.sleep(POLL_SECONDS)
            for directory, (task, process) in list(running.items()):
                code = process.poll()
                if code is not None:
                    del running[directory]
                    _settle(task, code)
    finally:
        _stop([process for _, process in running.values()])
        watcher.update(_rows(tasks, {}))
    return _rows(tasks, {})


def parallelism(tasks: Sequence[TrainingTask]) -> tuple[int, int]:
    """(jobs side by side, threads of each): what the recipe says, or what fills the cores."""
    if not tasks:
        return 1, 1
    train = tasks[0].job.train
    workers = train.workers or max(1, cores() // max(1, train.threads))
    workers = min(workers, len(tasks))
    return workers, train.threads or max(1, cores() // workers)


def _rows(
    tasks: Sequence[TrainingTask], running: dict[Path, tuple[TrainingTask, subprocess.Popen[bytes]]]
) -> list[ProgressRow]:
    return [ProgressRow(task, read_status(task.directory), task.directory in running) for task in tasks]


def _start(task: TrainingTask, threads: int, worker: str) -> subprocess.Popen[bytes]:
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": str(threads),
        "TOKENIZERS_PARALLELISM": "false",
        "PYTHONUNBUFFERED": "1",
    }
    command = [
        *(sys.executable, "-m", worker, str(task.directory)),
        *("--threads", str(threads), "--parent", str(os.getpid())),
    ]
    with task.log.open("ab") as log:
        # A session of its own: Ctrl-C reaches only the parent, which then stops its workers in order.
        return subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            env=environment,
            start_new_session=True,
        )


def _settle(task: TrainingTask, code: int) -> None:
    """Make sure that a worker which died without a word leaves an explanation."""
    status = read_status(task.directory)
    if code == 0 or status.state == "failed":
        return
    if code < 0:
        reason = f"killed by {signal.Signals(-code).name}"
        if code == -signal.SIGKILL:
            reason += ", perhaps for lack of memory (fewer train.workers need less)"
    else:
        reason = f"ended with exit code {code}"
    write_status(task.directory, replace(status, state="failed", error=reason))


def _stop(processes: Sequence[subprocess.Popen[bytes]]) -> None:
    for process in processes:
        process.terminate()
    deadline = time.monotonic() + STOP_SECONDS
    for process in processes:
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(max(0.0, deadline - time.monotonic()))
        if process.poll() is None:
            process.kill()
            process.wait()

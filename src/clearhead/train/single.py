"""One job in this process: what `clearhead train` and `clearhead evaluate` do."""

import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from clearhead.runs.directory import check_space, check_writable, open_run, set_aside
from clearhead.runs.lock import RunError, exclusive
from clearhead.runs.recipe import Recipe
from clearhead.runs.status import read_status
from clearhead.train.comparison import bytes_needed, check_loggers, check_models, job_directory, prepare_rows
from clearhead.train.pool import POLL_SECONDS, ProgressRow, Silent, TrainingTask, Watcher, is_trained, place
from clearhead.train.worker import run_job

# How long another process waits for the first one without a word.
PATIENCE_SECONDS = 60.0


def train_single(
    recipe: Recipe,
    run_dir: Path,
    *,
    arm: str,
    seed: int,
    fresh: bool,
    say: Callable[[str], None],
    watcher: Watcher | None = None,
) -> Path:
    """Train one arm with one seed and return its job directory. Under torchrun every process calls this.

    watcher: is told how far the training is, by the first process.
    Raises RunError when the run directory cannot be used, ValueError or OSError from training.
    """
    # A recipe that cannot be run leaves everything as it was.
    from clearhead.train.begun import with_attention
    from clearhead.train.spread import rows_of_device

    parameters = check_models(recipe)
    check_loggers(recipe)
    recipe = with_attention(recipe)
    task = _task(recipe, run_dir, arm, seed)
    world = int(os.environ.get("WORLD_SIZE", "1"))
    rows_of_device(task.job, world)
    distributed = world > 1
    if fresh and distributed:
        raise RunError(f"--fresh does not work under torchrun; move {str(run_dir)!r} away and start again")
    with ExitStack() as held:
        # Under torchrun the first process keeps the books for all.
        if int(os.environ.get("RANK", "0")) == 0:
            if fresh:
                set_aside(run_dir, say)
            check_writable(run_dir)
            held.enter_context(exclusive(run_dir, f"the run {str(run_dir)!r}"))
            open_run(run_dir, recipe)
            check_space(run_dir, bytes_needed([task], parameters))
            place(task, prepare_rows(recipe, run_dir, say))
            held.enter_context(_watched(task, watcher or Silent()))
        else:
            _await(task)
        run_job(task.job, task.directory, evaluate=False)
    return task.directory


def _await(task: TrainingTask) -> None:
    """Wait until the first process has made the run and placed the job.

    What another writes before, such as a model to begin with, would make the directory one that is no run. Whoever
    started the processes ends them all when the first one fails.
    """
    placed = task.directory / "job.json"
    begun, said = time.monotonic(), False
    while not placed.exists():
        if not said and time.monotonic() - begun > PATIENCE_SECONDS:
            said = True
            print(
                f"waiting for {str(placed)!r}, which the first process writes: all machines must share the run's "
                "directory",
                file=sys.stderr,
                flush=True,
            )
        time.sleep(POLL_SECONDS)


@contextmanager
def _watched(task: TrainingTask, watcher: Watcher) -> Iterator[None]:
    """Tell `watcher` what the job's status.json says, from a thread of its own, while the block runs."""
    ended = threading.Event()

    def row(running: bool) -> ProgressRow:
        return ProgressRow(task, read_status(task.directory), running)

    def watch() -> None:
        while not ended.wait(POLL_SECONDS):
            watcher.update([row(True)])

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()
        watcher.update([row(False)])


def _task(recipe: Recipe, run_dir: Path, arm: str, seed: int) -> TrainingTask:
    found = recipe.arm(arm)
    rate = None
    if recipe.sweep is not None:
        from clearhead.train.sweep import chosen_rates

        rate = chosen_rates(run_dir).get(found.name)
        if rate is None:
            raise RunError(
                f"the recipe sweeps the learning rate and {str(run_dir)!r} has no result of it for {found.name!r} yet; "
                "clearhead compare makes it"
            )
    job = recipe.for_arm(arm, seed, learning_rate=rate)
    return TrainingTask(job, job_directory(run_dir, found.slug, seed), found.name)


def find_jobs(path: Path) -> list[Path]:
    """The job directories that `path` means: those of a run, the one itself, or the one whose model it is.

    Raises RunError when there is none with a trained model.
    """
    if path.name == "model" and (path.parent / "job.json").exists():
        path = path.parent
    if (path / "job.json").exists():
        jobs = [path]
    elif (path / "recipe.toml").exists():
        jobs = sorted(job.parent for job in path.glob("arms/*/seed-*/job.json"))
    else:
        raise RunError(f"{str(path)!r} is neither a run directory nor a trained model of one")
    trained = [job for job in jobs if is_trained(job)]
    if not trained:
        raise RunError(
            f"{str(path)!r} has no trained model yet; clearhead compare or clearhead train makes one"
        )
    return trained

"""All budgets of one arm, size and seed in one process: the trunk once, then each budget's decay off it.

A branch is an ordinary job whose directory is given the trunk's checkpoint of the step at which its decay begins, and
goes on from it as an interrupted job does from its own. So it ends with the weights of a training of that budget alone.
"""

import json
import shutil
import threading
import time
from dataclasses import replace
from pathlib import Path
from types import TracebackType

from clearhead.runs.directory import kept_data
from clearhead.runs.files import read_lines, write_json, write_text
from clearhead.runs.grid import branch_directory, branch_job, trunk_job
from clearhead.runs.recipe import Job
from clearhead.runs.status import Status, read_status, write_status
from clearhead.train.pool import TrainingTask, is_trained, place
from clearhead.train.worker import main, run_job

TRUNK = "trunk"
SIZE = "size.json"
WATCH_SECONDS = 1.0


def run_family(job: Job, folder: Path) -> None:
    """Train the trunk of `job` and every branch in `folder`, evaluate the branches; what is finished stays.

    Raises whatever training or evaluation raises; called again it goes on from the last checkpoints.
    """
    began = kept_data(folder)
    write_json(folder / SIZE, measures(job))
    trunk = trunk_job(job)
    branches = [(branch_job(job, tokens), folder / branch_directory(tokens)) for tokens in job.branches]
    place(TrainingTask(trunk, folder / TRUNK, job.arm), began)
    for branch, directory in branches:
        place(TrainingTask(branch, directory, job.arm), began)
    with Tally(folder, job.steps, trunk, branches):
        if not all(is_trained(directory) for _, directory in branches):
            run_job(trunk, folder / TRUNK)
        for branch, directory in branches:
            if not is_trained(directory):
                graft(folder / TRUNK, branch, directory)
            run_job(branch, directory)
    shutil.rmtree(folder / TRUNK / "checkpoints", ignore_errors=True)
    write_status(folder, replace(read_status(folder), state="evaluated", seconds_left=0.0, error=None))


def graft(trunk: Path, branch: Job, directory: Path) -> None:
    """Give a branch that has not begun the trunk's checkpoint and log at the step where its decay begins.

    Without that checkpoint (somebody removed a finished branch) it trains the whole way by itself, to the same end.
    """
    step = branch.train.decay_start
    name = f"checkpoint-{step}"
    checkpoints = directory / "checkpoints"
    if any(checkpoints.glob("checkpoint-*")) or not (trunk / "checkpoints" / name).exists():
        return
    checkpoints.mkdir(parents=True, exist_ok=True)
    records = [record for record in read_lines(trunk / "metrics.jsonl") if record["step"] <= step]
    write_text(directory / "metrics.jsonl", "".join(json.dumps(record) + "\n" for record in records))
    part = checkpoints / f".{name}.part"
    shutil.rmtree(part, ignore_errors=True)
    shutil.copytree(trunk / "checkpoints" / name, part)
    part.replace(checkpoints / name)


def measures(job: Job) -> dict[str, float]:
    """N without embeddings, all parameters, and training FLOPs a token, of the job's model."""
    from clearhead.models import ClearheadConfig
    from clearhead.models.cost import forward_flops_per_token, parameters

    config = ClearheadConfig(vocab_size=job.tokenizer.vocab_size, **job.model)
    total = parameters(config)
    embeddings = config.vocab_size * config.hidden_size * (1 if config.tie_word_embeddings else 2)
    return {
        "parameters": total,
        "non_embedding_parameters": total - embeddings,
        "flops_per_token": 3 * forward_flops_per_token(config, job.data.length),
    }


class Tally:
    """Keeps the family's `status.json` at the sum of its parts while they run."""

    def __init__(self, folder: Path, steps: int, trunk: Job, branches: list[tuple[Job, Path]]) -> None:
        self.folder = folder
        self.trunk = trunk
        self.branches = branches
        self.steps = steps
        self._first = self.done()[0]
        self._started = time.monotonic()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def done(self) -> tuple[int, float | None]:
        """Steps done, shared ones once, and the last loss of the part that runs."""
        status = read_status(self.folder / TRUNK)
        trained = [is_trained(directory) for _, directory in self.branches]
        total = self.trunk.train.steps if all(trained) else status.step
        loss = status.loss
        for (job, directory), finished in zip(self.branches, trained, strict=True):
            found = read_status(directory)
            step = job.train.steps if finished else found.step
            total += max(0, step - job.train.decay_start)
            loss = found.loss if found.loss is not None else loss
        return total, loss

    def write(self) -> None:
        """Bring the family's status up to date."""
        done, loss = self.done()
        seconds, fresh = time.monotonic() - self._started, done - self._first
        speed = fresh / seconds if fresh else None
        status = Status(
            state="training",
            step=done,
            steps=self.steps,
            tokens=done * self.trunk.train.batch_tokens,
            tokens_per_second=None if speed is None else speed * self.trunk.train.batch_tokens,
            seconds_left=None if speed is None else (self.steps - done) / speed,
            loss=loss,
            note=read_status(self.folder).note,
        )
        write_status(self.folder, status)

    def __enter__(self) -> "Tally":
        self.write()
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop.set()
        self._thread.join()
        if kind is None:
            self.write()

    def _watch(self) -> None:
        while not self._stop.wait(WATCH_SECONDS):
            self.write()


if __name__ == "__main__":
    raise SystemExit(main(run_family))

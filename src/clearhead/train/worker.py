"""One job in its own process: `python -m clearhead.train.worker JOBDIR --threads N` trains and evaluates it.

Progress goes to `status.json`, everything printed to the caller's log. The exit code is 0 when the job is complete.
"""

import argparse
import contextlib
import os
import signal
import threading
import time
import traceback
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from clearhead.runs.lock import exclusive
from clearhead.runs.recipe import Job
from clearhead.runs.recipe_io import load_job
from clearhead.runs.status import read_status, write_status

# How long a new worker waits for one that is being stopped to let go of the job.
HANDOVER_SECONDS = 10.0


def run_job(job: Job, job_dir: Path, *, evaluate: bool = True) -> None:
    """Train the job in `job_dir` unless it is trained, then evaluate it unless it is evaluated.

    Raises whatever training or evaluation raises; the job can be run again and goes on from its last checkpoint.
    """
    from clearhead.train.trainer import train_job

    # Under torchrun every process trains and the first one does the rest.
    first = int(os.environ.get("RANK", "0")) == 0
    train_job(job, job_dir)
    if first and read_status(job_dir).state != "evaluated":
        write_status(job_dir, replace(read_status(job_dir), state="trained", seconds_left=0.0, error=None))
    if evaluate and first and read_status(job_dir).state != "evaluated":
        from clearhead.evals.runner import evaluate_job

        evaluate_job(job_dir)
        write_status(job_dir, replace(read_status(job_dir), state="evaluated", error=None))


def sentence(error: BaseException) -> str:
    """What went wrong in one line; for what is not one of our own errors, with the kind of error."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if isinstance(error, (ValueError, OSError)) else f"{type(error).__name__}: {text}"


def _end_with(parent: int) -> None:
    """Stop this process when the one that started it is gone: nobody would read or resume what it does."""

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(0.5)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def main(run: Callable[[Job, Path], None] | None = None) -> int:
    """The process of one job: `run`, by default `run_job`, brings it to completion."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("job_dir", type=Path)
    parser.add_argument("--threads", type=int, required=True)
    parser.add_argument("--parent", type=int, required=True, help="process id without which this one ends")
    arguments = parser.parse_args()
    _end_with(arguments.parent)
    # As every other signal: the parent says what happened, and the log needs no traceback of it.
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    job_dir: Path = arguments.job_dir
    try:
        with exclusive(job_dir, f"the job {str(job_dir)!r}", wait=HANDOVER_SECONDS):
            import torch

            torch.set_num_threads(arguments.threads)
            (run or run_job)(load_job(job_dir / "job.json"), job_dir)
    except Exception as error:
        # A full disk takes neither of them; the parent finds that out for itself.
        with contextlib.suppress(OSError):
            traceback.print_exc()
        with contextlib.suppress(OSError):
            write_status(job_dir, replace(read_status(job_dir), state="failed", error=sentence(error)))
        return 1
    return 0


if __name__ == "__main__":
    raise SystemExit(main())

"""Stands in for the training worker: the seed of the job says what becomes of it."""

import argparse
import os
import signal
import time
from dataclasses import replace
from pathlib import Path

from clearhead.runs.recipe_io import load_job
from clearhead.runs.status import read_status, write_status

FINE, FAILS, KILLED, HANGS, SILENT = range(5)


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("job_dir", type=Path)
    parser.add_argument("--threads", type=int)
    parser.add_argument("--parent", type=int)
    directory = parser.parse_args().job_dir
    seed = load_job(directory / "job.json").seed
    with (directory / "calls").open("a") as calls:
        calls.write("x")
    first = len((directory / "calls").read_text()) == 1
    write_status(directory, replace(read_status(directory), state="training", step=1))
    if seed == FAILS:
        write_status(directory, replace(read_status(directory), state="failed", error="the reason"))
        return 1
    if seed == KILLED:
        os.kill(os.getpid(), signal.SIGKILL)
    if seed == HANGS and first:
        time.sleep(60)
    if seed == SILENT:
        return 3
    write_status(directory, replace(read_status(directory), state="evaluated"))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())

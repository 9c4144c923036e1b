"""Several processes on one machine that work together: `python -m tests.parallel.ranks JOB FOLDER [PROCESSES]`.

JOB is "module:function", called in every process as function(folder, rank). The modules are imported once, then the
process forks: half of the time that two processes take is their imports.
"""

import importlib
import os
import subprocess
import sys
from datetime import timedelta
from pathlib import Path
from typing import Any

MEETING = "meeting-place"


def run(job: str, folder: Path, processes: int = 2) -> None:
    """AssertionError with the end of what the processes printed if one fails."""
    (folder / MEETING).unlink(missing_ok=True)
    command = [sys.executable, "-m", "tests.parallel.ranks", job, str(folder), str(processes)]
    settings = {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "TQDM_DISABLE": "1"}
    done = subprocess.run(
        command,
        capture_output=True,
        text=True,
        env={**os.environ, **settings, "PYTHONPATH": os.pathsep.join(sys.path)},
        cwd=Path(__file__).parents[2],
        stdin=subprocess.DEVNULL,
    )
    assert done.returncode == 0, (done.stdout + done.stderr)[-6000:]


def _work(rank: int, job: str, folder: str, processes: int) -> None:
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(processes)}
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder}/{MEETING}",
        rank=rank,
        world_size=processes,
        timeout=timedelta(minutes=10),
    )
    module, _, name = job.partition(":")
    function: Any = getattr(importlib.import_module(module), name)
    function(Path(folder), rank)
    dist.barrier()
    dist.destroy_process_group()


def main(job: str, folder: str, processes: str = "2") -> None:
    import torch.multiprocessing as mp

    importlib.import_module(job.partition(":")[0])
    count = int(processes)
    mp.start_processes(_work, (job, folder, count), count, start_method="fork")


if __name__ == "__main__":
    main(*sys.argv[1:])

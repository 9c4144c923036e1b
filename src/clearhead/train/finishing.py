"""The end of a training: what it cost, the model in one step, and its checkpoints gone."""

import shutil
from pathlib import Path
from typing import Any

import torch

from clearhead.data.prepare import PreparedData
from clearhead.data.writing import writing
from clearhead.models.cost import forward_flops_per_token, kv_bytes_per_token
from clearhead.runs.checksums import CHECKSUMS, seal, sync
from clearhead.runs.files import write_json
from clearhead.runs.grid import branching_steps
from clearhead.runs.recipe import Job
from clearhead.train.begun import forget_start
from clearhead.train.callbacks import Journal
from clearhead.train.checkpoint import drop_old
from clearhead.train.memory import peak_memory
from clearhead.train.trainable import TrainedPart, trained_numbers


def finish(
    job: Job,
    job_dir: Path,
    model: Any,
    trained: TrainedPart,
    data: PreparedData,
    journal: Journal,
    steps: int,
) -> None:
    """Write the cost and, last and in one step, the model; then the checkpoints are not needed any more."""
    tokens = steps * job.train.batch_tokens
    count = trained_numbers(model, trained)
    trained.merge()
    write_json(
        job_dir / "cost.json",
        {
            "trained_parameters": count,
            "parameters": sum(p.numel() for p in model.parameters()),
            "flops_per_token": 3 * forward_flops_per_token(model.config, job.data.length),
            "kv_bytes_per_token": kv_bytes_per_token(model.config, torch.float32),
            "tokens": tokens,
            "tokens_per_second": tokens / journal.seconds,
            "peak_memory_bytes": peak_memory(),
            "seconds": journal.seconds,
        },
    )
    part = job_dir / ".model.part"
    shutil.rmtree(part, ignore_errors=True)
    with writing(job_dir / "model"):
        model.save_pretrained(part)
        data.tokenizer.save_pretrained(part)
        seal(part, CHECKSUMS)
        part.replace(job_dir / "model")
        sync(job_dir)
    drop_checkpoints(job, job_dir)
    forget_start(job_dir)


def drop_checkpoints(job: Job, job_dir: Path) -> None:
    """Nothing goes on from them any more, but for the branches of a trunk."""
    if job.branches:
        drop_old(job_dir / "checkpoints", 0, branching_steps(job))
    else:
        shutil.rmtree(job_dir / "checkpoints", ignore_errors=True)

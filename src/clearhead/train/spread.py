"""What `[train.parallel]` of a recipe does to a training: rows of a device, compiled layers, sharding."""

import os

import torch
from transformers import PreTrainedModel, TrainingArguments

from clearhead.models.blocks import ClearheadLayer
from clearhead.runs.recipe import Job
from clearhead.train.callbacks import TrainingError

COMPILER = "inductor"


def rows_of_device(job: Job, processes: int) -> tuple[int, int]:
    """Rows that a process takes at a time, and how often before it steps. Raises TrainingError if they do not fit."""
    length, wanted = job.data.length, job.train.parallel.rows
    rows_per_step = job.train.batch_tokens // length
    if rows_per_step % processes:
        raise TrainingError(
            f"train.batch_tokens is {rows_per_step} rows a step, which {processes} processes cannot share evenly; "
            f"make it a multiple of {processes * length}"
        )
    share = rows_per_step // processes
    rows = wanted or share
    if share % rows:
        raise TrainingError(
            f"train.parallel.rows = {rows} does not divide the {share} rows of a step that each of {processes} "
            f"processes has; make train.batch_tokens a multiple of {processes * rows * length}, or change rows"
        )
    return rows, share // rows


def spread(model: PreTrainedModel, job: Job, arguments: TrainingArguments) -> None:
    """Compile the layers and share the model out, as the recipe says. Raises TrainingError beside Accelerate's FSDP."""
    chosen = job.train.parallel
    if chosen.compile:
        _compile(model)
    if not chosen.fsdp or int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return
    if os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true":
        raise TrainingError(
            "Accelerate's configuration has FSDP, and train.parallel.fsdp shards the model as well; leave it out of "
            "the configuration"
        )
    from clearhead.train.sharded import shard

    # The device is chosen, and the processes meet, when it is first asked for.
    shard(model, arguments.device.type)


def _compile(model: PreTrainedModel) -> None:
    """Every layer by itself: one graph serves all of a kind, and what stands between them may break it."""
    layers = [module for module in model.modules() if isinstance(module, ClearheadLayer)]
    # A layer's own numbers, such as V1's first λ, make a graph of its own.
    limit = torch._dynamo.config.recompile_limit
    torch._dynamo.config.recompile_limit = max(limit, 2 * len(layers) + 8)
    for layer in layers:
        layer.compile(backend=COMPILER)

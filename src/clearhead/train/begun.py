"""Models that begin with a checkpoint: opened, retrofitted, and told how far their training is."""

from __future__ import annotations

import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from clearhead.data.began import check_sets, set_stamps
from clearhead.data.prepare import PreparedData
from clearhead.models.causal import ClearheadForCausalLM
from clearhead.models.config import ClearheadConfig
from clearhead.runs.directory import kept_data
from clearhead.runs.recipe import Arm, ArmRetrofit, Job, Recipe
from clearhead.variants.schedule import advance

START = "start"


def begun_model(job: Job, job_dir: Path, data: PreparedData) -> ClearheadForCausalLM:
    """The model that the job begins with, in float32: its checkpoint, with the arm's retrofit.

    It is written to `job_dir / "start"` once, checked against its source on text, so that a resumed job begins with the
    same weights. Raises ValueError, in a sentence, where the checkpoint or the tokenizer does not fit.
    """
    assert job.start is not None
    folder = job_dir / START
    with FileLock(job_dir / ".start.lock"):
        if not (folder / "config.json").exists():
            check_files(job_dir, files_begun_with([job.start]))
            _write(job, folder)
    model = ClearheadForCausalLM.from_pretrained(folder, dtype=torch.float32)
    vocabulary = len(data.tokenizer)
    if vocabulary > model.config.vocab_size:
        raise ValueError(
            f"tokenizer.source has {vocabulary} tokens, but {job.start!r} has {model.config.vocab_size} embeddings; "
            "give the checkpoint's own tokenizer"
        )
    return model


def forget_start(job_dir: Path) -> None:
    """Remove what a finished job does not need any more."""
    shutil.rmtree(job_dir / START, ignore_errors=True)
    (job_dir / ".start.lock").unlink(missing_ok=True)


def _write(job: Job, folder: Path) -> None:
    from clearhead.convert.retrofit import retrofit
    from clearhead.convert.run import convert

    assert job.start is not None
    if job.retrofit is None:
        convert(job.start, folder)
    else:
        retrofit(job.start, folder, _plan(job.retrofit, job.seed))


def _plan(asked: ArmRetrofit, seed: int) -> Any:
    from clearhead.convert.retrofit import RetrofitPlan

    layers = asked.layers if isinstance(asked.layers, str) else tuple(asked.layers)
    return RetrofitPlan(asked.attention, asked.init, layers, asked.options, asked.heads, seed=seed)


def begun_config(recipe: Recipe, arm: Arm, seed: int) -> ClearheadConfig:
    """The configuration that `arm` has with `seed`, without reading weights; ValueError where there is none."""
    from clearhead.convert.retrofit import Retrofit
    from clearhead.convert.source import find_converter, open_source

    named = recipe.start_of(seed)
    assert named is not None
    source = open_source(named)
    config = find_converter(source)[1].configuration(source)
    return config if arm.retrofit is None else Retrofit(_plan(arm.retrofit, seed)).outline(config)


def files_read(source: Recipe | Job) -> dict[str, str]:
    """Path -> fingerprint of the files that training reads beside the corpus: instructions and examples."""
    return set_stamps({"data": source.data.instructions, "texts": source.data.examples.source})


def files_begun_with(starts: Iterable[str | None]) -> dict[str, str]:
    """The same of the checkpoints that trainings begin with."""
    from clearhead.convert.source import open_source
    from clearhead.data.cache import fingerprint

    named = dict.fromkeys(start for start in starts if start is not None)
    return {str(file): fingerprint(file) for name in named for file in open_source(name).files}


def check_files(job_dir: Path, now: Mapping[str, str]) -> None:
    """Raise CorpusError, naming the file, unless what was just read is what the run of this job began with."""
    check_sets((kept_data(job_dir) or {}).get("evaluation_sets", {}), now, "file")


class Schedules(TrainerCallback):
    """Tells the model's schedules, before every step, which one it is."""

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        advance(kwargs["model"], state.global_step + 1)

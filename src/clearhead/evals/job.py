"""Evaluating a trained job: load the model once, run what has no result yet, write each result whole."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from clearhead.evals.base import Evaluation, Subject
from clearhead.evals.results import read_json, read_metrics
from clearhead.registry import resolve
from clearhead.train.recipe import Job
from clearhead.train.recipe_io import load_job
from clearhead.train.status import write_json

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def evaluate_job(
    job_dir: Path, suites: Sequence[str] | None = None, *, progress: Callable[[str], None] | None = None
) -> list[str]:
    """Run the evaluations of a trained job and write ``results/<name>.json`` for each; returns the names that ran.

    suites: the evaluations to run, default those of the job's recipe. One that has a result with the same options is
    not run again, so an interrupted evaluation goes on where it was.
    Raises FileNotFoundError when the job is not trained, ValueError for an unknown evaluation.
    """
    job = load_job(job_dir / "job.json")
    if not (job_dir / "model" / "config.json").exists():
        raise FileNotFoundError(f"{job_dir} has no trained model yet; train it before evaluating it")
    loader = _Loader(job, job_dir)
    ran = []
    for name in suites or job.evaluate.suites:
        evaluation: Evaluation[Any] = resolve("evaluations", name)()
        config = evaluation.Config.model_validate(job.evaluate.options(name))
        options = config.model_dump(mode="json")
        target = job_dir / "results" / f"{name}.json"
        if _is_done(target, options):
            continue
        if progress is not None:
            progress(f"{job.arm}, seed {job.seed}: {name}")
        started = time.monotonic()
        values = evaluation.run(loader.subject, config)
        target.parent.mkdir(exist_ok=True)
        write_json(
            target,
            {
                "evaluation": name,
                "arm": job.arm,
                "seed": job.seed,
                "config": options,
                "seconds": round(time.monotonic() - started, 2),
                "values": values,
            },
        )
        ran.append(name)
    return ran


def _is_done(target: Path, options: dict[str, Any]) -> bool:
    """Whether a result with these options exists; a broken file counts as none, for it is about to be replaced."""
    try:
        record = read_json(target)
    except ValueError:
        return False
    return bool(record) and record.get("config") == options


class _Loader:
    """Loads model and data when the first evaluation needs them: a finished job costs nothing."""

    def __init__(self, job: Job, job_dir: Path) -> None:
        self.job = job
        self.job_dir = job_dir

    @cached_property
    def subject(self) -> Subject:
        from transformers import AutoModelForCausalLM

        import clearhead.models  # noqa: F401  registers the model family with the Auto classes
        from clearhead.data.packing import prepare
        from clearhead.train.rows import data_spec, needle_range

        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        data = prepare(data_spec(self.job))
        model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(
            self.job_dir / "model", device_map=device
        ).eval()

        def untrained() -> PreTrainedModel:
            with torch.random.fork_rng():
                torch.manual_seed(self.job.seed)
                return AutoModelForCausalLM.from_config(model.config).to(device).eval()

        return Subject(
            model=model,
            tokenizer=data.tokenizer,
            data=data,
            device=device,
            untrained=untrained,
            seed=self.job.seed,
            training_length=self.job.data.length,
            needles=needle_range(self.job),
            metrics=read_metrics(self.job_dir / "metrics.jsonl"),
            budget=self.job.train.tokens,
        )

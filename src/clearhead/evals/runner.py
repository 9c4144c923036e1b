"""Evaluating a model: load it once, run what has no result yet, write each result whole."""

from __future__ import annotations

import time
import tomllib
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import torch
from pydantic import ValidationError

from clearhead.data.began import check_sets, set_stamps
from clearhead.data.opening import open_pretrained
from clearhead.evals.evaluation import Evaluation, Say
from clearhead.evals.finite import watched
from clearhead.evals.subject import Subject
from clearhead.evals.subjects.external import DEFAULT_SUITES, ExternalLoader, ExternalSpec, open_external_run
from clearhead.registry import did_you_mean, resolve
from clearhead.runs.checksums import check_model
from clearhead.runs.directory import kept_data
from clearhead.runs.files import not_finite, plain, write_json
from clearhead.runs.lock import exclusive
from clearhead.runs.recipe import Job
from clearhead.runs.recipe_io import load_job
from clearhead.runs.results import Skipped, read_metrics, read_result
from clearhead.runs.secrets import redacted
from clearhead.runs.status import Status, write_status

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Options = Mapping[str, Mapping[str, Any]]
"""Evaluation -> its options."""


class Loader(Protocol):
    """What gives a subject when it is first asked for."""

    @property
    def subject(self) -> Subject: ...


def evaluate_job(
    job_dir: Path,
    suites: Sequence[str] | None = None,
    *,
    options: Options | None = None,
    progress: Say | None = None,
) -> list[str]:
    """Run the evaluations of a trained job and write `results/<name>.json` for each; returns the names that ran.

    suites: the evaluations to run, default those of the job's recipe. One that has a result with the same options is
    not run again, so an interrupted evaluation goes on where it was.
    options: instead of single options of the recipe.
    Raises FileNotFoundError when the job is not trained, ValueError for an unknown evaluation or option.
    """
    job = load_job(job_dir / "job.json")
    if not (job_dir / "model" / "config.json").exists():
        raise FileNotFoundError(f"{job_dir} has no trained model yet; train it before evaluating it")
    chosen = list(suites or job.evaluate.suites)
    given = {name: {**job.evaluate.options(name), **(options or {}).get(name, {})} for name in chosen}
    return run_suites(JobLoader(job, job_dir), job_dir, given, job.arm, job.seed, progress)


def evaluate_external(
    spec: ExternalSpec,
    directory: Path,
    suites: Sequence[str] | None = None,
    *,
    options: Options | None = None,
    progress: Say | None = None,
) -> list[str]:
    """Run evaluations of a model that was not trained here; the results form a run directory of their own.

    Raises ValueError for a model that cannot be loaded and for an unknown evaluation or option, RunError for a
    directory of something else. What is finished is not run again.
    """
    chosen = list(suites or DEFAULT_SUITES)
    given = {name: dict((options or {}).get(name, {})) for name in chosen}
    for name in chosen:
        checked(name, given[name])
    loader = ExternalLoader(spec, progress)
    # A model that is not there leaves no directory behind.
    _ = loader.config
    with exclusive(directory, f"the run {str(directory)!r}"):
        job = open_external_run(directory, loader, chosen)
        loader.folder = job / "results"
        ran = run_suites(loader, job, given, spec.name, 0, progress)
        write_status(job, Status("evaluated"))
    return ran


def run_suites(
    loader: Loader, job_dir: Path, given: Options, arm: str, seed: int, progress: Say | None
) -> list[str]:
    """Each evaluation with its options, unless its result is there; the names of those that ran."""
    ran = []
    began = (kept_data(job_dir) or {}).get("evaluation_sets", {})
    # All options are checked before the first evaluation takes its time.
    ready = {name: checked(name, options) for name, options in given.items()}
    for name, (evaluation, config) in ready.items():
        plain = config.model_dump(mode="json")
        target = job_dir / "results" / f"{name}.json"
        sets = set_stamps(plain)
        check_sets(began, sets)
        if _is_done(target, plain, sets):
            continue
        if progress is not None:
            progress(f"{arm}, seed {seed}: {name}")
        started = time.monotonic()
        values = measured(evaluation, loader.subject, config, progress)
        check_sets(sets, set_stamps(plain))
        if progress is not None and (remark := evaluation.remark(values)):
            progress(remark)
        target.parent.mkdir(exist_ok=True)
        write_json(
            target,
            {
                "evaluation": name,
                "arm": arm,
                "seed": seed,
                "config": plain,
                **({"sets": sets} if sets else {}),
                "seconds": round(time.monotonic() - started, 2),
                "values": values,
            },
        )
        ran.append(name)
    return ran


def measured(
    evaluation: Evaluation[Any, Any], subject: Subject, config: Any, progress: Say | None = None
) -> dict[str, Any]:
    """What the evaluation found, or why it means nothing: weights or logits that are no numbers."""
    if subject.broken is not None:
        return Skipped(subject.broken).values()
    with watched(subject.model) as watch:
        values = evaluation.run(subject, config, progress)
    if Skipped.read(values) is not None:
        return values
    if watch.reason is not None and not evaluation.tells_overflow:
        return Skipped(watch.reason).values()
    # A report computes with all numbers of a result, so one that is none takes the others with it.
    place = not_finite(values)
    return (
        values
        if place is None
        else {**Skipped(f"not all of it are numbers: {place}").values(), **plain(values)}
    )


def checked(name: str, options: Mapping[str, Any]) -> tuple[Evaluation[Any, Any], Any]:
    """An evaluation and its checked options; ValueError with the nearest name for what it does not know."""
    evaluation: Evaluation[Any, Any] = resolve("evaluations", name)()
    try:
        return evaluation, evaluation.Config.model_validate(dict(options))
    except ValidationError as error:
        detail = error.errors()[0]
        key = ".".join(map(str, detail["loc"]))
        if detail["type"] == "extra_forbidden":
            known = list(evaluation.Config.model_fields)
            raise ValueError(f"{name} has no option {key!r}: {did_you_mean(key, known)}") from None
        if detail["type"] == "value_error":
            # A check of our own says what is wrong, in its own words.
            said = detail["msg"].removeprefix("Value error, ")
            raise ValueError(f"{name}.{key}: {said}") from None
        raise ValueError(f"{name}.{key}: {detail['msg'].lower()}, got {_short(detail['input'])}") from None


def _short(value: Any) -> str:
    """What was given, as an error may show it."""
    shown = redacted(repr(value))
    return shown if len(shown) <= 200 else f"{shown[:200]}…"


def parse_options(texts: Sequence[str], suites: Sequence[str]) -> dict[str, dict[str, Any]]:
    """`["samples=10"]` or `["passkey.samples=10"]` -> options by evaluation; the value is TOML, else a string.

    Without its evaluation's name an option is that of the only one in `suites`.
    Raises ValueError for what is not of this form or names an evaluation that is not run.
    """
    found: dict[str, dict[str, Any]] = {}
    for text in texts:
        key, equals, value = text.partition("=")
        name, dot, option = key.strip().rpartition(".")
        if not equals or not option:
            raise ValueError(f"--set {redacted(text)!r} is not of the form key=value")
        if not dot:
            if len(suites) != 1:
                shown = redacted(text)
                raise ValueError(
                    f"--set {shown!r} does not say of which evaluation; write EVALUATION.{shown}"
                )
            name = suites[0]
        if name not in suites:
            raise ValueError(f"--set {redacted(text)!r}: {name!r} is not run; {did_you_mean(name, suites)}")
        try:
            found.setdefault(name, {})[option] = tomllib.loads(f"value = {value}")["value"]
        except (ValueError, RecursionError) as error:
            if not isinstance(error, tomllib.TOMLDecodeError):
                raise ValueError(
                    f"--set {key.strip()}: its value is no number or table that can be read"
                ) from None
            found.setdefault(name, {})[option] = value
    return found


def _is_done(target: Path, options: dict[str, Any], sets: Mapping[str, str]) -> bool:
    """Whether a result with these options, of these sets, exists; a broken file, about to be replaced, is none."""
    try:
        record = read_result(target)
    except ValueError:
        return False
    if not record or record.get("broken"):
        return False
    return record.get("config") == options and record.get("sets", sets) == sets


class JobLoader:
    """Loads model and data when the first evaluation needs them: a finished job costs nothing."""

    def __init__(self, job: Job, job_dir: Path) -> None:
        self.job = job
        self.job_dir = job_dir

    @cached_property
    def subject(self) -> Subject:
        from clearhead.data.prepare import prepare
        from clearhead.models.tasks import task_of
        from clearhead.runs.rows import data_spec, needle_range

        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        data = prepare(data_spec(self.job), began=kept_data(self.job_dir))
        check_model(self.job_dir / "model")
        task = task_of(self.job.task)
        model: PreTrainedModel = open_pretrained(
            task.auto_class, self.job_dir / "model", device_map=device, use_safetensors=True
        ).eval()

        def untrained() -> PreTrainedModel:
            with torch.random.fork_rng():
                torch.manual_seed(self.job.seed)
                return task.auto_class.from_config(model.config).to(device).eval()  # type: ignore[no-any-return]

        return Subject(
            model=model,
            tokenizer=data.tokenizer,
            open_documents=lambda: data.validation,
            task=self.job.task,
            held_out=lambda count: task.held_out(self.job, data, count),
            labels=task.labels(self.job),
            device=device,
            untrained=untrained,
            seed=self.job.seed,
            training_length=self.job.data.length,
            needles=needle_range(self.job),
            metrics=read_metrics(self.job_dir / "metrics.jsonl"),
            budget=self.job.train.tokens,
            folder=self.job_dir / "results",
        )

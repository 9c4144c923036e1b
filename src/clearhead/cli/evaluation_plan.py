"""What `clearhead evaluate` was asked for, worked out before anything is loaded, measured or written."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from clearhead.evals.subjects.external import DEFAULT_SUITES, ExternalSpec, is_external, reopened
from clearhead.evals.suite import Suite, load_suite
from clearhead.registry import resolve
from clearhead.runs.recipe import RecipeError


@dataclass(frozen=True)
class EvaluateArguments:
    """The command line of one `clearhead evaluate`.

    suites: evaluations to run, all that the subject's recipe or the suite file names where it is empty.
    settings: options as KEY=VALUE or EVALUATION.KEY=VALUE.
    file: a suite of evaluations; sets: the directory of its data.
    corpus, out: the text and the run directory for a model that was not trained here.
    lm_eval: tasks of lm-evaluation-harness, separated by commas.
    """

    subject: str
    suites: Sequence[str] = ()
    settings: Sequence[str] = ()
    file: Path | None = None
    sets: Path | None = None
    corpus: str | None = None
    out: Path | None = None
    lm_eval: str | None = None


@dataclass(frozen=True)
class TrainedPlan:
    """Jobs that were trained here. An empty `suites` means those that each job's recipe names."""

    jobs: tuple[Path, ...]
    suites: tuple[str, ...]
    settings: tuple[str, ...]


@dataclass(frozen=True)
class ExternalPlan:
    """A model from elsewhere: its run directory, and the evaluations with their options.

    left_out: evaluations of the suite file that cannot be run, and why.
    """

    spec: ExternalSpec
    directory: Path
    options: Mapping[str, Mapping[str, Any]]
    left_out: Mapping[str, str] = field(default_factory=dict)


def plan_evaluation(asked: EvaluateArguments) -> TrainedPlan | ExternalPlan:
    """Look at the subject and the options; reads the suite file and names of files, writes nothing.

    Raises RecipeError, RunError or ValueError in one sentence for what cannot be run.
    """
    suites, settings = list(asked.suites), list(asked.settings)
    if asked.lm_eval is not None:
        tasks = [task.strip() for task in asked.lm_eval.split(",") if task.strip()]
        suites, settings = [*suites, "lm_eval"], [*settings, f"lm_eval.tasks={tasks}"]
    for name in suites:
        resolve("evaluations", name)
    earlier = reopened(Path(asked.subject)) if Path(asked.subject).is_dir() else None
    suite = Suite() if asked.file is None else load_suite(asked.file, asked.sets)
    text = ExternalSpec(asked.subject, asked.corpus or suite.corpus.source, suite.corpus.text_field)
    spec = earlier or (text if is_external(asked.subject) else None)
    if spec is not None:
        directory = Path(asked.subject) if earlier else asked.out or Path("runs") / spec.name
        return _external(spec, directory, suite, suites, settings)
    if asked.file is not None:
        raise RecipeError(
            f"--config is for models not trained here; {asked.subject!r} has a recipe of its own"
        )
    from clearhead.train.single import find_jobs

    return TrainedPlan(tuple(find_jobs(Path(asked.subject))), tuple(suites), tuple(settings))


def _external(
    spec: ExternalSpec, directory: Path, suite: Suite, suites: Sequence[str], settings: Sequence[str]
) -> ExternalPlan:
    from clearhead.evals.runner import parse_options

    chosen = list(suites or suite.evaluate.suites or DEFAULT_SUITES)
    given = parse_options(settings, chosen)
    left_out = {name: why for name, why in suite.left_out.items() if name in chosen and name not in given}
    options = {
        name: {**suite.evaluate.options(name), **given.get(name, {})}
        for name in chosen
        if name not in left_out
    }
    if not options:
        reasons = "; ".join(f"{name} is left out: {why}" for name, why in left_out.items())
        raise RecipeError(f"no evaluation is left to run: {reasons}")
    return ExternalPlan(spec, directory, options, left_out)

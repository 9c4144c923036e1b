"""`clearhead evaluate`: run evaluations on the models of a run, on one of them, or on any causal language model."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from clearhead.cli.console import AsJson, interruptible, print_json, say

if TYPE_CHECKING:
    from clearhead.cli.evaluation_plan import ExternalPlan, TrainedPlan

Results = dict[str, dict[str, Any]]
"""Job directory -> evaluation -> its record."""


def _show_include_path(asked: bool) -> None:
    if asked:
        from clearhead.lm_eval_tasks import INCLUDE_PATH

        typer.echo(INCLUDE_PATH)
        raise typer.Exit()


def command(
    subject: Annotated[
        str,
        typer.Argument(
            help="A run or job directory, a directory with a Hugging Face model, a GGUF file, or a hub id.",
            show_default=False,
        ),
    ],
    suite: Annotated[
        list[str] | None,
        typer.Option(help="Only this evaluation; may be given several times.", show_default=False),
    ] = None,
    set_: Annotated[
        list[str] | None,
        typer.Option(
            "--set",
            help="An option, KEY=VALUE or EVALUATION.KEY=VALUE, such as samples=50.",
            show_default=False,
        ),
    ] = None,
    config: Annotated[
        Path | None,
        typer.Option(
            help="Evaluations and options, such as recipes/evaluate/smollm2.toml, for a model not trained here.",
            show_default="none",
        ),
    ] = None,
    sets: Annotated[
        Path | None,
        typer.Option(help="Directory that {sets} stands for in --config.", show_default="none"),
    ] = None,
    corpus: Annotated[
        str | None,
        typer.Option(
            help="Text for a model not trained here: a path, a glob, stdlib or hf:owner/name.",
            show_default="that of --config, else stdlib",
        ),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(help="Run directory for a model not trained here.", show_default="runs/NAME"),
    ] = None,
    lm_eval: Annotated[
        str | None,
        typer.Option(
            "--lm-eval",
            help="Tasks of lm-evaluation-harness, such as hellaswag,arc_easy.",
            show_default="none",
        ),
    ] = None,
    lm_eval_path: Annotated[
        bool,
        typer.Option(
            "--lm-eval-path",
            help="Only say where the tasks for lm-evaluation-harness are, for its --include_path.",
            callback=_show_include_path,
            is_eager=True,
        ),
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Evaluate what was trained; results that are there already are measured again only when their options changed."""
    from clearhead.cli.evaluation_plan import EvaluateArguments, ExternalPlan, plan_evaluation

    plan = plan_evaluation(
        EvaluateArguments(subject, suite or (), set_ or (), config, sets, corpus, out, lm_eval)
    )
    # What follows is slow to import; a wrong argument has been answered by now.
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    with interruptible("interrupted; the same command goes on with what is not measured yet"):
        found = _evaluate_external(plan) if isinstance(plan, ExternalPlan) else _evaluate_trained(plan)
    if as_json:
        print_json(found)


def _evaluate_external(plan: "ExternalPlan") -> Results:
    from clearhead.evals.runner import evaluate_external

    for name, why in plan.left_out.items():
        say(f"{name} is left out: {why}")
    evaluate_external(plan.spec, plan.directory, list(plan.options), options=plan.options, progress=say)
    say(f"results: {plan.directory}; clearhead report {plan.directory} draws them")
    job = next(iter(plan.directory.glob("arms/*/seed-*")))
    return {str(job): _records(job, list(plan.options))}


def _evaluate_trained(plan: "TrainedPlan") -> Results:
    from clearhead.evals.runner import evaluate_job, parse_options
    from clearhead.runs.recipe_io import load_job

    found = {}
    for job in plan.jobs:
        suites = plan.suites or load_job(job / "job.json").evaluate.suites
        evaluate_job(job, plan.suites or None, options=parse_options(plan.settings, suites), progress=say)
        found[str(job)] = _records(job, plan.suites or suites)
    return found


def _records(job: Path, names: Sequence[str]) -> dict[str, Any]:
    """What each evaluation of a job found, with its options; those that ran without a result are left out."""
    from clearhead.runs.results import read_result

    paths = {name: job / "results" / f"{name}.json" for name in names}
    return {name: read_result(path) for name, path in paths.items() if path.exists()}

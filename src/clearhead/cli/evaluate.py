"""`clearhead evaluate`: run evaluations on the models of a run, on one of them, or on any causal language model."""

from pathlib import Path
from typing import Annotated

import typer

from clearhead.cli.console import interruptible, say


def _show_include_path(asked: bool) -> None:
    if asked:
        from clearhead.lm_eval_tasks import INCLUDE_PATH

        typer.echo(INCLUDE_PATH)
        raise typer.Exit()


def command(
    subject: Annotated[
        str,
        typer.Argument(
            help="A run directory, a job directory or its model, a directory with a Hugging Face model, or a hub id.",
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
    corpus: Annotated[
        str, typer.Option(help="Text for a model not trained here: a path, a glob, stdlib or hf:owner/name.")
    ] = "stdlib",
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
) -> None:
    """Evaluate what was trained; results that are there already are measured again only when their options changed."""
    from clearhead.evals.foreign import DEFAULT_SUITES, ForeignSpec, is_foreign, reopened
    from clearhead.registry import resolve

    if lm_eval is not None:
        tasks = [task.strip() for task in lm_eval.split(",") if task.strip()]
        suite, set_ = [*(suite or ()), "lm_eval"], [*(set_ or ()), f"lm_eval.tasks={tasks}"]
    for name in suite or ():
        resolve("evaluations", name)
    earlier = reopened(Path(subject)) if Path(subject).is_dir() else None
    foreign = earlier or (ForeignSpec(subject, corpus) if is_foreign(subject) else None)
    from transformers.utils.logging import disable_progress_bar

    from clearhead.evals.job import evaluate_foreign, evaluate_job, parse_options

    disable_progress_bar()
    with interruptible("interrupted; the same command goes on with what is not measured yet"):
        if foreign is not None:
            directory = Path(subject) if earlier else out or Path("runs") / foreign.name
            options = parse_options(set_ or (), suite or DEFAULT_SUITES)
            evaluate_foreign(foreign, directory, suite, options=options, progress=say)
            say(f"results: {directory}; clearhead report {directory} draws them")
            return
        from clearhead.train.recipe_io import load_job
        from clearhead.train.single import find_jobs

        for job_dir in find_jobs(Path(subject)):
            suites = suite or load_job(job_dir / "job.json").evaluate.suites
            evaluate_job(job_dir, suite, options=parse_options(set_ or (), suites), progress=say)

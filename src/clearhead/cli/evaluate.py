"""`clearhead evaluate`: run evaluations on the models of a run, on one of them, or on any causal language model."""

from pathlib import Path
from typing import Annotated

import typer

from clearhead.cli.console import fail, interruptible, say


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
) -> None:
    """Evaluate what was trained; results that are there already are measured again only when their options changed."""
    from clearhead.evals.subjects.external import DEFAULT_SUITES, ExternalSpec, is_external, reopened
    from clearhead.evals.suite import Suite, load_suite
    from clearhead.registry import resolve

    if lm_eval is not None:
        tasks = [task.strip() for task in lm_eval.split(",") if task.strip()]
        suite, set_ = [*(suite or ()), "lm_eval"], [*(set_ or ()), f"lm_eval.tasks={tasks}"]
    for name in suite or ():
        resolve("evaluations", name)
    earlier = reopened(Path(subject)) if Path(subject).is_dir() else None
    planned = Suite() if config is None else load_suite(config, sets)
    text = ExternalSpec(subject, corpus or planned.corpus.source, planned.corpus.text_field)
    external = earlier or (text if is_external(subject) else None)
    if config is not None and external is None:
        fail(f"--config is for models not trained here; {subject!r} has a recipe of its own", code=2)
    from transformers.utils.logging import disable_progress_bar

    from clearhead.evals.runner import evaluate_external, evaluate_job, parse_options

    disable_progress_bar()
    with interruptible("interrupted; the same command goes on with what is not measured yet"):
        if external is not None:
            directory = Path(subject) if earlier else out or Path("runs") / external.name
            chosen = suite or planned.evaluate.suites or list(DEFAULT_SUITES)
            given = parse_options(set_ or (), chosen)
            options = {name: {**planned.evaluate.options(name), **given.get(name, {})} for name in chosen}
            for name, why in planned.left_out.items():
                if name in chosen:
                    say(f"{name} is left out: {why}")
            wanted = [name for name in chosen if name not in planned.left_out or name in given]
            if not wanted:
                fail("no evaluation is left to run", code=2)
            evaluate_external(external, directory, wanted, options=options, progress=say)
            say(f"results: {directory}; clearhead report {directory} draws them")
            return
        from clearhead.runs.recipe_io import load_job
        from clearhead.train.single import find_jobs

        for job_dir in find_jobs(Path(subject)):
            suites = suite or load_job(job_dir / "job.json").evaluate.suites
            evaluate_job(job_dir, suite, options=parse_options(set_ or (), suites), progress=say)

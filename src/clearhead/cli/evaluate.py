"""`clearhead evaluate`: run evaluations on the trained models of a run, or on one model."""

from pathlib import Path
from typing import Annotated

import typer

from clearhead.cli.console import say


def command(
    subject: Annotated[
        Path, typer.Argument(help="A run directory, a job directory or its model.", show_default=False)
    ],
    suite: Annotated[
        list[str] | None,
        typer.Option(help="Only this evaluation; may be given several times.", show_default=False),
    ] = None,
) -> None:
    """Evaluate what was trained; results that are there already are measured again only when their options changed."""
    from clearhead.train.single import find_jobs

    jobs = find_jobs(subject)
    from transformers.utils.logging import disable_progress_bar

    from clearhead.evals.job import evaluate_job

    disable_progress_bar()
    for job_dir in jobs:
        evaluate_job(job_dir, suite or None, progress=say)

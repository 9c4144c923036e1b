"""`clearhead report`: make the report of a run again from its files."""

from pathlib import Path
from typing import Annotated

import typer

from clearhead.cli.console import AsJson, say


def command(
    run: Annotated[Path, typer.Argument(help="A run directory, such as runs/demo.", show_default=False)],
    as_json: AsJson = False,
) -> None:
    """Write report.html and the charts of RUN from the results on disk, and print the results."""
    from clearhead.cli.results import print_results
    from clearhead.report.build import build_report

    report = build_report(run)
    print_results(run, report, as_json=as_json)
    say(f"report: {report}")

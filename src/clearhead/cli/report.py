"""`clearhead report`: make the report of a run again from its files, once or for as long as the run goes on."""

from pathlib import Path
from typing import Annotated

import typer

from clearhead.cli.console import AsJson, interruptible, say


def command(
    run: Annotated[Path, typer.Argument(help="A run directory, such as runs/demo.", show_default=False)],
    watch: Annotated[
        bool, typer.Option("--watch", help="Draw it again while the run goes on, until all of it is there.")
    ] = False,
    serve: Annotated[
        bool, typer.Option("--serve", help="The same, and serve it on this machine alone (127.0.0.1).")
    ] = False,
    port: Annotated[int, typer.Option(min=0, max=65535, help="Of --serve; 0 takes a free one.")] = 8765,
    every: Annotated[int, typer.Option(min=1, help="Seconds between two looks at the run.")] = 20,
    as_json: AsJson = False,
) -> None:
    """Write report.html and the charts of RUN from the results on disk, and print the results.

    With --watch or --serve the page in the browser loads itself again; Ctrl-C ends both, the run goes on.
    """
    from clearhead.cli.results import print_results
    from clearhead.report.build import build_report

    if watch or serve:
        from clearhead.report.live import served, watched

        with interruptible("the report is no longer drawn; the run goes on"):
            if serve:
                build_report(run)  # What is no run is refused before there is an address.
                with served(run, port) as address:
                    say(f"the report is at {address} until Ctrl-C")
                    watched(run, every, say, forever=True)
            else:
                watched(run, every, say)
    report = build_report(run)
    print_results(run, as_json=as_json)
    say(f"report: {report}")

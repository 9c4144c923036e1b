"""The results of a run in the terminal: the report's table and its answers."""

from pathlib import Path
from typing import TYPE_CHECKING

from clearhead.cli.console import fail, print_json, say
from clearhead.runs.files import read_object

if TYPE_CHECKING:
    from clearhead.train.comparison import ComparisonOutcome


def finish(outcome: "ComparisonOutcome", run_dir: Path, *, as_json: bool) -> None:
    """Write the report, print the results, and end with exit code 1 and the first failure where a job failed."""
    from clearhead.report.build import build_report

    report = build_report(run_dir)
    print_results(run_dir, as_json=as_json)
    say(f"report: {report}")
    if outcome.failed:
        worst = outcome.failed[0]
        count = f"{len(outcome.failed)} of {len(outcome.rows)} jobs failed"
        name = f"{worst.task.label}, seed {worst.task.job.seed}"
        fail(f"{count}; {name}: {worst.status.error}; its log: {worst.task.log}", code=1)


def print_results(run_dir: Path, *, as_json: bool = False) -> None:
    """Print what the report of `run_dir` wrote to `summary.json`, on standard output.

    as_json: as it stands there, with the path of the report.
    """
    if as_json:
        print_json({**read_object(run_dir / "summary.json"), "report": str(run_dir / "report.html")})
        return
    from rich.markup import escape

    from clearhead.cli.tables import WholeTable, results_console

    summary = read_object(run_dir / "summary.json")
    console = results_console()
    headers, rows = summary["table"]["headers"], summary["table"]["rows"]
    if len(rows) == 1:
        # One model and many numbers: they go below each other, not side by side.
        headers, rows = ["", rows[0][0]], [list(pair) for pair in zip(headers[1:], rows[0][1:], strict=True)]
    table = WholeTable(*map(escape, headers), title=escape(summary["name"]))
    for row in rows:
        table.add_row(*("–" if cell is None else escape(cell) for cell in row))
    console.print(table)
    console.print(summary["state"], markup=False)
    for answer in summary["answers"]:
        if answer["question"] and answer["arms"]:
            console.print(f"\n{answer['question']}\n  {answer['answer']}", markup=False)

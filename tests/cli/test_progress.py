"""What a person sees while jobs run."""

from dataclasses import replace
from pathlib import Path

import pytest
from rich.console import Console

from clearhead.cli.console import duration, seconds_left
from clearhead.cli.progress import LiveTable, PlainLines
from clearhead.runs.recipe_io import parse_recipe
from clearhead.runs.status import Status
from clearhead.train.comparison import arm_tasks
from clearhead.train.pool import ProgressRow


@pytest.fixture
def rows() -> list[ProgressRow]:
    train = {"tokens": 4096 * 10}
    raw = {"name": "t", "seeds": [0, 1], "arms": [{"name": "A"}, {"name": "B [x]"}], "train": train}
    tasks = arm_tasks(parse_recipe(raw, source="test"), Path("run"))
    training = Status(
        "training", step=5, steps=10, tokens=4096 * 5, tokens_per_second=4096.0, seconds_left=5.0, loss=2.5
    )
    statuses = [
        Status("evaluated", step=10, steps=10, tokens=40960),
        training,
        Status("failed", step=3, steps=10, tokens=4096 * 3, error="why"),
        Status(steps=10),
    ]
    return [
        ProgressRow(task, status, status is training) for task, status in zip(tasks, statuses, strict=True)
    ]


def test_durations() -> None:
    assert [duration(value) for value in (None, 0, 61, 3723.9)] == ["–", "0:00", "1:01", "1:02:03"]


def test_time_left_is_over_all_jobs(rows: list[ProgressRow]) -> None:
    # Half of one job and all of another, at 4,096 tokens a second.
    assert seconds_left(rows) == 15
    assert seconds_left([replace(row, running=False) for row in rows]) is None
    assert seconds_left(rows[:1]) == 0


def test_table(rows: list[ProgressRow]) -> None:
    console = Console(width=100, force_terminal=False)
    with console.capture() as captured:
        console.print(LiveTable().table(rows))
    text = captured.get()
    assert "1 of 4 done" in text
    assert "training left: 0:15" in text
    lines = [[cell.strip() for cell in line.split("│")[1:-1]] for line in text.splitlines() if "│" in line]
    assert lines == [
        ["A", "0", "10/10", "–", "–", "–", "done"],
        ["B [x]", "0", "5/10", "2.500", "4,096", "0:05", "training"],
        ["A", "1", "3/10", "–", "–", "–", "failed"],
        ["B [x]", "1", "0/10", "–", "–", "–", "waiting"],
    ]


def test_plain_lines_are_said_once(rows: list[ProgressRow], capsys: pytest.CaptureFixture[str]) -> None:
    lines = PlainLines()
    for _ in range(3):
        lines.update(rows)
    said = capsys.readouterr().err.splitlines()
    assert said == [
        "A, seed 0: done, 1 of 4",
        "B [x], seed 0: training, step 5/10, loss 2.500, 4,096 tokens/s, all training left 0:15",
        "A, seed 1: failed, why",
    ]


def test_table_in_forty_columns(rows: list[ProgressRow]) -> None:
    live = LiveTable()
    live.live.console = console = Console(width=40, force_terminal=False)
    with console.capture() as captured:
        console.print(live.table(rows))
    lines = [line.rstrip() for line in captured.get().splitlines()]
    assert lines[0] == "1 of 4 done, left: 0:15"
    assert [line.split() for line in lines[1:]] == [
        ["A", "0", "100", "%", "done"],
        ["B", "[x]", "0", "50", "%", "0:05"],
        ["A", "1", "30", "%", "failed"],
        ["B", "[x]", "1", "0", "%", "waiting"],
    ]
    assert max(map(len, lines)) <= 40

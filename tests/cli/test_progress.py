"""What a person sees while jobs run."""

import threading
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
from rich.console import Console

from clearhead.cli.console import duration
from clearhead.cli.progress import LiveTable, PlainLines, phase
from clearhead.runs.recipe_io import parse_recipe
from clearhead.runs.status import State, Status, write_status
from clearhead.train import single
from clearhead.train.comparison import arm_tasks
from clearhead.train.forecast import Forecast, TimeLeft
from clearhead.train.pool import ProgressRow, Watcher


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


class Clock:
    """A clock that a test moves."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def test_time_left_is_over_all_jobs(rows: list[ProgressRow]) -> None:
    # Half of one job and all of another, at 4,096 tokens a second, one after the other; evaluations come on top.
    assert Forecast().left(rows) == TimeLeft(15.0, False)
    assert Forecast(evaluates=False).left(rows) == TimeLeft(15.0, True)
    assert Forecast().left(rows[:1]) == TimeLeft(0.0, True)
    assert Forecast().left(rows[3:]) is None


def test_the_forecast_comes_true(rows: list[ProgressRow]) -> None:
    """Two processes, four jobs of ten steps at one step a second, three seconds to start, five to evaluate: 36 s."""
    clock, length = Clock(), 18.0

    def state(index: int) -> ProgressRow:
        task = rows[index].task
        spent = clock.now - length * (index // 2)
        if spent < 0 or spent >= length:
            word: State = "queued" if spent < 0 else "evaluated"
            done = spent >= length
            status = Status(word, tokens=40960 * done, tokens_per_second=4096.0 if done else None)
            return ProgressRow(task, status, False)
        steps = min(10.0, max(0.0, spent - 3.0))
        word = "queued" if steps == 0 else "trained" if steps == 10 else "training"
        speed = 4096.0 if steps else None
        return ProgressRow(task, Status(word, tokens=int(4096 * steps), tokens_per_second=speed), True)

    forecast = Forecast(clock=clock)
    said = {}
    for tick in range(145):
        clock.now = tick / 4
        now = [state(index) for index in range(4)]
        forecast.update(now)
        said[clock.now] = forecast.left(now)
    assert said[2.0] is None
    early = said[4.0]
    assert early is not None and not early.complete and early.seconds == pytest.approx(9.0 + 13.25, abs=0.5)
    for moment in (18.5, 20.0, 25.0, 32.0, 35.0):
        found = said[moment]
        assert found is not None and found.complete
        assert found.seconds == pytest.approx(36.0 - moment, abs=0.8)
    assert said[36.0] == TimeLeft(0.0, True)


def test_table(rows: list[ProgressRow]) -> None:
    console = Console(width=100, force_terminal=False)
    with console.capture() as captured:
        console.print(LiveTable().table(rows))
    text = captured.get()
    assert "1 of 4 done" in text
    assert "left: at least 0:15" in text
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
        "B [x], seed 0: training, step 5/10, loss 2.500, 4,096 tokens/s, left for all at least 0:15",
        "A, seed 1: failed, why",
    ]


def test_table_in_forty_columns(rows: list[ProgressRow]) -> None:
    live = LiveTable()
    live.live.console = console = Console(width=40, force_terminal=False)
    with console.capture() as captured:
        console.print(live.table(rows))
    lines = [line.rstrip() for line in captured.get().splitlines()]
    assert lines[0] == "1 of 4 done, left: at least 0:15"
    assert [line.split() for line in lines[1:]] == [
        ["A", "0", "100", "%", "done"],
        ["B", "[x]", "0", "50", "%", "0:05"],
        ["A", "1", "30", "%", "failed"],
        ["B", "[x]", "1", "0", "%", "waiting"],
    ]
    assert max(map(len, lines)) <= 40


def test_a_training_in_this_process_is_watched_too(tmp_path: Path, rows: list[ProgressRow]) -> None:
    class Noting(Watcher):
        def __init__(self) -> None:
            self.seen: list[tuple[int, str]] = []
            self.looked = threading.Event()

        def update(self, rows: Sequence[ProgressRow]) -> None:
            (row,) = rows
            self.seen.append((row.status.step, phase(row)))
            self.looked.set()

    task, watch = replace(rows[0].task, directory=tmp_path), Noting()
    write_status(tmp_path, Status("training", step=3, steps=10))
    with single._watched(task, watch):
        assert watch.looked.wait(60)
        write_status(tmp_path, Status("trained", step=10, steps=10))
    assert watch.seen[0] == (3, "training")
    assert watch.seen[-1] == (10, "trained")
    assert LiveTable(evaluates=False).table([ProgressRow(task, Status("trained"), False)]).title == (
        "1 of 1 done, 0:00 so far, left: 0:00"
    )


def test_time_left_counts_the_decays_of_every_budget(rows: list[ProgressRow]) -> None:
    """A job with branches takes its trunk once and each budget's decay: more than the largest budget."""
    row = rows[3]
    train = row.task.job.train.model_copy(update={"schedule": "wsd", "tokens": 4096 * 100})
    job = row.task.job.model_copy(update={"train": train, "branches": (4096 * 50, 4096 * 100)})
    assert job.steps > train.steps
    status = Status("training", step=0, steps=job.steps, tokens=0, tokens_per_second=4096.0)
    found = Forecast(evaluates=False).left([ProgressRow(replace(row.task, job=job), status, True)])
    assert found == TimeLeft(float(job.steps), True)

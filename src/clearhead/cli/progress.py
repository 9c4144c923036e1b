"""How far the jobs are: a live table in a terminal, plain lines elsewhere."""

import time
from collections.abc import Sequence

from rich.console import Console
from rich.live import Live
from rich.markup import escape
from rich.table import Table

from clearhead.cli.console import duration, say
from clearhead.train.forecast import Forecast
from clearhead.train.pool import ProgressRow, Watcher

# Seconds between two plain lines about one running job.
LINE_SECONDS = 30.0
# Columns that the whole table takes; a narrower terminal gets less of it.
WIDE = 72
STYLES = {
    "starting": "cyan",
    "training": "cyan",
    "evaluating": "cyan",
    "trained": "green",
    "done": "green",
    "failed": "red",
    "waiting": "dim",
}


def phase(row: ProgressRow) -> str:
    """What the job is doing, in a word."""
    state = row.status.state
    if state == "evaluated":
        return "done"
    if state == "failed":
        return "failed"
    if not row.running:
        return "trained" if state == "trained" else "waiting"
    return {"trained": "evaluating", "queued": "starting"}.get(state, "training")


def time_left(forecast: Forecast, rows: Sequence[ProgressRow]) -> str:
    """`7:17`, or `at least 7:17` until an evaluation has been timed, or a dash before any speed is known."""
    left = forecast.left(rows)
    if left is None:
        return duration(None)
    return duration(left.seconds) if left.complete else f"at least {duration(left.seconds)}"


class LiveTable(Watcher):
    """One line a job, redrawn in place. Use as a context manager."""

    def __init__(self, evaluates: bool = True) -> None:
        self.forecast = Forecast(evaluates)
        self.start = time.monotonic()
        self.live = Live(console=Console(stderr=True), refresh_per_second=4, transient=True)

    def __enter__(self) -> "LiveTable":
        self.live.start()
        return self

    def __exit__(self, *error: object) -> None:
        self.live.stop()

    def update(self, rows: Sequence[ProgressRow]) -> None:
        self.forecast.update(rows)
        self.live.update(self.table(rows))

    def table(self, rows: Sequence[ProgressRow]) -> Table:
        console = self.live.console
        if console.width >= WIDE:
            table = self._wide(rows)
            # Names are folded; what holds numbers is as wide as they are.
            if console.measure(table).minimum <= console.width:
                return table
        return self._narrow(rows)

    def _wide(self, rows: Sequence[ProgressRow]) -> Table:
        done = sum(phase(row) in ("done", "trained") for row in rows)
        table = Table(
            title=f"{done} of {len(rows)} done, {duration(time.monotonic() - self.start)} so far, "
            f"left: {time_left(self.forecast, rows)}",
            title_justify="left",
        )
        table.add_column("arm", overflow="fold")
        table.add_column("seed", no_wrap=True)
        for column in ("step", "loss", "tokens/s", "left"):
            table.add_column(column, justify="right", no_wrap=True)
        table.add_column("", no_wrap=True)
        for row in self._visible(rows):
            status, word = row.status, phase(row)
            speed = f"{status.tokens_per_second:,.0f}" if status.tokens_per_second else "–"
            table.add_row(
                escape(row.task.label),
                str(row.task.job.seed),
                f"{status.step}/{status.steps}",
                "–" if status.loss is None else f"{status.loss:.3f}",
                speed if row.running else "–",
                duration(status.seconds_left) if word == "training" else "–",
                f"[{STYLES[word]}]{word}",
            )
        return table

    def _narrow(self, rows: Sequence[ProgressRow]) -> Table:
        """The table where a line has 40 characters: arm and seed, share done, time left or the state."""
        done = sum(phase(row) in ("done", "trained") for row in rows)
        title = f"{done} of {len(rows)} done, left: {time_left(self.forecast, rows)}"
        table = Table(title=title, title_justify="left", box=None, show_header=False, expand=True)
        table.add_column("arm", no_wrap=True, overflow="ellipsis", ratio=1)
        table.add_column("seed", justify="right", no_wrap=True)
        table.add_column("done", justify="right", no_wrap=True)
        table.add_column("state", justify="right", no_wrap=True)
        for row in self._visible(rows):
            status, word = row.status, phase(row)
            share = f"{100 * status.step // max(1, status.steps)} %"
            last = duration(status.seconds_left) if word == "training" else word
            seed = str(row.task.job.seed)
            table.add_row(escape(row.task.label), seed, share, f"[{STYLES[word]}]{last}")
        return table

    def _visible(self, rows: Sequence[ProgressRow]) -> Sequence[ProgressRow]:
        """All rows when they fit on the screen, else those that run, failed, or come next."""
        room = max(4, self.live.console.height - 6)
        if len(rows) <= room:
            return rows
        active = [row for row in rows if row.running or row.status.state == "failed"]
        waiting = [row for row in rows if phase(row) == "waiting"]
        return [*active, *waiting][:room]


class PlainLines(Watcher):
    """A line when a job changes what it does, and now and then while it trains."""

    def __init__(self, evaluates: bool = True) -> None:
        self.forecast = Forecast(evaluates)
        self.phases: dict[str, str] = {}
        self.spoken: dict[str, float] = {}

    def __enter__(self) -> "PlainLines":
        return self

    def __exit__(self, *error: object) -> None:
        pass

    def update(self, rows: Sequence[ProgressRow]) -> None:
        now = time.monotonic()
        self.forecast.update(rows)
        for row in rows:
            key, word = str(row.task.directory), phase(row)
            changed = word not in ("waiting", "starting") and self.phases.get(key) != word
            due = word == "training" and now - self.spoken.get(key, now) >= LINE_SECONDS
            if changed or due:
                say(self._line(row, word, rows))
                self.spoken[key] = now
            self.phases[key] = word

    def _line(self, row: ProgressRow, word: str, rows: Sequence[ProgressRow]) -> str:
        status = row.status
        parts = [f"{row.task.label}, seed {row.task.job.seed}: {word}"]
        if word == "failed":
            parts.append(status.error or "")
        elif word == "training" and status.loss is not None:
            parts += [f"step {status.step}/{status.steps}", f"loss {status.loss:.3f}"]
            parts += [f"{status.tokens_per_second:,.0f} tokens/s"] if status.tokens_per_second else []
            parts.append(f"left for all {time_left(self.forecast, rows)}")
        elif word == "done":
            parts.append(f"{sum(other.status.state == 'evaluated' for other in rows)} of {len(rows)}")
        return ", ".join(parts)


def watcher(*, evaluates: bool = True) -> LiveTable | PlainLines:
    """The one that suits where standard error goes; evaluates: whether the jobs are evaluated after their training."""
    return LiveTable(evaluates) if Console(stderr=True).is_terminal else PlainLines(evaluates)

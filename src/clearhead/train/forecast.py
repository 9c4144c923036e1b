"""How long a comparison still takes: from what its jobs have taken so far, starts and evaluations included.

What is left of each job is its start, its tokens at the speed of its arm, and its evaluation; the jobs that wait are
given, in their order, to the process that is free first. An arm that has not run yet is taken to be as quick as the
others on average, and so are evaluations.
"""

import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from clearhead.train.pool import ProgressRow


@dataclass
class _Seen:
    """When a job was first seen to run, to have learned something, to be trained and to be evaluated."""

    started: float | None = None
    learning: float | None = None
    trained: float | None = None
    evaluated: float | None = None


@dataclass(frozen=True)
class TimeLeft:
    """Seconds until the last job is done; `complete` unless evaluations will come of which none has been timed yet."""

    seconds: float
    complete: bool


@dataclass
class Forecast:
    """Watches the jobs and says what is left; `update` is to be called with all of them, several times a second."""

    evaluates: bool = True  # whether the jobs are evaluated after their training
    clock: Callable[[], float] = time.monotonic
    _seen: dict[Path, _Seen] = field(default_factory=dict)
    _workers: int = 1

    def update(self, rows: Sequence[ProgressRow]) -> None:
        """Note what has changed since the last call."""
        now = self.clock()
        self._workers = max(self._workers, sum(row.running for row in rows))
        for row in rows:
            seen = self._seen.setdefault(row.task.directory, _Seen())
            if row.running and seen.started is None:
                seen.started = now
            if seen.started is None:
                continue
            if row.status.state == "training" and row.status.tokens_per_second and seen.learning is None:
                seen.learning = now
            if row.status.state == "trained" and seen.trained is None:
                seen.trained = now
            if row.status.state == "evaluated" and seen.evaluated is None:
                seen.evaluated = now

    def left(self, rows: Sequence[ProgressRow]) -> TimeLeft | None:
        """The time until all of `rows` are done; None while no speed is known."""
        closed = ("evaluated", "failed") if self.evaluates else ("trained", "evaluated", "failed")
        open_rows = [row for row in rows if row.status.state not in closed]
        if not open_rows:
            return TimeLeft(0.0, True)
        speeds = self._speeds(rows)
        if not speeds and any(row.status.state != "trained" for row in open_rows):
            return None
        complete = self._evaluation() is not None or not any(self._evaluates(row) for row in open_rows)
        loads = [self._seconds(row, speeds) for row in open_rows if row.running]
        loads += [0.0] * (self._workers - len(loads))
        for row in open_rows:
            if not row.running:
                first = loads.index(min(loads))
                loads[first] += self._seconds(row, speeds)
        return TimeLeft(max(loads), complete)

    def _seconds(self, row: ProgressRow, speeds: dict[str, float]) -> float:
        """What is left of one job."""
        now, seen = self.clock(), self._seen.get(row.task.directory, _Seen())
        evaluation = (self._evaluation() or 0.0) if self._evaluates(row) else 0.0
        if row.status.state == "trained":
            return max(0.0, evaluation - (now - seen.trained if seen.trained is not None else 0.0))
        speed = speeds.get(row.task.job.arm) or _mean(speeds.values()) or 1.0
        if row.running and row.status.tokens_per_second:
            speed = row.status.tokens_per_second
        start = 0.0
        if seen.learning is None:
            start = self._start() or 0.0
            start = max(0.0, start - (now - seen.started if seen.started is not None else 0.0))
        tokens = row.task.job.steps * row.task.job.train.batch_tokens
        return start + max(0, tokens - row.status.tokens) / speed + evaluation

    def _speeds(self, rows: Sequence[ProgressRow]) -> dict[str, float]:
        """Tokens a second of each arm that has run, by its jobs' own measure."""
        found: dict[str, list[float]] = {}
        for row in rows:
            if row.status.tokens_per_second:
                found.setdefault(row.task.job.arm, []).append(row.status.tokens_per_second)
        return {arm: sum(values) / len(values) for arm, values in found.items()}

    def _evaluates(self, row: ProgressRow) -> bool:
        return self.evaluates and bool(row.task.job.evaluate.suites)

    def _start(self) -> float | None:
        """Seconds from a job's process to its first tokens, on average."""
        return _mean(
            seen.learning - seen.started
            for seen in self._seen.values()
            if seen.learning is not None and seen.started is not None
        )

    def _evaluation(self) -> float | None:
        """Seconds of an evaluation, on average."""
        return _mean(
            seen.evaluated - seen.trained
            for seen in self._seen.values()
            if seen.evaluated is not None and seen.trained is not None
        )


def _mean(values: Iterable[float]) -> float | None:
    found = list(values)
    return sum(found) / len(found) if found else None

"""The one way anything is timed here: all peers in one process, one call of each a round."""

import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch

Call = Callable[[], object]
Timed = Callable[[Call], float]
Round = Mapping[str, float]


@dataclass(frozen=True, slots=True)
class Spread:
    """Median, quartiles and the least of what was measured."""

    median: float
    q1: float
    q3: float
    least: float


def spread(values: Sequence[float]) -> Spread:
    """The `Spread` of at least one value; quartiles lie inside the data."""
    if len(values) == 1:
        return Spread(values[0], values[0], values[0], values[0])
    q1, median, q3 = statistics.quantiles(values, n=4, method="inclusive")
    return Spread(median, q1, q3, min(values))


def warm_up(peers: Mapping[str, Call], calls: int = 2) -> dict[str, str]:
    """Call every peer a few times; why, for those that cannot."""
    failed = {}
    for name, call in peers.items():
        try:
            for _ in range(calls):
                call()
        except (RuntimeError, MemoryError) as error:
            failed[name] = reason_of(error)
    return failed


def reason_of(error: BaseException) -> str:
    """What went wrong, in one line."""
    lines = str(error).strip().splitlines()
    if isinstance(error, MemoryError | torch.OutOfMemoryError) or "can't allocate memory" in str(error):
        return "it needs more memory than is free"
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__


class WallTimer:
    """Seconds of a call by a clock of this machine."""

    def __init__(self, clock: Callable[[], float] = time.perf_counter) -> None:
        self.clock = clock

    def __call__(self, call: Call) -> float:
        started = self.clock()
        call()
        return self.clock() - started


def interleaved(peers: Mapping[str, Call], rounds: int, timed: Timed | None = None) -> Iterator[Round]:
    """Seconds of each peer, round by round: a slow moment of the machine hits all of them.

    timed: gives the seconds of a call, by default by this machine's clock.

    Every round begins with another peer, so that none always runs in the same one's wake. A round is yielded when it
    is complete, so whoever stops early has whole rounds only.
    """
    timed = timed or WallTimer()
    order = list(peers)
    for index in range(rounds):
        first = index % len(order) if order else 0
        seconds = {}
        for name in (*order[first:], *order[:first]):
            seconds[name] = timed(peers[name])
        yield seconds


def ratios(rounds: Sequence[Round], name: str, reference: str) -> Spread:
    """Time of `name` over the reference's in the same round."""
    return spread([found[name] / found[reference] for found in rounds])

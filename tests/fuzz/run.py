"""`make fuzz`: random calls against float64 oracles for a while, then random kills of a small comparison.

Every finding is printed with the seed that repeats it.

python -m tests.fuzz --seconds 600 --seed 0 --processes 2 --kills 40     a run
python -m tests.fuzz --only Layer:123                                    one call again
python -m tests.fuzz --only-kill PLAN                                    one kill again
"""

import argparse
import os
import sys
import time
import warnings
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from multiprocessing import get_context
from typing import Any

import torch

from tests.fuzz import kills
from tests.fuzz.caches import Cached
from tests.fuzz.draw import Draw
from tests.fuzz.generation import Generation
from tests.fuzz.judge import Case, judge
from tests.fuzz.layers import Layer
from tests.fuzz.models import Forward
from tests.fuzz.modes import Derivative
from tests.fuzz.operations import Operation

AREAS: dict[str, type[Case]] = {
    kind.__name__: kind for kind in (Operation, Derivative, Layer, Forward, Cached, Generation)
}
# How often each is called: what takes milliseconds more often than what takes a tenth of a second.
SHARES = {"Operation": 10, "Derivative": 4, "Layer": 4, "Forward": 3, "Cached": 2, "Generation": 1}
# What follows a refusal's own number, so that a rare reason is not lost among the frequent ones.
MOST_REASONS = 12


@dataclass
class Found:
    """What came of the calls of one process."""

    verdicts: Counter[tuple[str, str]] = field(default_factory=Counter)
    reasons: Counter[str] = field(default_factory=Counter)
    findings: dict[str, list[str]] = field(default_factory=dict)

    def add(self, other: "Found") -> None:
        self.verdicts += other.verdicts
        self.reasons += other.reasons
        for kind, told in other.findings.items():
            self.findings.setdefault(kind, []).extend(told)


def calls(seed: int) -> Iterator[tuple[str, int]]:
    """Areas in turn, each with a seed of its own, without an end."""
    while True:
        for area, share in SHARES.items():
            for _ in range(share):
                seed += 1
                yield area, seed


def call(area: str, seed: int, found: Found) -> None:
    case = AREAS[area].draw(Draw(seed))
    outcome = judge(case)
    found.verdicts[area, outcome.verdict] += 1
    if outcome.verdict == "refused":
        found.reasons[outcome.kind] += 1
    if outcome.verdict in ("wrong", "crashed"):
        told = f"{case}\n  expected {outcome.expected}\n  found    {outcome.found}\n"
        told += f"  again:   python -m tests.fuzz --only {area}:{seed}"
        found.findings.setdefault(outcome.kind, []).append(told)


def work(seed: int, seconds: float) -> Found:
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    found, end = Found(), time.monotonic() + seconds
    shown = time.monotonic()
    for area, one in calls(seed):
        if time.monotonic() > end:
            return found
        call(area, one, found)
        if time.monotonic() - shown > 10 and sys.stderr.isatty():
            shown = time.monotonic()
            print(
                f"\r{found.verdicts.total()} calls, {len(found.findings)} kinds of findings, "
                f"{end - shown:.0f} s left ",
                end="",
                file=sys.stderr,
            )
    return found


def report(found: Found, seconds: float) -> int:
    total = found.verdicts.total()
    print(f"\n{total} calls in {seconds:.0f} s")
    for area in AREAS:
        counts = ", ".join(
            f"{n} {verdict}" for (name, verdict), n in sorted(found.verdicts.items()) if name == area
        )
        print(f"  {area}: {counts or 'none'}")
    for reason, n in found.reasons.most_common(MOST_REASONS):
        print(f"  refused {n} times: {reason}")
    for kind, told in found.findings.items():
        print(f"\n{len(told)} times: {kind}\n{told[0]}")
    return 1 if found.findings else 0


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__)
    parser.add_argument("--seconds", type=float, default=600)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--processes", type=int, default=min(2, os.cpu_count() or 1))
    parser.add_argument("--kills", type=int, default=40, help="kills of a small comparison, after the calls")
    parser.add_argument("--only", metavar="AREA:SEED", help="one call again")
    parser.add_argument("--only-kill", metavar="SEED|PLAN", help="one kill again, told in full")
    given = parser.parse_args()
    if given.only_kill is not None:
        one = given.only_kill
        return kills.run([int(one) if one.isdecimal() else one], verbose=True)
    found = Found()
    start = time.monotonic()
    if given.only is not None:
        area, _, seed = given.only.partition(":")
        if area not in AREAS or not seed.isdecimal():
            parser.error(f"--only {given.only!r}: expected one of {', '.join(AREAS)}, a colon and a number")
        call(area, int(seed), found)
        return report(found, time.monotonic() - start)
    with get_context("spawn").Pool(given.processes) as pool:
        tasks: list[Any] = [
            # Far enough apart that no two processes make the same calls.
            pool.apply_async(work, (given.seed + part * 10**7, given.seconds))
            for part in range(given.processes)
        ]
        for task in tasks:
            found.add(task.get())
    code = report(found, time.monotonic() - start)
    if given.kills:
        code |= kills.run(range(given.seed, given.seed + given.kills))
    return code

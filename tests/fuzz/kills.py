"""Random kills of a small comparison: whatever happens to a call, the same command ends with the same results.

A trial starts `clearhead compare`, interrupts it once or a few times, each time at an event or a moment drawn from its
seed, and calls the same command again until it ends. Weights, metrics, results and the list of files must then be, bit
for bit, those of a reference that nothing happened to; every call must have ended with a code and a sentence that a
person can use, and no process may be left. 100 seeds in a row have one interrupt of every kind, and a few more.
"""

import contextlib
import ctypes
import json
import os
import random
import re
import shlex
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from itertools import product
from pathlib import Path
from typing import Any

from tests.fuzz import comparison, interrupts
from tests.fuzz.comparison import Ended
from tests.fuzz.draw import Draw
from tests.fuzz.interrupts import Interrupt, children

ACTIONS = ("SIGKILL", "SIGTERM", "SIGINT", "SIGHUP", "disk")
PHASES = (
    "preparation",
    "before the first step",
    "training",
    "checkpoint",
    "finish",
    "between arms",
    "evaluation",
    "report",
)
# Phases, and two ways of choosing a moment that know of none.
MOMENTS = (*PHASES, "event", "time")
KINDS = [*product(MOMENTS, ACTIONS, ("self", "parent"))]
random.Random(0).shuffle(KINDS)
# What a full disk still takes of each file: nothing, a part of a line, the small files, a part of the weights.
ROOMS = (0, 60, 1000, 20_000)
# Seconds in which a worker whose parent is gone must end.
GRACE = 5.0
SUBREAPER = 36
# Children of this process from before its first call.
EARLIER: set[int] = set()
FULL = re.compile(r"No space left on device|File too large")


@dataclass(frozen=True)
class Reference:
    """The comparison that nothing happened to: its results, its events in order, and how long it took."""

    results: dict[str, Any]
    events: list[tuple[str, int]]
    phases: dict[str, list[int]]
    seconds: float


@dataclass
class Trial:
    """What one seed does."""

    seed: int
    phase: str
    planned: list[Interrupt]
    # For each call whether the clock has gone back before it, and whether what the call before left is waited for.
    back: list[bool]
    wait: list[bool]
    workers: int

    def __str__(self) -> str:
        calls = [
            f"{'clock back, ' if back else ''}{one}"
            for one, back in zip(self.planned, self.back, strict=False)
        ]
        return "; ".join([*calls, "clock back" if self.back[-1] else "nothing"]) + f"; {self.workers} at once"

    def plan(self) -> str:
        """The trial in a line. What a seed gives depends on the events of the reference, and a few of them on time."""
        return json.dumps(asdict(self))

    @classmethod
    def of(cls, plan: str) -> "Trial":
        """The trial of a seed's `plan`."""
        given = json.loads(plan)
        return cls(**{**given, "planned": [Interrupt(**one) for one in given["planned"]]})


@dataclass
class Told:
    """What came of trials."""

    trials: int = 0
    equal: int = 0
    kinds: Counter[str] = field(default_factory=Counter)
    findings: list[str] = field(default_factory=list)


def phases(events: Sequence[tuple[str, int]]) -> dict[str, list[int]]:
    """The places of the events of each phase."""
    found: dict[str, list[int]] = {}
    started = False
    stepped: set[str] = set()
    for place, (name, _) in enumerate(events):
        role, _, what = name.partition(": ")
        started = started or what.startswith("start ")
        if what == "step":
            stepped.add(role)
        if role == "parent":
            late = re.search(r"report\.html|look\.html|charts|summary\.json", what)
            phase = "report" if late else "between arms" if started else "preparation"
        elif "checkpoint-" in what:
            phase = "checkpoint"
        elif what in ("evaluation", "sample") or "results/" in what:
            phase = "evaluation"
        elif role not in stepped:
            phase = "before the first step"
        else:
            phase = "finish" if "model" in what or "cost.json" in what else "training"
        found.setdefault(phase, []).append(place)
    return found


def refer(base: Path) -> Reference:
    """The reference, made in `base`."""
    comparison.make_project(base)
    started = time.monotonic()
    ended = comparison.call(base, record=True)
    if ended.code != 0:
        raise RuntimeError(f"the comparison fails although nothing happens to it:\n{ended.said}")
    seconds = time.monotonic() - started
    counts: Counter[str] = Counter()
    events = []
    for name in (base / "events.txt").read_text(encoding="utf-8").splitlines():
        counts[name] += 1
        events.append((name, counts[name]))
    return Reference(comparison.result(base), events, phases(events), seconds)


def draw(seed: int, reference: Reference) -> Trial:
    """The trial of a seed."""
    at = Draw(seed)
    moment, action, target = KINDS[seed % len(KINDS)]
    planned = [_interrupt(at, reference, moment, action, target)]
    for _ in range(at.one(0, 0, 1, 2)):
        planned.append(_interrupt(at, reference, *at.among(KINDS)))
    planned.sort(key=lambda pair: pair[0])
    chosen = [one for _, one in planned]
    back = [False, *(at.chance(0.3) for _ in chosen)]
    return Trial(seed, moment, chosen, back, [at.chance(0.5) for _ in chosen], at.one(1, 2))


def _interrupt(
    at: Draw, reference: Reference, moment: str, action: str, target: str
) -> tuple[float, Interrupt]:
    """An interrupt, and where in a call it is."""
    room = at.among(ROOMS) if action == "disk" else at.between(0, 99)
    total = len(reference.events)
    if moment == "time":
        share = at.number(0, 1)
        return share * total, Interrupt("", 0, share * reference.seconds, action, target, room)
    place = at.among(reference.phases[moment]) if moment in PHASES else at.between(0, total - 1)
    name, nth = reference.events[place]
    return place, Interrupt(name, nth, 0.0, action, target, room)


def attempt(trial: Trial, reference: Reference, base: Path, told: Told) -> list[str]:
    """Everything that is wrong with what came of a trial."""
    comparison.make_project(base)
    wrong: list[str] = []
    for planned, back, wait in zip(trial.planned, trial.back, trial.wait, strict=False):
        if back:
            interrupts.age(base)
        ended = comparison.call(base, planned, back=back, workers=trial.workers)
        name = f"{planned.action} of {_target(planned)}"
        told.kinds[name if ended.interrupted else "not reached"] += 1
        told.kinds["clock back"] += back
        if ended.interrupted:
            wrong += unlike(planned, ended, base)
        elif ended.code != 0:
            wrong.append(f"a call that nothing happened to ended with {ended.code}: {_tail(ended)}")
        if wait:
            wrong += orphans()
    if trial.back[-1]:
        interrupts.age(base)
        told.kinds["clock back"] += 1
    ended = comparison.call(base, back=trial.back[-1], workers=trial.workers)
    wrong += orphans()
    if ended.code != 0 or "Traceback" in ended.said:
        return [*wrong, f"called again it ended with {ended.code}: {_tail(ended)}{_logs(base)}"]
    return wrong + comparison.differences(reference.results, comparison.result(base))


def _target(planned: Interrupt) -> str:
    if planned.action == "disk":
        return "all"
    return "parent" if planned.at == "parent" or planned.event.startswith("parent: ") else "worker"


def unlike(planned: Interrupt, ended: Ended, base: Path) -> list[str]:
    """What is not as a person may expect it of an interrupted call."""
    wrong = []
    target = _target(planned)
    codes = {"disk": {1, 2}, "SIGKILL": {-9}}.get(planned.action, {130}) if target != "worker" else {1}
    if not planned.event:
        # Whom it found is the machine's doing.
        codes = {1, 2, 130, -9}
        if not ended.said:
            # Before the command could listen to signals.
            codes |= {-signal.SIGHUP, -signal.SIGINT, -signal.SIGTERM}
    if ended.code not in codes | {0}:
        wrong.append(f"the call ended with {ended.code}, expected {sorted(codes)}: {_tail(ended)}")
    if "Traceback" in ended.said:
        wrong.append(f"a raw traceback: {ended.said[ended.said.index('Traceback') :]}")
    if planned.action != "disk" and (log := _logs(base)):
        wrong.append(f"a raw traceback in a log:{log}")
    last = ended.said.strip().splitlines()[-1] if ended.said.strip() else ""
    if planned.action == "disk" and ended.code in (1, 2):
        named = str(base) in last or re.search(r"\b(run|cache)/", last.partition("; its log")[0])
        if not (FULL.search(last) and named):
            wrong.append(f"the sentence for a full disk does not name the file: {_tail(ended)}{_logs(base)}")
    if ended.code == 130 and "interrupted" not in last:
        wrong.append(f"no word of the interruption: {_tail(ended)}")
    if planned.action == "disk":
        for log in base.glob("run/arms/*/*/log.txt"):
            # The reason for this call's end alone may stand there.
            log.unlink()
    return wrong


def orphans() -> list[str]:
    """Workers that outlive their parent."""
    end = time.monotonic() + GRACE
    while (left := set(children(os.getpid())) - EARLIER) and time.monotonic() < end:
        reap()
        time.sleep(0.05)
    reap()
    for pid in left:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, 9)
    return [f"{len(left)} workers were still alive {GRACE:.0f} s after their parent's end"] if left else []


def reap() -> None:
    """Take the exit codes of orphans that have ended."""
    with contextlib.suppress(ChildProcessError):
        while os.waitpid(-1, os.WNOHANG)[0]:
            pass


def _tail(ended: Ended) -> str:
    return " | ".join(ended.said.strip().splitlines()[-3:])


def _logs(base: Path) -> str:
    """The last lines of the workers' logs that hold a traceback."""
    told = ""
    for log in sorted(base.glob("run/arms/*/*/log.txt")):
        text = log.read_text(encoding="utf-8")
        if "Traceback" in text:
            told += f"\n    {log.relative_to(base)}: " + " | ".join(text.strip().splitlines()[-6:])
    return told


@contextmanager
def prepared() -> Iterator[tuple[Reference, Path]]:
    """The reference and a folder for trials, in a process that adopts what its calls leave behind."""
    if comparison.others():
        raise RuntimeError("this process has threads, and one that has cannot be forked safely")
    ctypes.CDLL(None).prctl(SUBREAPER, 1, 0, 0, 0)
    # multiprocessing leaves one behind for as long as this process lives.
    EARLIER.update(children(os.getpid()))
    comparison.load_all()
    folder = Path(tempfile.mkdtemp(prefix="clearhead-kills-"))
    try:
        yield refer(folder / "reference"), folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def run(seeds: Sequence[int | str], *, keep: bool = False, verbose: bool = False) -> int:
    """The trials of these seeds or plans; prints each finding with the command that repeats it. 0 if there is none."""
    told = Told()
    started = time.monotonic()
    with prepared() as (reference, folder):
        print(f"{len(reference.events)} events in a comparison of {reference.seconds:.1f} s", flush=True)
        for seed in seeds:
            trial = draw(seed, reference) if isinstance(seed, int) else Trial.of(seed)
            base = folder / f"seed-{trial.seed}"
            wrong = attempt(trial, reference, base, told)
            told.trials += 1
            told.equal += not wrong
            if sys.stderr.isatty():
                print(f"\r{told.trials} of {len(seeds)} kills, {told.equal} equal ", end="", file=sys.stderr)
            if verbose or wrong:
                print(f"seed {trial.seed}, {trial.phase}: {trial}", flush=True)
            for one in wrong:
                print(f"  {one}")
            if wrong:
                print(f"  again: python -m tests.fuzz --only-kill {shlex.quote(trial.plan())}", flush=True)
            if keep:
                print(f"  files: {shutil.copytree(base, Path(tempfile.mkdtemp()) / 'kept')}")
            shutil.rmtree(base, ignore_errors=True)
    print(
        f"\n{told.trials} kills in {time.monotonic() - started:.0f} s, {told.equal} equal to the uninterrupted run"
    )
    for kind, count in sorted(told.kinds.items()):
        print(f"  {kind}: {count}")
    return int(told.equal != told.trials)

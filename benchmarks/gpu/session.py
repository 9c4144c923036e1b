"""All that a GPU has to tell, in one folder and in less than eight minutes: benchmarks/gpu.sh calls it.

    benchmarks/gpu.sh                      -> benchmarks/results/gpu/<device>/
    benchmarks/gpu.sh --dry-run            what would run, and for how long
    benchmarks/gpu.sh --only gate decode   some of the steps

A gate first: where the kernels are wrong nothing is timed. Then the benches, most important first, then a search for
faster tiles and the benches of the new table. The time is kept here: a step begins only if enough is left for it, ends
when its share is over, and what it has measured by then is kept. Called again, it goes on with what is missing. The
folder has the steps' results, their logs and `session.json`; commit it as it is.
"""

import argparse
import json
import re
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
BUDGET = 470.0
# What `clearhead bench --seconds` and `tune.py --seconds` end with where something is left to do.
UNFINISHED = 75
# For the process of a step that was told to end: it finishes its line.
GRACE = 10.0


@dataclass(frozen=True)
class Step:
    """One process: what it is for, its command, the seconds it may take at most and those that make it worth beginning.

    decides: nothing after it runs if it fails.
    """

    name: str
    command: tuple[str, ...]
    most: float
    least: float
    decides: bool = False


@dataclass(frozen=True)
class Outcome:
    """How a step ended: "done", "failed", "out of time", or "not begun"."""

    name: str
    state: str
    seconds: float
    note: str = ""


# (command, log, seconds) -> exit code, or None where the time was over.
Launch = Callable[[Sequence[str], Path, float], int | None]


def steps(folder: Path, python: str = sys.executable) -> list[Step]:
    """In the order of what is worth most."""

    def bench(
        name: str, what: str, most: float, *cases: str, rounds: int = 10, file: str | None = None
    ) -> Step:
        out = folder / f"{file or what}.jsonl"
        # `--missing`: what an earlier call has measured is not measured again.
        command = (python, "-m", "clearhead", "bench", what, "--device", "cuda", "--missing", "--chart")
        chosen = tuple(x for case in cases for x in ("--case", case))
        limits = ("--rounds", str(rounds), "--seconds", str(int(most) - 10), "--out", str(out))
        return Step(name, (*command, *chosen, *limits), most, 20)

    tune, gate = str(HERE / "tune.py"), str(HERE / "gate.py")
    tuned = str(folder / "configs.json")
    return [
        Step("gate", (python, gate, "--seconds", "80"), 100, 30, decides=True),
        bench("attention", "attention", 90, "v1-d128-*-both-*", "v1-d64-4096-both-*"),
        bench("decode", "decode", 60, "v1-d128-*"),
        bench("train", "train", 70, rounds=5),
        Step("tune", (python, tune, "--seconds", "90", "--out", tuned), 110, 30),
        bench("tuned", "attention", 60, "v1-d128-*-both-*", file="attention-tuned"),
        bench("rest", "attention", 60),
    ]


def run(
    every: Sequence[Step],
    folder: Path,
    launch: Launch,
    *,
    budget: float = BUDGET,
    clock: Callable[[], float] = time.monotonic,
    say: Callable[[str], None] = print,
) -> list[Outcome]:
    """Run the steps that are not done yet, within `budget` seconds; what came of each is in `session.json`."""
    began, record = clock(), folder / "session.json"
    folder.mkdir(parents=True, exist_ok=True)
    before = {found.name: found for found in _read(record)}
    found: list[Outcome] = []
    stopped = False
    for number, step in enumerate(every, 1):
        left = budget - (clock() - began)
        earlier = before.get(step.name)
        if earlier is not None and earlier.state == "done":
            found.append(earlier)
            say(f"[{number}/{len(every)}] {step.name}: done before")
            continue
        if stopped:
            outcome = Outcome(step.name, "not begun", 0.0, "the gate failed: nothing is timed")
        elif left < step.least:
            outcome = Outcome(step.name, "not begun", 0.0, f"{left:.0f} s left, it needs {step.least:.0f}")
        else:
            most = min(step.most, left)
            say(f"[{number}/{len(every)}] {step.name}: at most {most:.0f} s of the {left:.0f} left")
            started = clock()
            code = launch(step.command, folder / f"{step.name}.log", most)
            state = {None: "out of time", UNFINISHED: "out of time", 0: "done"}.get(code, "failed")
            note = f"exit {code}" if state == "failed" else ""
            outcome = Outcome(step.name, state, round(clock() - started, 1), note)
            stopped = step.decides and state == "failed"
        note = f" ({outcome.note})" if outcome.note else ""
        say(f"[{number}/{len(every)}] {step.name}: {outcome.state}{note}, {outcome.seconds:.0f} s")
        found.append(outcome)
        record.write_text(json.dumps([asdict(o) for o in found], indent=1) + "\n", encoding="utf-8")
    return found


def _read(record: Path) -> list[Outcome]:
    try:
        return [Outcome(**entry) for entry in json.loads(record.read_text(encoding="utf-8"))]
    except (OSError, ValueError, TypeError):
        return []


def as_process(command: Sequence[str], log: Path, seconds: float) -> int | None:
    """Run it with its output in `log`; None if it was ended because its time was over."""
    with log.open("a", encoding="utf-8") as out:
        process = subprocess.Popen(command, stdout=out, stderr=subprocess.STDOUT, cwd=ROOT)
        try:
            return process.wait(max(1.0, seconds - GRACE))
        except subprocess.TimeoutExpired:
            # As Ctrl-C would: the benches keep what is complete.
            process.terminate()
            try:
                process.wait(GRACE)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
            return None


def place_of(device: str) -> Path:
    return ROOT / "benchmarks" / "results" / "gpu" / re.sub(r"[^a-z0-9]+", "-", device.lower()).strip("-")


def main(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path, nargs="?", help="by default named after the device")
    parser.add_argument("--budget", type=float, default=BUDGET, help="seconds in all")
    parser.add_argument("--only", nargs="+", default=[], help="steps by name")
    parser.add_argument("--dry-run", action="store_true")
    asked = parser.parse_args(arguments)
    if asked.dry_run:
        for step in steps(asked.folder or place_of("device")):
            print(f"{step.name:10} at most {step.most:.0f} s: {' '.join(step.command)}")
        return 0
    from clearhead.bench.cuda import device_facts, device_versions, reason_against_cuda

    reason = reason_against_cuda()
    if reason is not None:
        print(f"benchmarks/gpu.sh: {reason}; --dry-run shows what would run", file=sys.stderr)
        return 1
    facts = device_facts()
    folder = (asked.folder or place_of(str(facts["device"]))).resolve()
    every = steps(folder)
    unknown = sorted(set(asked.only) - {step.name for step in every})
    if unknown:
        print(
            f"--only: no step {unknown[0]!r}; there are {', '.join(s.name for s in every)}", file=sys.stderr
        )
        return 2
    folder.mkdir(parents=True, exist_ok=True)
    told = json.dumps({"device": facts, "versions": device_versions()}, indent=1)
    (folder / "device.json").write_text(told + "\n", encoding="utf-8")
    chosen = [step for step in every if not asked.only or step.name in asked.only]
    found = run(chosen, folder, as_process, budget=asked.budget)
    print(f"results: {folder}; call it again for what is missing, then commit the folder")
    return 0 if all(outcome.state == "done" for outcome in found) else 1


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))

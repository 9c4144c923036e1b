"""A comparison small enough to be killed often: started by fork, which costs no imports, and read at its end."""

import contextlib
import io
import json
import os
import re
import select
import signal
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path
from typing import Any, NoReturn

from tests.fuzz import interrupts
from tests.fuzz.interrupts import Inside, Interrupt, children, fill_disk
from tests.train.small import write_corpus

RECIPE = """
name = "small"
[corpus]
source = "text"
validation_fraction = 0.2
[tokenizer]
vocab_size = 300
[data]
length = 32
needle_share = 0.3
pair_share = 0.3
[data.needles]
lengths = [24, 32]
needles = [1, 2]
questions = 1
[model]
hidden_size = 16
intermediate_size = 32
num_hidden_layers = 1
num_attention_heads = 2
[train]
tokens = 1536
batch_tokens = 64
save_every = 4
log_every = 3
probe_every = 8
threads = 1
workers = 1
[evaluate]
suites = ["language_modelling", "needles", "multi_needle"]
[evaluate.needles]
lengths = [32]
needles = [1]
samples = 2
[evaluate.multi_needle]
pairs = [[1, 1], [2, 1]]
length = 240
grid = [1, 1]
lengths = [240]
depths = [0.0, 1.0]
samples = 2
haystacks = 1
max_new_tokens = 2
[[arms]]
name = "Transformer"
[[arms]]
name = "DIFF V1"
attention = "differential"
"""
# Seconds after which a call hangs; one takes a few.
PATIENCE = 240.0
# What a record says of the time that it took, of the memory, and of what this call has done.
PASSING = {"seconds", "tokens_per_second", "peak_memory_bytes", "seconds_left", "started", "note", "workers"}


@dataclass
class Ended:
    """How one call ended: its exit code, negative for a signal, and what it said on standard error."""

    code: int
    said: str
    interrupted: bool
    pids: list[int] = field(default_factory=list)


def make_project(base: Path) -> Path:
    """The recipe and its corpus in `base`."""
    write_corpus(base / "text")
    (base / "small.toml").write_text(RECIPE, encoding="utf-8")
    return base


def load_all() -> None:
    """Import whatever a call needs, once for all calls, and hear their events."""
    import torch.utils.tensorboard  # noqa: F401

    from clearhead.registry import names, resolve

    for kind in ("variants", "evaluations", "positions"):
        for name in names(kind):
            resolve(kind, name)
    interrupts.install()
    subprocess.Popen = Forking  # type: ignore[misc]


def call(
    base: Path,
    interrupt: Interrupt | None = None,
    *,
    back: bool = False,
    workers: int = 1,
    record: bool = False,
) -> Ended:
    """`clearhead compare` in `base` to its end; `interrupt` happens to it, and its clock may have gone `back`."""
    out, end = os.pipe()
    log = base / "events.txt"
    log.unlink(missing_ok=True)
    sys.stdout.flush()
    sys.stderr.flush()
    pid = os.fork()
    if pid == 0:
        os.close(out)
        os.dup2(end, 1)
        os.dup2(end, 2)
        inside = Inside("parent", base, interrupt, log, record=record)
        leave(lambda: _begin(inside, workers, back))
    os.close(end)
    return _watched(pid, out, interrupt, log)


def leave(run: Callable[[], Any]) -> NoReturn:
    """Run it and end this process as an interpreter would, without the parent's own endings."""
    code = 1
    try:
        sys.stdout = io.TextIOWrapper(io.FileIO(1, "w", closefd=False), write_through=True)
        sys.stderr = io.TextIOWrapper(io.FileIO(2, "w", closefd=False), write_through=True)
        try:
            code = int(run() or 0)
        except SystemExit as ended:
            code = ended.code if isinstance(ended.code, int) else 0 if ended.code is None else 1
        except BaseException:
            traceback.print_exc()
    except BaseException:
        code = 120
    os._exit(code)


def _begin(inside: Inside, workers: int, back: bool) -> None:
    from clearhead.cli import main

    os.chdir(inside.base)
    os.environ |= {"CLEARHEAD_CACHE": os.path.join(inside.base, "cache"), "OMP_NUM_THREADS": "1"}
    if back:
        interrupts.clock_back()
    inside.parent = os.getpid()
    interrupts.inside = inside
    sys.argv = ["clearhead", "compare", "small.toml", f"train.workers={workers}", "--out", "run"]
    for number, handler in (
        (signal.SIGINT, signal.default_int_handler),
        (signal.SIGTERM, signal.SIG_DFL),
        (signal.SIGHUP, signal.SIG_DFL),
    ):
        signal.signal(number, handler)
    main.main()


_Popen = subprocess.Popen


class Forking(_Popen):  # type: ignore[type-arg]
    """Starts a worker as its command says, but in a fork of this process, which has everything loaded."""

    def __init__(self, command: list[str], **keywords: Any) -> None:
        if "clearhead.train.worker" not in command:
            super().__init__(command, **keywords)
            return
        environment = keywords.pop("env")

        def work() -> None:
            os.closerange(3, 1024)
            # Popen gives back what Python ignores; an interpreter ignores it again.
            signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
            signal.signal(signal.SIGINT, signal.default_int_handler)
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            signal.signal(signal.SIGHUP, signal.SIG_DFL)
            leave(lambda: _work(command, environment))

        interrupts.event(f"start {Path(command[3]).parent.name}")
        super().__init__(command, preexec_fn=work, **keywords)


def _work(command: list[str], environment: dict[str, str]) -> int:
    from clearhead.train import worker

    os.environ |= environment
    outer = interrupts.inside
    assert outer is not None
    interrupts.inside = Inside(
        Path(command[3]).parent.name, Path(outer.base), outer.interrupt, outer.log, record=outer.record
    )
    interrupts.inside.parent = outer.parent
    sys.argv = ["worker", *command[3:]]
    return worker.main()


def _watched(pid: int, out: int, interrupt: Interrupt | None, log: Path) -> Ended:
    """The call's end; an interrupt that has a time and no event happens from here."""
    started, said, done, seen = time.monotonic(), b"", False, set[int]()
    code: int | None = None
    while True:
        passed = time.monotonic() - started
        if interrupt is not None and not interrupt.event and not done and passed >= interrupt.seconds:
            done = True
            workers = children(pid)
            target = workers[0] if interrupt.at == "self" and workers else pid
            if interrupt.action == "disk":
                fill_disk({pid, *workers}, interrupt.room)
            else:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(target, getattr(signal, interrupt.action))
        seen.update(children(pid))
        if select.select([out], [], [], 0.02)[0]:
            said += os.read(out, 65536)
        ended, status = os.waitpid(pid, os.WNOHANG)
        if ended:
            code = os.waitstatus_to_exitcode(status)
            break
        if passed > PATIENCE:
            os.kill(pid, signal.SIGKILL)
            code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
            said += b"\nit hangs"
            break
    os.set_blocking(out, False)
    with contextlib.suppress(BlockingIOError):
        while more := os.read(out, 65536):
            said += more
    os.close(out)
    happened = log.exists() and "interrupted" in log.read_text(encoding="utf-8")
    return Ended(code, said.decode(errors="replace"), done or happened, sorted(seen))


def result(base: Path) -> dict[str, Any]:
    """What the comparison came to: every file of the run and the cache, without what says how long it took.

    Weights, tokenizers and prepared data are given by their checksums. Of TensorBoard's files, one more for each call,
    and of the report, which shows times, only that they are there.
    """
    found: dict[str, Any] = {}
    for path in sorted([*(base / "run").rglob("*"), *(base / "cache").rglob("*")]):
        name = re.sub(r"events\.out\S*", "events", path.relative_to(base).as_posix())
        if path.is_dir() or name.endswith("/log.txt"):
            continue
        if path.suffix == ".json":
            found[name] = lasting(json.loads(path.read_text(encoding="utf-8")))
            if path.name == "summary.json":
                # Speeds, in words.
                found[name]["answers"] = [one for one in found[name]["answers"] if one["section"] != "cost"]
        elif path.suffix == ".jsonl":
            lines = path.read_text(encoding="utf-8").splitlines()
            found[name] = [lasting(json.loads(line)) for line in lines]
        elif path.suffix in (".html", ".png", ".pdf") or name.endswith("/events"):
            found[name] = "there" if path.stat().st_size else "empty"
        else:
            content = path.read_bytes()
            # How many workers there are decides nothing.
            content = re.sub(rb"\nworkers = \d+", b"", content) if path.suffix == ".toml" else content
            found[name] = sha256(content).hexdigest()
    return found


def lasting(value: Any) -> Any:
    """A JSON value without what differs between two calls that do the same."""
    if isinstance(value, dict):
        return {key: lasting(one) for key, one in value.items() if key not in PASSING}
    return [lasting(one) for one in value] if isinstance(value, list) else value


def differences(expected: dict[str, Any], found: dict[str, Any]) -> list[str]:
    """The files that differ, each in a line."""
    told = [f"{name} is missing" for name in expected if name not in found]
    told += [f"{name} is left over" for name in found if name not in expected]
    for name in expected.keys() & found.keys():
        if expected[name] != found[name]:
            told.append(f"{name} differs: {_first(expected[name], found[name])}")
    return sorted(told)


def _first(expected: Any, found: Any) -> str:
    if isinstance(expected, list) and isinstance(found, list):
        pairs = zip(expected, found, strict=False)
        place = next((i for i, (one, other) in enumerate(pairs) if one != other), None)
        if place is not None:
            return f"line {place + 1}, {_short(expected[place])} became {_short(found[place])}"
        return f"{len(expected)} lines became {len(found)}"
    if isinstance(expected, dict) and isinstance(found, dict):
        keys = [key for key in {**expected, **found} if expected.get(key) != found.get(key)]
        return ", ".join(
            f"{key} {_short(expected.get(key))} became {_short(found.get(key))}" for key in keys[:3]
        )
    return f"{_short(expected)} became {_short(found)}"


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 120 else f"{text[:120]}…"


def others() -> list[threading.Thread]:
    """Threads of this process besides the main one: none may be there when it forks."""
    return [thread for thread in threading.enumerate() if thread is not threading.main_thread()]

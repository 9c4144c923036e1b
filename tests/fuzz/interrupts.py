"""What befalls a process of a comparison, and when: at an event, which is a file operation, a step or an evaluation.

Python's audit events name every file that is opened for writing, renamed or removed; what they leave out (fsync, the
writers in Rust, steps, evaluations) is wrapped here. A disk is full by RLIMIT_FSIZE: the kernel then refuses to let any
file grow beyond a size, for Python, Rust and C++ alike and in the middle of a write. It needs no privilege, and unlike
a small file system it can begin at any event; the error is EFBIG instead of ENOSPC. The clock goes back in Python's
`time.time` and, with the next call, in the times of all files.
"""

import contextlib
import os
import re
import resource
import signal
import sys
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT
HOUR = 3600.0
# Names that differ from call to call.
PASSING = re.compile(r"(?<=events)\.out\S*|\.[^./]+-\d+-\d+(?=\.part)")


@dataclass(frozen=True)
class Interrupt:
    """One thing that happens to one call.

    when: the event, `role: what`, and which one of its name; or seconds after the start when `event` is empty.
    action: a signal's name, or `disk`.
    at: `self` is the process that has come to the event, `parent` the one that the person started.
    room: how many bytes a file still takes when the disk is full; for a file half written, the share that is.
    """

    event: str
    nth: int
    seconds: float
    action: str
    at: str
    room: int

    def __str__(self) -> str:
        when = f"at {self.event!r} number {self.nth}" if self.event else f"after {self.seconds:.2f} s"
        return f"{self.action} {when} of {self.at}"


class Inside:
    """The state of one process of a call."""

    def __init__(
        self, role: str, base: Path, interrupt: Interrupt | None, log: Path, *, record: bool
    ) -> None:
        self.role = role
        self.base = str(base)
        self.interrupt = interrupt
        self.log = log
        self.record = record
        self.seen: Counter[str] = Counter()
        self.parent = os.getpid()
        self.busy = False

    def event(self, what: str, path: str | None = None) -> None:
        """An event of this process; whatever is planned for it happens before it goes on."""
        if self.busy:
            return
        name = PASSING.sub("", f"{self.role}: {what}")
        self.seen[name] += 1
        if self.record:
            self.note(name)
        planned = self.interrupt
        if planned is not None and planned.event == name and planned.nth == self.seen[name]:
            self.interrupt = None
            self.act(planned, path)

    def note(self, text: str) -> None:
        self.busy = True
        with self.log.open("a", encoding="utf-8") as file:
            file.write(text + "\n")
        self.busy = False

    def act(self, planned: Interrupt, path: str | None) -> None:
        self.note(f"{self.role}: interrupted")
        target = self.parent if planned.at == "parent" else os.getpid()
        if planned.action == "SIGKILL" and path is not None and target == os.getpid():
            # Killed in the middle of a write, as a writer that had got that far would be.
            os.truncate(path, os.path.getsize(path) * (planned.room % 100) // 100)
        if planned.action == "disk":
            fill_disk({self.parent, os.getpid(), *children(self.parent)}, planned.room)
        else:
            os.kill(target, getattr(signal, planned.action))


inside: Inside | None = None


def event(what: str, path: str | None = None) -> None:
    if inside is not None:
        inside.event(what, path)


def children(pid: int) -> list[int]:
    """The living children of a process."""
    with contextlib.suppress(OSError):
        found = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
        return [int(one) for one in found if alive(int(one))]
    return []


def alive(pid: int) -> bool:
    """Whether the process still runs; one that nobody has asked for its exit code does not."""
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    return False


def fill_disk(pids: set[int], room: int) -> None:
    """From now on no file of these processes grows beyond `room` bytes."""
    for pid in pids:
        with contextlib.suppress(OSError):
            hard = resource.prlimit(pid, resource.RLIMIT_FSIZE)[1]
            resource.prlimit(pid, resource.RLIMIT_FSIZE, (room, hard))


def heard(kind: str, arguments: tuple[Any, ...]) -> None:
    """The audit hook: what happens to files below the comparison's folder."""
    if inside is None or kind not in ("open", "os.rename", "os.remove", "os.mkdir", "os.rmdir"):
        return
    path = arguments[0]
    if isinstance(path, int) or (kind == "open" and not (arguments[2] or 0) & WRITES):
        return
    path = os.fsdecode(path)
    inner = os.path.relpath(os.path.abspath(path), inside.base)
    # rmtree names what it removes by the folder that it has open.
    relative = kind in ("os.remove", "os.rmdir") and arguments[-1] not in (None, -1)
    if relative or not inner.startswith(".."):
        inside.event(f"{kind.removeprefix('os.')} {path if relative else inner}")


def before(owner: Any, name: str, what: str) -> None:
    """Make an event of every call of `owner.name`."""
    right: Callable[..., Any] = getattr(owner, name)

    def called(*arguments: Any, **keywords: Any) -> Any:
        event(what)
        return right(*arguments, **keywords)

    setattr(owner, name, called)


def install() -> None:
    """Hear all events of this process and of those forked from it. An audit hook stays, so this is called once."""
    import safetensors.torch

    from clearhead.evals import runner as job
    from clearhead.evals.asking import sample_log as samples
    from clearhead.train import trainer

    sys.addaudithook(heard)
    sync, write = os.fsync, safetensors.torch.serialize_file

    def synced(handle: int) -> None:
        sync(handle)
        if inside is not None:
            event(f"fsync {os.path.relpath(os.readlink(f'/proc/self/fd/{handle}'), inside.base)}")

    def written(tensors: Any, filename: Any, *arguments: Any, **keywords: Any) -> None:
        inner = os.path.relpath(filename, inside.base) if inside is not None else ""
        event(f"before {inner}")
        write(tensors, filename, *arguments, **keywords)
        event(f"within {inner}", str(filename))

    os.fsync = synced
    safetensors.torch.serialize_file = written
    before(trainer.ComparisonTrainer, "compute_loss", "step")
    before(job, "measured", "evaluation")
    before(samples.SampleLog, "add", "sample")
    before(trainer, "build_model", "model")


def clock_back() -> None:
    """The clock of this process is an hour behind what it was."""
    now, now_ns = time.time, time.time_ns
    time.time = lambda: now() - HOUR
    time.time_ns = lambda: now_ns() - int(HOUR * 1e9)


def age(folder: Path) -> None:
    """All files below a folder are of an hour later: what a clock that went back makes of them."""
    for path in folder.rglob("*"):
        found = path.stat()
        os.utime(path, (found.st_atime + HOUR, found.st_mtime + HOUR))

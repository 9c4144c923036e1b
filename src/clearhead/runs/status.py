"""`status.json`: how a job says how far it is, to whoever watches the run directory."""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from clearhead.runs.files import BrokenFile, read_object, write_json

State = Literal["queued", "training", "trained", "evaluated", "failed"]
STATES = get_args(State)
_NUMBER = (int, float, type(None))
# What each key of a status may be.
KINDS: dict[str, Any] = {
    "state": str,
    "step": int,
    "steps": int,
    "tokens": int,
    "tokens_per_second": _NUMBER,
    "seconds_left": _NUMBER,
    "loss": _NUMBER,
    "error": (str, type(None)),
    "note": (str, type(None)),
}


@dataclass(frozen=True)
class Status:
    """One job's progress; None is what is not known yet."""

    state: State = "queued"
    step: int = 0
    steps: int = 0
    tokens: int = 0
    tokens_per_second: float | None = None
    seconds_left: float | None = None
    loss: float | None = None
    error: str | None = None
    note: str | None = None  # what a person should know, though it went on


def read_status(job_dir: Path) -> Status:
    """The job's status; `queued` when it has not said anything yet. Raises BrokenFile that names a broken file."""
    path = job_dir / "status.json"
    try:
        found = read_object(path)
    except FileNotFoundError:
        return Status()
    for name, value in found.items():
        kind = KINDS.get(name)
        if kind is None:
            raise BrokenFile(f"{path} has the unknown key {name!r}; remove the file to begin it again")
        if (
            not isinstance(value, kind)
            or isinstance(value, bool)
            or (name == "state" and value not in STATES)
        ):
            raise BrokenFile(f"{path}: {name} cannot be {value!r}; remove the file to begin it again")
    return Status(**found)


def write_status(job_dir: Path, status: Status) -> None:
    """Replace the job's status in one step, so that a reader never sees half of it."""
    write_json(job_dir / "status.json", asdict(status))

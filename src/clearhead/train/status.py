"""`status.json`: how a job says how far it is, to whoever watches the run directory."""

import json
import math
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from clearhead.data.writing import writing

State = Literal["queued", "training", "trained", "evaluated", "failed"]
STATES = get_args(State)
MEND = "restore it, or delete it to have it made again"
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


class BrokenFile(ValueError):
    """A file of a run that does not hold what it should: one sentence that names it and what to do."""


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


def read_object(path: Path) -> dict[str, Any]:
    """The JSON object in `path`.

    Raises FileNotFoundError, and BrokenFile, one sentence that names the file, for anything else but an object in it.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise
    except OSError as error:
        raise BrokenFile(f"{path} cannot be read ({error.strerror or error})") from error
    except (ValueError, RecursionError) as error:
        raise BrokenFile(f"{path} is not valid JSON ({error}); {MEND}") from error
    if not isinstance(value, dict):
        raise BrokenFile(f"{path} holds a {type(value).__name__}, expected an object; {MEND}")
    return value


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The records of a `metrics.jsonl`. What a killed process left half written at the end is passed over.

    Raises BrokenFile, naming file and line, for anything else that is not a record with its step.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except FileNotFoundError:
        return []
    except (OSError, UnicodeDecodeError) as error:
        raise BrokenFile(f"{path} cannot be read ({error})") from error
    found = []
    for number, line in enumerate(lines, start=1):
        try:
            # A number that is none is one that is not there.
            record = json.loads(line, parse_constant=lambda name: None)
            int(record["step"])
        except (ValueError, TypeError, KeyError, RecursionError) as error:
            if number == len(lines):
                break
            raise BrokenFile(
                f"{path}, line {number}, is not valid JSON with a step ({error}); restore it or move it away"
            ) from error
        found.append(record)
    return found


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


def write_json(path: Path, value: Any) -> None:
    """Write `value` as JSON so that after a crash the file is either the old or the new one."""
    write_text(path, json.dumps(plain(value), indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def plain(value: Any) -> Any:
    """`value` with null for NaN and infinities, which are no JSON and stop other parsers."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {key: plain(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [plain(one) for one in value]
    return value


def write_text(path: Path, text: str) -> None:
    """Write `text` so that after a crash the file is either the old or the new one. Raises Unwritten on a full disk."""
    part = path.with_name(f".{path.name}.part")
    with writing(path):
        with part.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        part.replace(path)

"""`status.json`: how a job says how far it is, to whoever watches the run directory."""

import json
import math
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

State = Literal["queued", "training", "trained", "evaluated", "failed"]


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


def read_status(job_dir: Path) -> Status:
    """The job's status; `queued` when it has not said anything yet."""
    try:
        return Status(**json.loads((job_dir / "status.json").read_text(encoding="utf-8")))
    except FileNotFoundError:
        return Status()


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
    """Write `text` so that after a crash the file is either the old or the new one."""
    part = path.with_name(f".{path.name}.part")
    with part.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    part.replace(path)

"""Where prepared data is kept, and how it is written so that a killed process leaves nothing half done."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any

from filelock import FileLock

from clearhead.data.writing import writing

WHOLE_FILE_LIMIT = 64 * 2**20
SAMPLE_BLOCK = 2**20
SAMPLES = 64


def cache_dir() -> Path:
    """`$CLEARHEAD_CACHE` if set, else `~/.cache/clearhead`."""
    chosen = os.environ.get("CLEARHEAD_CACHE")
    return Path(chosen).expanduser() if chosen else Path.home() / ".cache" / "clearhead"


def digest_json(value: Any) -> str:
    """sha256 of the canonical JSON of `value`."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, ensure_ascii=True).encode()).hexdigest()


def fingerprint(path: Path) -> str:
    """sha256 of a file's size and content; above 64 MiB of its size and 64 evenly spaced blocks of 1 MiB.

    The sampled form keeps the start of a run on a terabyte of text in seconds.
    """
    size = path.stat().st_size
    digest = hashlib.sha256(str(size).encode())
    with path.open("rb") as file:
        if size <= WHOLE_FILE_LIMIT:
            while block := file.read(SAMPLE_BLOCK):
                digest.update(block)
        else:
            for k in range(SAMPLES):
                file.seek((size - SAMPLE_BLOCK) * k // (SAMPLES - 1))
                digest.update(file.read(SAMPLE_BLOCK))
    return digest.hexdigest()


def write_atomic(path: Path, content: bytes) -> None:
    """Write `content` so that `path` holds all of it or is left as it was. One process does so at a time."""
    path.parent.mkdir(parents=True, exist_ok=True)
    # Always the same name: what a killed process leaves goes with the next.
    part = path.with_name(f".{path.name}.part")
    with FileLock(path.with_suffix(".lock")), writing(path):
        try:
            with part.open("wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            part.replace(path)
        finally:
            part.unlink(missing_ok=True)

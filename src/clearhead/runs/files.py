"""JSON and text files of a run: written in one step, read with an error that names the file."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from clearhead.data.writing import replacing


def not_finite(value: Any, where: str = "") -> str | None:
    """The first number in JSON values that is NaN or infinite, as `cells.0.loss is nan`; None for none."""
    if isinstance(value, float):
        return None if math.isfinite(value) else f"{where or 'the value'} is {value}"
    if not isinstance(value, dict | list | tuple):
        return None
    for key, part in value.items() if isinstance(value, dict) else enumerate(value):
        if found := not_finite(part, f"{where}.{key}" if where else str(key)):
            return found
    return None


MEND = "restore it, or delete it to have it made again"


class BrokenFile(ValueError):
    """A file of a run that does not hold what it should: one sentence that names it and what to do."""


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
    with replacing(path) as part:
        part.write_text(text, encoding="utf-8")

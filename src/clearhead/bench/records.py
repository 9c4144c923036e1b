"""Results as JSON lines, one a peer."""

import contextlib
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from datetime import date
from pathlib import Path
from typing import Any

from clearhead.bench.machine import facts, versions
from clearhead.bench.measure import Spread
from clearhead.bench.outcome import MeasuredCase, MeasuredGeneration
from clearhead.data.writing import writing
from clearhead.runs.files import plain

CHARTS = (".png", ".svg")


def lines(verb: str, outcome: MeasuredCase) -> list[dict[str, Any]]:
    """One entry for every peer of a case that was measured, those that could not run with their reason."""
    case = {key: value for key, value in asdict(outcome.case).items() if key != "peers"}
    device = outcome.case.device
    common = {"machine": facts(device), "versions": versions(device), "date": date.today().isoformat()}
    return [
        {
            "verb": verb,
            "case": case,
            "peer": row.peer,
            "reference": outcome.case.peers[0],
            "reason": row.reason,
            "rounds": outcome.rounds,
            "time_ms": _scaled(row.seconds, 1e3),
            "ratio": _scaled(row.ratio, 1.0),
            "gflops": None if row.rate is None else row.rate / 1e9,
            "over_reading_kv": _scaled(row.reads, 1.0),
            "extra_bytes": row.extra_bytes,
            "generation": row.generation and _generation(row.generation),
            "yardsticks": {
                "matrix_gflops": outcome.matrix and outcome.matrix / 1e9,
                "copy_gb_s": outcome.copy and outcome.copy / 1e9,
            },
            **common,
        }
        for row in outcome.rows
    ]


def read(path: Path) -> list[dict[str, Any]]:
    """The newest line of every peer of a case in `path`; what is half written is passed over."""
    found: dict[tuple[str, str], dict[str, Any]] = {}
    text = path.read_text(encoding="utf-8", errors="replace") if path.exists() else ""
    for line in text.splitlines():
        with contextlib.suppress(ValueError, LookupError, TypeError):
            entry = json.loads(line)
            found[entry["case"]["name"], entry["peer"]] = entry
    return list(found.values())


def named(path: Path) -> frozenset[str]:
    """The names of the cases that `path` has lines of."""
    return frozenset(entry["case"]["name"] for entry in read(path))


def append(path: Path, entries: Sequence[Mapping[str, Any]]) -> None:
    """Add a line for each entry to `path`; what a killed process has left half written stays a line of its own."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a+b") as file:
        if file.tell():
            file.seek(-1, os.SEEK_END)
            if file.read(1) != b"\n":
                file.write(b"\n")
    with writing(path), path.open("a", encoding="utf-8") as out:
        for entry in entries:
            out.write(json.dumps(plain(entry), ensure_ascii=False, allow_nan=False) + "\n")


def check_target(path: Path, *, chart: bool) -> None:
    """Raises ValueError, before anything is measured, for a file that lines cannot be added to.

    chart: whether charts are drawn beside it.
    """
    if chart and path.suffix.lower() in CHARTS:
        raise ValueError(
            f"--out {str(path)!r} is where the chart would be drawn; name a file for the JSON lines, such as "
            f"{path.with_suffix('.jsonl').name!r}"
        )
    try:
        existed = path.exists()
        if path.is_dir():
            raise IsADirectoryError(0, "it is a directory; name a file for the JSON lines")
        path.open("ab").close()
        if not existed:
            path.unlink()
    except OSError as error:
        raise ValueError(
            f"cannot write to {str(path)!r} ({error.strerror or error}); choose another file with --out"
        ) from None


def _generation(found: MeasuredGeneration) -> dict[str, Any]:
    return {
        "tokens_a_second": found.tokens_a_second,
        "processor_ms": _scaled(found.processor, 1e3),
        "processor_ratio": _scaled(found.processor_ratio, 1.0),
        "first_ms": _scaled(found.first, 1e3),
        "first_ratio": _scaled(found.first_ratio, 1.0),
        "first_processor_ms": _scaled(found.first_processor, 1e3),
        "first_processor_ratio": _scaled(found.first_processor_ratio, 1.0),
        "cache_bytes": found.cache_bytes,
        "peak_bytes": found.peak_bytes,
    }


def _scaled(found: Spread | None, factor: float) -> dict[str, float] | None:
    if found is None:
        return None
    return {
        "median": found.median * factor,
        "q1": found.q1 * factor,
        "q3": found.q3 * factor,
        "min": found.least * factor,
    }

"""Timing peers against each other in one process."""

import json
import platform
import statistics
import time
from collections.abc import Callable, Mapping
from datetime import date
from pathlib import Path
from typing import Any

import torch
import transformers

RESULTS = Path(__file__).parent / "results"


def interleaved(
    peers: Mapping[str, Callable[[], None]], rounds: int, warmup: int = 3
) -> dict[str, list[float]]:
    """Seconds of each call, one call of every peer a round, so that a slow moment of the machine hits all of them."""
    times: dict[str, list[float]] = {name: [] for name in peers}
    for i in range(warmup + rounds):
        for name, call in peers.items():
            started = time.perf_counter()
            call()
            if i >= warmup:
                times[name].append(time.perf_counter() - started)
    return times


def summary(times: dict[str, list[float]], baseline: str) -> dict[str, dict[str, float]]:
    """Median and quartiles in milliseconds, and the median over rounds of the ratio to `baseline` in the same round."""
    found = {}
    for name, values in times.items():
        low, median, high = statistics.quantiles(values, n=4)
        ratios = [value / base for value, base in zip(values, times[baseline], strict=True)]
        low_ratio, ratio, high_ratio = statistics.quantiles(ratios, n=4)
        found[name] = {
            "median_ms": median * 1e3,
            "q1_ms": low * 1e3,
            "q3_ms": high * 1e3,
            "ratio": ratio,
            "ratio_q1": low_ratio,
            "ratio_q3": high_ratio,
        }
    return found


def processor() -> str:
    """The processor's name, where the system tells it."""
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def record(file: str, case: dict[str, Any], results: dict[str, Any]) -> None:
    """Append one line to `results/<file>.jsonl` and print it as a small table."""
    entry = {
        "case": case,
        "results": results,
        "machine": {
            "processor": processor(),
            "threads": torch.get_num_threads(),
            "system": platform.system(),
        },
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
        "date": date.today().isoformat(),
    }
    RESULTS.mkdir(exist_ok=True)
    with (RESULTS / f"{file}.jsonl").open("a", encoding="utf-8") as out:
        out.write(json.dumps(entry) + "\n")
    print(" ".join(f"{key}={value}" for key, value in case.items()))
    for name, row in results.items():
        print(
            f"  {name:<28}{row['median_ms']:>9.1f} ms   time over the twin's {row['ratio']:.2f} "
            f"({row['ratio_q1']:.2f} to {row['ratio_q3']:.2f})"
        )

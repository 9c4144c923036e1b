"""Calls on a GPU: timed by its own events with a cold cache, their memory, and what a line of results says of it."""

import shutil
import subprocess
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch

from clearhead.bench.measure import Call, reason_of
from clearhead.core.capability import capability_of

# More than the second-level cache of any GPU has.
FLUSHED_BYTES = 2**28
# Clock ticks that the GPU idles before a call, about a millisecond: the host sends the whole call meanwhile.
AHEAD_TICKS = 2_000_000
# What nvidia-smi is asked, and the names of its answers.
_ASKED = {
    "clocks.sm": "sm_mhz",
    "clocks.mem": "memory_mhz",
    "clocks.max.sm": "sm_mhz_at_most",
    "temperature.gpu": "celsius",
    "power.draw": "watts",
    "power.limit": "watts_at_most",
    "driver_version": "driver",
}
_PACKAGES = ("triton", "flash-attn", "flash-attn-3", "flash-attn-4")


def reason_against_cuda() -> str | None:
    """Why nothing can be measured on a GPU here, or None."""
    if torch.cuda.is_available():
        return None
    built = torch.version.cuda or torch.version.hip
    return f"PyTorch sees no GPU here ({'a driver or a device is missing' if built else 'this build is for CPUs'})"


class EventTimer:
    """Seconds of a call on the GPU, from its first kernel to its last.

    cold: the cache is overwritten before, and the GPU idles until the host has sent the call, so that launching counts
        for nothing; without it the call is timed as it comes, launching included, as a training step is.
    """

    def __init__(self, cold: bool) -> None:
        self.flush = torch.empty(FLUSHED_BYTES, dtype=torch.uint8, device="cuda") if cold else None

    def __call__(self, call: Call) -> float:
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        if self.flush is not None:
            self.flush.zero_()
            torch.cuda._sleep(AHEAD_TICKS)
        start.record()
        call()
        end.record()
        end.synchronize()
        milliseconds: float = start.elapsed_time(end)
        return milliseconds / 1e3


def peak_memory(call: Call) -> tuple[int | None, str | None]:
    """(bytes, None): what PyTorch allocated at most during the second of two calls, beyond what it held before it; or
    (None, reason)."""
    try:
        call()
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        torch.cuda.synchronize()
    except (RuntimeError, MemoryError) as error:
        torch.cuda.empty_cache()
        return None, reason_of(error)
    return torch.cuda.max_memory_allocated() - before, None


def device_facts() -> dict[str, Any]:
    """The GPU by name and capability, its memory and multiprocessors, and its clocks where nvidia-smi tells them."""
    properties = torch.cuda.get_device_properties(torch.cuda.current_device())
    return {
        "device": torch.cuda.get_device_name(),
        "capability": capability_of(torch.device("cuda")),
        "multiprocessors": properties.multi_processor_count,
        "device_memory_gb": round(properties.total_memory / 1e9, 1),
        "clocks": clocks(),
    }


def clocks() -> dict[str, str] | None:
    """What nvidia-smi says of the first GPU at this moment; None without it."""
    program = shutil.which("nvidia-smi")
    if program is None:
        return None
    command = [program, f"--query-gpu={','.join(_ASKED)}", "--format=csv,noheader,nounits", "--id=0"]
    try:
        told = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return None
    values = [value.strip() for value in told.strip().splitlines()[0].split(",")] if told.strip() else []
    return dict(zip(_ASKED.values(), values, strict=True)) if len(values) == len(_ASKED) else None


def device_versions() -> dict[str, str]:
    """Versions of what runs on the GPU: CUDA or ROCm, cuDNN, and the packages of kernels that are installed."""
    found = {"cuda": torch.version.cuda, "rocm": torch.version.hip, "cudnn": torch.backends.cudnn.version()}
    for name in _PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return {name: str(value) for name, value in found.items() if value is not None}

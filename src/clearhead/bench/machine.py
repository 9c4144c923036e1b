"""The machine: what it is, how fast it multiplies, and how much memory a run may take from it."""

import contextlib
import platform
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from clearhead.bench.cuda import device_facts, device_versions
from clearhead.bench.measure import Call, Timed, interleaved, spread, warm_up
from clearhead.runs.environment import environment

# Instructions that decide which kernels run, beyond the level that PyTorch names.
EXTENSIONS = ("avx512_bf16", "avx512_fp16", "amx_bf16", "amx_tile", "bf16", "sve")
MATRIX_SIZE, MATRIX_SIZE_ON_GPUS = 2048, 8192
# A yardstick is repeated for so many seconds, but not more often than that.
YARDSTICK_SECONDS = 0.5
YARDSTICK_ROUNDS = (5, 200)
# Of the memory that is free when a run begins; the rest belongs to others on the machine.
MEMORY_SHARE = 0.85


def matrix_rate(dtype: torch.dtype, device: str = "cpu", timed: Timed | None = None) -> float:
    """Floating-point operations per second of torch.mm of two square matrices, the same threads as all else."""
    size = MATRIX_SIZE if device == "cpu" else MATRIX_SIZE_ON_GPUS
    a, b = (torch.randn(size, size).to(device, dtype) for _ in range(2))
    out = torch.empty_like(a)
    return 2 * size**3 / _seconds(lambda: torch.mm(a, b, out=out), timed)


def _seconds(call: Call, timed: Timed | None) -> float:
    """Median over as many calls as the peers' own medians need to be as steady."""
    peers = {"": call}
    warm_up(peers)
    (first,) = interleaved(peers, 1, timed)
    least, most = YARDSTICK_ROUNDS
    rounds = max(least, min(most, round(YARDSTICK_SECONDS / max(first[""], 1e-9))))
    return spread([found[""] for found in interleaved(peers, rounds, timed)]).median


def facts(device: str = "cpu") -> dict[str, Any]:
    """What a line of results says about the machine, and about its GPU for "cuda"; nothing that names it."""
    found = environment()
    return {
        **(device_facts() if device == "cuda" else {}),
        "processor": found["processor"],
        "instruction_set": instruction_set(),
        "cores": found["cores"],
        "threads": torch.get_num_threads(),
        "system": platform.system(),
    }


def versions(device: str = "cpu") -> dict[str, str]:
    """Versions of what the peers are made of."""
    found = environment()["versions"]
    own = {name: found[name] for name in ("clearhead", "torch", "transformers") if name in found}
    return own | (device_versions() if device == "cuda" else {})


def instruction_set() -> str:
    """The level that PyTorch's own kernels use, and the extensions that matter to matrix products."""
    flags: set[str] = set()
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith(("flags", "Features")):
                flags = set(line.partition(":")[2].split())
                break
    return ", ".join(
        (torch.backends.cpu.get_cpu_capability(), *(name for name in EXTENSIONS if name in flags))
    )


def memory_kilobytes(field: str, file: str = "/proc/self/status") -> int | None:
    """A field such as VmRSS, where the system has it."""
    with contextlib.suppress(OSError):
        for line in Path(file).read_text(encoding="utf-8").splitlines():
            if line.startswith(f"{field}:"):
                return int(line.split()[1])
    return None


@contextlib.contextmanager
def limited_memory() -> Iterator[None]:
    """Let a peer that wants too much memory fail with an error, before the system ends some process for it."""
    used, free = memory_kilobytes("VmSize"), memory_kilobytes("MemAvailable", "/proc/meminfo")
    if used is None or free is None:
        yield
        return
    import resource

    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    limit = 1024 * (used + int(MEMORY_SHARE * free))
    resource.setrlimit(
        resource.RLIMIT_AS, (limit if hard == resource.RLIM_INFINITY else min(limit, hard), hard)
    )
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))

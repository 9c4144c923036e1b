"""Measure tiles on the GPU of this machine and rewrite the table with the fastest.

    python benchmarks/gpu/tune.py            all rows of this GPU's architecture; about half a minute a row
    python benchmarks/gpu/tune.py --dry-run  what would be measured
    python benchmarks/gpu/tune.py --seconds 90 --out tuned.json   as many rows as that takes; call again for the rest

Each candidate that compiles is first checked against PyTorch's own attention in float32, then timed with CUDA events,
in rounds that go through all candidates in turn; the least median wins. It has been run on no GPU so far.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from compile_report import FORMS, TABLE, WIDTHS, candidates, sums
from torch import Tensor

from clearhead.bench.cuda import reason_against_cuda
from clearhead.functional import attention, differential_attention
from clearhead.kernels.triton import configs
from clearhead.kernels.triton.configs import Config, Key

ROUNDS, REPEATS = 5, 5
# What it ends with where rows are left, as `clearhead bench --seconds` does.
UNFINISHED = 75
LENGTHS = {"forward": (4096, 4096), "backward": (4096, 4096), "decode": (1, 32768)}


def wanted(architecture: str) -> list[Key]:
    return [
        Key(architecture, direction, bits, width, wide * width, streams)
        for bits in (16, 32)
        for wide, streams in FORMS
        for width in WIDTHS
        for direction in configs.DIRECTIONS
    ]


def call(key: Key, backend: str) -> Callable[[], Tensor]:
    """One call, or for "backward" its gradients; 16 softmax heads' worth of projections, causal."""
    queries, keys = LENGTHS[key.direction]
    own_keys = key.streams == 2 and key.value_width > key.width
    groups = 8 if own_keys else 16
    dtype = torch.bfloat16 if key.bits == 16 else torch.float32
    rng = torch.Generator("cuda").manual_seed(0)

    def made(heads: int, length: int, width: int) -> Tensor:
        x = torch.randn(1, length, heads, width, device="cuda", generator=rng).to(dtype).transpose(1, 2)
        return x.requires_grad_(key.direction == "backward")

    q = made(key.streams * groups, queries, key.width)
    k = made((1 + own_keys) * groups, keys, key.width)
    v = made(groups, keys, key.value_width)

    def forward() -> Tensor:
        if key.streams == 1:
            return attention(q, k, v, is_causal=True, backend=backend)
        return differential_attention(q, k, v, 0.5, is_causal=True, backend=backend)

    if key.direction != "backward":
        return forward
    out = forward()
    cotangent = torch.ones_like(out)
    return lambda: torch.autograd.grad(out, (q, k, v), cotangent, retain_graph=True)[0]


def milliseconds(run: Callable[[], Tensor], flush: Tensor) -> float:
    """The median of a few, each with a cold cache."""
    times = []
    for _ in range(REPEATS):
        flush.zero_()
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        run()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end))
    return statistics.median(times)


def tune(key: Key, flush: Tensor) -> Config | None:
    """The fastest candidate that is right; None where none is."""
    expected = call(key, "eager" if key.direction != "backward" else "sdpa")().float()
    run, right = call(key, "triton"), []
    times: dict[Config, list[float]] = {}
    for config in candidates(key):
        configs.table()[key] = config
        try:
            error = float((run().float() - expected).abs().max() / expected.abs().max())
        except Exception as refused:  # too much shared memory, for one
            print(f"  {config}: {refused}")
            continue
        if error < 0.02:
            right.append(config)
        else:
            print(f"  {config}: {error:.3f} off, left out")
    for _ in range(ROUNDS):
        for config in right:
            configs.table()[key] = config
            times.setdefault(config, []).append(milliseconds(run, flush))
    for config in sorted(times, key=lambda c: statistics.median(times[c])):
        print(f"  {config}: {statistics.median(times[config]):.3f} ms")
    return min(times, key=lambda c: statistics.median(times[c])) if times else None


def order(keys: list[Key]) -> list[Key]:
    """What most models ask for first: 16 bits, heads of 128 and 64, V1."""
    widths = {128: 0, 64: 1}
    return sorted(keys, key=lambda k: (k.bits, widths.get(k.width, 2), -k.streams, -k.value_width))


def tuned(place: Path | None) -> set[Key]:
    """The rows that an earlier call has measured on this GPU."""
    return set(configs.read(place.read_text())) if place is not None and place.exists() else set()


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--dry-run", action="store_true")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="no row begins after so many")
    parser.add_argument(
        "--out", type=Path, help="a table of the measured rows alone; what it has is not measured again"
    )
    arguments = parser.parse_args()
    if arguments.dry_run:
        for key in order(wanted("sm_90")):
            print(key, sums(key), [(c.block_m, c.block_n, c.warps, c.stages) for c in candidates(key)])
        return 0
    reason = reason_against_cuda()
    if reason is not None:
        raise SystemExit(f"nothing to tune on: {reason}")
    began, flush = time.monotonic(), torch.empty(2**28, dtype=torch.uint8, device="cuda")
    done = tuned(arguments.out)
    measured = {key: configs.table()[key] for key in done if key in configs.table()}
    rows = [key for key in order(wanted(configs.architecture(torch.device("cuda")))) if key not in done]
    for at, key in enumerate(rows):
        if time.monotonic() - began > arguments.seconds:
            print(f"{len(rows) - at} rows left: call again for them")
            return UNFINISHED
        before = configs.table().get(key)
        print(key, flush=True)
        found = tune(key, flush)
        kept = found or before
        if kept is not None:
            configs.table()[key] = kept
            TABLE.write_text(configs.write(configs.table()))
        if found is not None and arguments.out is not None:
            measured[key] = found
            arguments.out.write_text(configs.write(measured))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())

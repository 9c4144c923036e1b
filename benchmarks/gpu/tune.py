"""Measure tiles on the GPU of this machine and rewrite the table with the fastest.

    python benchmarks/gpu/tune.py            all rows of this GPU's architecture; about half a minute a row
    python benchmarks/gpu/tune.py --dry-run  what would be measured

Each candidate that compiles is first checked against PyTorch's own attention in float32, then timed with CUDA events,
in rounds that go through all candidates in turn; the least median wins. It has been run on no GPU so far.
"""

import argparse
import statistics
from collections.abc import Callable

import torch
from compile_report import FORMS, TABLE, WIDTHS, candidates, sums
from torch import Tensor

from clearhead.functional import attention, differential_attention
from clearhead.kernels.triton import configs
from clearhead.kernels.triton.configs import Config, Key

ROUNDS, REPEATS = 5, 5
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
    run, right, times = call(key, "triton"), [], {}
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


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--dry-run", action="store_true")
    arguments = parser.parse_args()
    if arguments.dry_run:
        for key in wanted("sm_90"):
            print(key, sums(key), [(c.block_m, c.block_n, c.warps, c.stages) for c in candidates(key)])
        return
    if not torch.cuda.is_available():
        raise SystemExit("there is no GPU here to tune on")
    flush = torch.empty(2**28, dtype=torch.uint8, device="cuda")
    for key in wanted(configs.architecture(torch.device("cuda"))):
        before = configs.table().get(key)
        print(key)
        found = tune(key, flush) or before
        if found is not None:
            configs.table()[key] = found
            TABLE.write_text(configs.write(configs.table()))


if __name__ == "__main__":
    main()

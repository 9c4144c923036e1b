"""The ways to run DIFF V1's attention on PyTorch's CPU kernels, forward and backward, against its twin's."""

import argparse
from pathlib import Path

import torch

from clearhead.bench.cases import DTYPES, TWIN, AttentionCase
from clearhead.cli.bench import run_cases

LOWERINGS = ("FlashDiffAttn_1", "FlashDiffAttn_1 padded", "FlashDiffAttn_2", "stacked")
CASES = [
    AttentionCase(
        name=f"lowerings-{width}-{length}-{dtype}",
        variant="differential",
        peers=(TWIN, *LOWERINGS),
        heads=4,
        groups=4,
        width=width,
        queries=length,
        keys=length,
        causal=True,
        backward=True,
        dtype=dtype,
        batch=2,
    )
    for dtype in DTYPES
    for width, length in ((32, 512), (64, 512), (64, 1024), (128, 1024))
]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", type=Path, default=Path("runs/bench/lowerings.jsonl"))
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    raise SystemExit(not run_cases("attention", CASES, arguments.rounds, arguments.out)[0])


if __name__ == "__main__":
    main()

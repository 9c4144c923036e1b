"""Whole training steps (forward, backward, AdamW) of every variant against its twin, and of DiffLlama at the shape."""

import argparse
from pathlib import Path

import torch

from clearhead.bench.cases import TrainCase
from clearhead.cli.bench import run_cases

PEERS = (
    "Transformer (sdpa)",
    "DIFF V1 (sdpa)",
    "DIFF V2 (sdpa)",
    "CoCA exact (sdpa)",
    "CoCA slack (sdpa)",
    "DiffLlama (sdpa)",
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--heads", type=int, default=8)
    parser.add_argument("--context", type=int, default=512)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--vocabulary", type=int, default=1024)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", type=Path, default=Path("runs/bench/training.jsonl"))
    given = vars(parser.parse_args())
    rounds, out = given.pop("rounds"), given.pop("out")
    torch.set_num_threads(given.pop("threads"))
    name = f"variants-{given['width']}x{given['layers']}-{given['context']}"
    raise SystemExit(not run_cases("train", [TrainCase(name=name, peers=PEERS, **given)], rounds, out)[0])


if __name__ == "__main__":
    main()

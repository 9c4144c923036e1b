"""The ways to run DIFF V1's attention on PyTorch's CPU kernels, forward and backward, against its twin's."""

import argparse
from collections.abc import Callable

import torch
from common import interleaved, record, summary

from clearhead.core.attend import Prepared, attend, difference, problem_of, single
from clearhead.core.dispatch import Plan, load_backend
from clearhead.core.heads import Heads
from clearhead.core.legalise import Lowering
from clearhead.core.masks import MaskSpec

LOWERINGS = {
    "FlashDiffAttn_1": Lowering("FlashDiffAttn_1", 2),
    "FlashDiffAttn_1 padded": Lowering("FlashDiffAttn_1 padded", 2, pad=True),
    "FlashDiffAttn_2": Lowering("FlashDiffAttn_2", 2, slices=2),
    "stacked": Lowering("stacked", 2, stack=True, slices=2),
}


def run(heads: Heads, lowering: Lowering) -> Callable[[], None]:
    """Forward and backward of causal attention through `lowering` on PyTorch's SDPA."""
    mask = MaskSpec(is_causal=True)
    engine = load_backend("sdpa")
    mix = difference if len(heads.q) == 2 else single
    prepared = Prepared(Plan(engine, lowering), engine.prepare(mask, problem_of(heads, mask, mix), lowering))

    def call() -> None:
        attend(heads, prepared, heads.q[0].shape[-1] ** -0.5, mix)[0].sum().backward()

    return call


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    for dtype in (torch.float32, torch.bfloat16):
        for width, length in ((32, 512), (64, 512), (64, 1024), (128, 1024)):
            batch, heads = 2, 4

            def made(count: int, size: int) -> torch.Tensor:
                return torch.randn(batch, count, length, size, dtype=dtype, requires_grad=True)  # noqa: B023

            pair = Heads(
                (made(heads, width), made(heads, width)),
                (made(heads, width), made(heads, width)),
                made(heads, 2 * width),
                torch.tensor(0.5).view(1, 1, 1, 1),
            )
            twin = Heads((made(2 * heads, width),), (made(2 * heads, width),), made(2 * heads, width))
            peers = {"Transformer (twin)": run(twin, Lowering("direct", 1, shares_keys=True))}
            peers |= {name: run(pair, lowering) for name, lowering in LOWERINGS.items()}
            case = {
                "what": "attention forward + backward",
                "dtype": str(dtype),
                "width": width,
                "length": length,
            }
            case |= {"batch": batch, "heads": heads, "rounds": arguments.rounds, "threads": arguments.threads}
            record("lowerings", case, summary(interleaved(peers, arguments.rounds), "Transformer (twin)"))


if __name__ == "__main__":
    main()

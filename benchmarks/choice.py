"""Where the fused CPU kernel beats what `backend="auto"` would take without it, by shape and instruction set.

`Cpu.preferred` in src/clearhead/kernels/cpu/kernel.py follows what this found (results/choice.jsonl).
"""

import argparse
import itertools
from pathlib import Path

import torch

from clearhead.bench.machine import facts, versions
from clearhead.bench.measure import Call, interleaved, ratios, warm_up
from clearhead.bench.records import append
from clearhead.functional import attention, differential_attention
from clearhead.kernels.cpu import library

FORMS = ("softmax", "V1", "V2")
# queries, keys: training at several lengths, and decoding.
LENGTHS = ((16, 16), (64, 64), (256, 256), (1024, 1024), (1, 16), (1, 256), (1, 4096), (8, 4096))
WIDTHS = (16, 64, 128)


def call(
    form: str, batch: int, queries: int, keys: int, width: int, dtype: torch.dtype, backend: str
) -> Call:
    """Causal attention with eight softmax heads' worth of width, as a training step or a decoding one would run it."""
    backward = queries == keys

    def made(heads: int, length: int, size: int) -> torch.Tensor:
        return torch.randn(batch, length, heads, size).to(dtype).transpose(1, 2).requires_grad_(backward)

    if form == "softmax":
        inputs = (made(8, queries, width), made(8, keys, width), made(8, keys, width))
    elif form == "V1":
        inputs = (made(8, queries, width), made(8, keys, width), made(4, keys, 2 * width))
    else:
        inputs = (made(16, queries, width), made(8, keys, width), made(8, keys, width))

    def run() -> None:
        if form == "softmax":
            out = attention(*inputs, is_causal=True, backend=backend)
        else:
            out = differential_attention(*inputs, 0.5, is_causal=True, backend=backend)
        if backward:
            torch.autograd.grad(out, inputs, out.detach())

    return run


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--set", help="instruction set to force, such as portable")
    parser.add_argument("--out", type=Path, default=Path("runs/bench/choice.jsonl"))
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    if arguments.set:
        library.load().set_isa(arguments.set)
    dtypes = (torch.float32, torch.bfloat16)
    for form, dtype, (queries, keys), width in itertools.product(FORMS, dtypes, LENGTHS, WIDTHS):
        batch = max(1, min(16, 1024 // keys))
        peers = {b: call(form, batch, queries, keys, width, dtype, b) for b in ("sdpa", "cpu")}
        warm_up(peers)
        with torch.set_grad_enabled(queries == keys):
            found = ratios(list(interleaved(peers, arguments.rounds)), "cpu", "sdpa")
        shape = {"queries": queries, "keys": keys, "width": width, "batch": batch}
        print(f"{form:8} {str(dtype)[6:]:9} {queries:5}{keys:6}{width:5}  {found.median:.2f}", flush=True)
        append(
            arguments.out,
            [
                {
                    "form": form,
                    "dtype": str(dtype)[6:],
                    **shape,
                    "set": library.load().isa(),
                    "threads": arguments.threads,
                    "rounds": arguments.rounds,
                    "over_sdpa": {"median": found.median, "q1": found.q1, "q3": found.q3},
                    "machine": facts(),
                    "versions": versions(),
                }
            ],
        )


if __name__ == "__main__":
    main()

"""Decoding behind codes of 8 and 4 bits against the same behind float32 and bfloat16 keys and values: time and memory.

One layer's attention of 8 differential heads of width 64 (values 128 wide) over 2 key-value groups, one new token; in
batch 1 eight such layers in turn, so that no cache of the processor holds what they read. Every round has one turn of
each form, and a copy as large as half of the float32 keys and values, which moves as many bytes as reading them once.
With one thread the clock is the thread's own processor time: what other work on the machine takes away is not counted,
what it does to the caches and the memory is.
"""

import argparse
import time
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from clearhead.bench.machine import facts, versions
from clearhead.bench.measure import Call, Spread, WallTimer, interleaved, ratios, spread, warm_up
from clearhead.bench.records import append
from clearhead.core.attend import attend, difference, prepare, problem_of
from clearhead.core.dispatch import load_backend
from clearhead.core.masks import MaskSpec
from clearhead.core.quantised import KEY_BLOCK, hold
from clearhead.core.streams import Streams

HEADS, GROUPS, WIDTH, VALUE_WIDTH = 8, 2, 64, 128
FORMS: dict[str, tuple[torch.dtype, int | None]] = {
    "float32": (torch.float32, None),
    "bfloat16": (torch.bfloat16, None),
    "int8": (torch.float32, 8),
    "int4": (torch.float32, 4),
    "int8, bfloat16 model": (torch.bfloat16, 8),
    "int4, bfloat16 model": (torch.bfloat16, 4),
}
READ = "reading K and V once"


def layer(batch: int, keys: int, dtype: torch.dtype, bits: int | None) -> Streams:
    def some(*size: int) -> Tensor:
        return torch.randn(size).to(dtype)

    q = tuple(some(batch, HEADS, 1, WIDTH) for _ in range(2))
    k = tuple(some(batch, GROUPS, keys, WIDTH) for _ in range(2))
    v, gate = some(batch, GROUPS, keys, VALUE_WIDTH), torch.rand(batch, HEADS, 1, 1)
    if bits is None:
        return Streams(q, k, v, gate)
    # As in the cache: the newest are numbers, half a block of them on average.
    past = (keys - 32 - KEY_BLOCK // 2) // KEY_BLOCK * KEY_BLOCK
    held = hold(tuple(x[:, :, :past] for x in k), v[:, :, :past], bits)
    return Streams(q, tuple(x[:, :, past:].clone() for x in k), v[:, :, past:].clone(), gate, None, held)


def size(heads: Streams) -> int:
    numbers = sum(x.nbytes for x in (*heads.k, heads.v))
    return numbers + (0 if heads.held is None else heads.held.nbytes)


def turn(layers: list[Streams]) -> Call:
    mask = MaskSpec(is_causal=True)
    prepared = prepare((load_backend("cpu"),), problem_of(layers[0], mask, "difference"), mask, False)

    def run() -> None:
        for heads in layers:
            attend(heads, prepared, WIDTH**-0.5, difference)

    return run


def numbers(of: Spread, factor: float = 1.0) -> dict[str, float]:
    return {"median": of.median * factor, "q1": of.q1 * factor, "q3": of.q3 * factor}


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=31)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--out", type=Path, default=Path("runs/bench/quantised_decode.jsonl"))
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    clock = time.thread_time if arguments.threads == 1 else time.perf_counter
    for batch, count in ((1, 8), (8, 1)):
        torch.manual_seed(0)
        made = {
            name: [layer(batch, arguments.tokens, *form) for _ in range(count)]
            for name, form in FORMS.items()
        }
        sizes = {name: sum(map(size, layers)) for name, layers in made.items()}
        half = torch.ones(sizes["float32"] // 8)
        copied = torch.empty_like(half)
        calls: dict[str, Call] = {name: turn(layers) for name, layers in made.items()}
        calls[READ] = partial(copied.copy_, half)
        warm_up(calls)
        rounds = list(interleaved(calls, arguments.rounds, WallTimer(clock)))
        for name in FORMS:
            ratio = ratios(rounds, name, "float32")
            # What this form has to read, at the speed of the copy.
            share = sizes[name] / sizes["float32"]
            reads = spread([found[name] / (found[READ] * share) for found in rounds])
            entry = {
                "form": name,
                "batch": batch,
                "layers": count,
                "tokens": arguments.tokens,
                "clock": clock.__name__,
                "ms_a_layer": numbers(spread([found[name] for found in rounds]), 1e3 / count),
                "over_float32": numbers(ratio),
                "over_reading_its_own": numbers(reads),
                "bytes_over_bfloat16": sizes[name] / sizes["bfloat16"],
                "rounds": arguments.rounds,
                "machine": facts(),
                "versions": versions(),
            }
            print(
                f"batch {batch}  {name:21} {entry['ms_a_layer']['median']:7.3f} ms a layer, over float32 "
                f"{ratio.median:.2f} ({ratio.q1:.2f} to {ratio.q3:.2f}), over reading what it has {reads.median:.2f} "
                f"({reads.q1:.2f} to {reads.q3:.2f}), bytes over bfloat16 {entry['bytes_over_bfloat16']:.3f}",
                flush=True,
            )
            append(arguments.out, [entry])


if __name__ == "__main__":
    main()

"""Encoders: training passes over those of the softmax twin on PyTorch's SDPA, and packed rows over padded ones.

Random weights, float32, forward and backward; every round has one pass of each peer. `--what` takes one question:

attention  one layer (projections, attention, output) of every variant under "auto", which is the CPU kernel here
model      a masked language model, 15 % of the tokens masked, of every variant under "auto"
packing    a narrower one on texts of mixed length: a padded batch against one row without padding; the largest
           difference of the real tokens' logits is noted
"""

import argparse
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from clearhead.bench.machine import facts, versions
from clearhead.bench.measure import Call, WallTimer, interleaved, ratios, spread, warm_up
from clearhead.bench.records import append
from clearhead.models import ClearheadEncoderConfig, ClearheadForMaskedLM
from clearhead.nn import Attention

VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "softmax": ("softmax", {}),
    "V1": ("differential", {}),
    "V2": ("differential_v2", {}),
    "collinear exact": ("collinear", {"mode": "exact"}),
    "V2 collinear": ("differential_v2_collinear", {}),
}
TWIN = "softmax (sdpa)"
# On a machine that others use, the processor's time of this process alone; with one thread it is what a free one takes.
CLOCKS = {"processor": time.process_time, "wall": time.perf_counter}
LENGTHS = (512, 1024)
VOCABULARY, WIDTH, LAYERS, HEADS = 2048, 512, 2, 8


def attention(variant: str, backend: str, length: int, batch: int) -> Call:
    name, options = VARIANTS[variant]
    torch.manual_seed(0)
    layer = Attention(WIDTH, HEADS, variant=name, backend=backend, layer_idx=1, **options)
    x = torch.randn(batch, length, WIDTH).requires_grad_()
    cotangent, weights = torch.randn(batch, length, WIDTH), list(layer.parameters())

    def run() -> None:
        torch.autograd.grad(layer(x), [x, *weights], cotangent)

    return run


def encoder(variant: str, implementation: str, length: int, width: int = WIDTH) -> ClearheadForMaskedLM:
    name, options = VARIANTS[variant]
    torch.manual_seed(0)
    config = ClearheadEncoderConfig(
        vocab_size=VOCABULARY,
        hidden_size=width,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        attention=name,
        attention_options=options,
        max_position_embeddings=length,
        initializer_range=0.03,
    )
    model = ClearheadForMaskedLM(config)
    model.set_attn_implementation(implementation)
    return model


def step(model: ClearheadForMaskedLM, ids: Tensor, labels: Tensor, **given: Tensor) -> Call:
    def run() -> None:
        model.zero_grad(set_to_none=True)
        model(ids, labels=labels, **given).loss.backward()

    return run


def masked(shape: tuple[int, int], rng: torch.Generator) -> tuple[Tensor, Tensor]:
    """Token ids, 0 for the mask, and labels."""
    labels = torch.randint(1, VOCABULARY, shape, generator=rng)
    hidden = torch.rand(shape, generator=rng) < 0.15
    return labels.masked_fill(hidden, 0), labels.masked_fill(~hidden, -100)


def passes(what: str, batch: int) -> Iterator[tuple[dict[str, Any], dict[str, Call]]]:
    """A case, and its peers: the twin on SDPA, then every variant under "auto"."""
    for length in LENGTHS:
        if what == "attention":
            calls = {TWIN: attention("softmax", "sdpa", length, batch)}
            calls |= {variant: attention(variant, "auto", length, batch) for variant in VARIANTS}
        else:
            ids, labels = masked((batch, length), torch.Generator().manual_seed(1))
            calls = {TWIN: step(encoder("softmax", "sdpa", length), ids, labels)}
            calls |= {
                variant: step(encoder(variant, "clearhead", length), ids, labels) for variant in VARIANTS
            }
        yield {"what": what, "tokens": length, "batch": batch}, calls


def texts(count: int, longest: int) -> list[int]:
    """Lengths of texts, most of them short: uniform in the logarithm from 16 tokens to `longest`, which one has."""
    rng = torch.Generator().manual_seed(2)
    drawn = 16 * (longest / 16) ** torch.rand(count - 1, generator=rng)
    return [*drawn.long().tolist(), longest]


def packing(variant: str, implementation: str) -> tuple[dict[str, Any], dict[str, Call]]:
    """A padded batch and the same texts in one row, and how far their logits are apart."""
    lengths = texts(16, 256)
    ids, labels = masked((1, sum(lengths)), torch.Generator().manual_seed(1))
    rows, wide = [row[0] for row in ids.split(lengths, 1)], max(lengths)
    padded = torch.zeros(len(rows), wide, dtype=torch.long)
    mask, sought = torch.zeros_like(padded), torch.full_like(padded, -100)
    for index, (row, label) in enumerate(zip(rows, labels.split(lengths, 1), strict=True)):
        padded[index, : len(row)], mask[index, : len(row)] = row, 1
        sought[index, : len(row)] = label[0]
    positions = torch.cat([torch.arange(length) for length in lengths])[None]
    model = encoder(variant, implementation, wide, width=256)
    with torch.no_grad():
        apart = (
            model(padded, attention_mask=mask).logits[mask.bool()]
            - model(ids, position_ids=positions).logits[0]
        )
    calls = {
        "padded": step(model, padded, sought, attention_mask=mask),
        "packed": step(model, ids, labels, position_ids=positions),
    }
    case = {
        "what": "packing",
        "variant": variant,
        "implementation": implementation,
        "texts": len(rows),
        "tokens": sum(lengths),
        "padded_tokens": padded.numel(),
        "largest_difference": float(apart.abs().max()),
    }
    return case, calls


def cases(what: str, batch: int) -> Iterator[tuple[dict[str, Any], dict[str, Call], str]]:
    """Every case with its peers and the one that the others are divided by."""
    if what in ("all", "attention"):
        yield from ((case, calls, TWIN) for case, calls in passes("attention", batch))
    if what in ("all", "model"):
        yield from ((case, calls, TWIN) for case, calls in passes("model", batch))
    if what in ("all", "packing"):
        yield *packing("softmax", "sdpa"), "padded"
        for variant in VARIANTS:
            yield *packing(variant, "clearhead"), "padded"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--what", choices=("all", "attention", "model", "packing"), default="all")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--clock", choices=CLOCKS, default="processor")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--out", type=Path, default=Path("runs/bench/encoder.jsonl"))
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    common = {
        "clock": arguments.clock,
        "rounds": arguments.rounds,
        "machine": facts(),
        "versions": versions(),
    }
    for case, calls, reference in cases(arguments.what, arguments.batch):
        warm_up(calls)
        rounds = list(interleaved(calls, arguments.rounds, WallTimer(CLOCKS[arguments.clock])))
        peers = {}
        for name in calls:
            ratio = ratios(rounds, name, reference)
            peers[name] = {
                "ms": spread([found[name] * 1e3 for found in rounds]).median,
                "ratio": {"median": ratio.median, "q1": ratio.q1, "q3": ratio.q3},
            }
            print(
                f"{case['what']:9} {case.get('variant', ''):16} {case.get('implementation', ''):9} "
                f"{case['tokens']:5} tokens  {name:16} {peers[name]['ms']:9.1f} ms  "
                f"{ratio.median:.2f} ({ratio.q1:.2f} to {ratio.q3:.2f})",
                flush=True,
            )
        append(arguments.out, [{**case, "dtype": "float32", "peers": peers, **common}])


if __name__ == "__main__":
    main()

"""One decoded token of whole models behind 8,192 tokens, with every cache that grows: processor time and the clock.

The caches are filled with random numbers, as what stands in them changes no time; nothing is read as a prompt. Every
round has one token of each peer, and all begin in turn. The models are those of `clearhead bench generate`.
"""

import argparse
from pathlib import Path

import torch
from transformers import PreTrainedModel
from transformers.cache_utils import CacheLayerMixin

from clearhead.bench.cases import GenerateCase, select
from clearhead.bench.generate_run import Clocks, Writer
from clearhead.bench.generating import ARMS, GenerateArm, build, new_cache
from clearhead.bench.machine import facts, versions
from clearhead.bench.measure import Spread, interleaved, ratios, spread, warm_up
from clearhead.bench.records import append

REFERENCE = "Transformer (sdpa)"


def filled(arm: GenerateArm, model: PreTrainedModel, tokens: int) -> Writer:
    """The peer behind `tokens` tokens of random keys and values."""
    probe = new_cache(arm, model, 4)
    model(input_ids=torch.zeros(1, 1, dtype=torch.long), past_key_values=probe, use_cache=True)
    cache = new_cache(arm, model, tokens + 64)
    for i, layer in enumerate(probe.layers):
        assert isinstance(layer, CacheLayerMixin) and layer.keys is not None and layer.values is not None
        keys, values = (
            x.new_empty(1, x.shape[1], tokens, x.shape[3]).normal_() for x in (layer.keys, layer.values)
        )
        cache.update(keys, values, i)
    return Writer(model, cache, torch.zeros(1, 1, dtype=torch.long))


def numbers(of: Spread, factor: float = 1.0) -> dict[str, float]:
    return {"median": of.median * factor, "q1": of.q1 * factor, "q3": of.q3 * factor}


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("peers", nargs="*", default=[REFERENCE, "DIFF V1"])
    parser.add_argument("--case", default="512x6-8192-batch1-float32")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--out", type=Path, default=Path("runs/bench/decode_step.jsonl"))
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    (case,) = select("generate", [arguments.case])
    assert isinstance(case, GenerateCase)
    names = list(dict.fromkeys((REFERENCE, *arguments.peers)))
    models: dict[tuple[str, ...], PreTrainedModel] = {}
    clocks, calls = Clocks(), {}
    for name in names:
        arm = ARMS[name]
        if arm.model not in models:
            models[arm.model] = build(arm, case)
            models[arm.model].set_attn_implementation(arm.backend)
        calls[name] = clocks.watching(name, filled(arm, models[arm.model], case.context).step)
    warm_up(calls)
    for seconds in clocks.own.values():
        seconds.clear()
    rounds = list(interleaved(calls, arguments.rounds))
    own = clocks.rounds(len(rounds))
    for name in names:
        ratio, wall = ratios(own, name, REFERENCE), ratios(rounds, name, REFERENCE)
        milliseconds = spread([found[name] for found in own])
        print(
            f"{name:32} {milliseconds.median * 1e3:7.2f} ms, over the reference {ratio.median:.2f} "
            f"({ratio.q1:.2f} to {ratio.q3:.2f}), by the wall {wall.median:.2f}",
            flush=True,
        )
        entry = {
            "case": case.name,
            "peer": name,
            "reference": REFERENCE,
            "rounds": len(rounds),
            "processor_ms": numbers(milliseconds, 1e3),
            "processor_ratio": numbers(ratio),
            "wall_ratio": numbers(wall),
            "machine": facts(),
            "versions": versions(),
        }
        append(arguments.out, [entry])


if __name__ == "__main__":
    main()

"""A decoding step behind the compact collinear cache against the same behind the plain one: time and memory.

Models of width 512, 6 layers and 8 heads, random weights, a cache of 8192 tokens. Every round has one step of each.
"""

import argparse
import itertools
from pathlib import Path
from typing import Any

import torch
from transformers import DynamicCache

from clearhead.bench.machine import facts, versions
from clearhead.bench.measure import Call, interleaved, ratios, spread, warm_up
from clearhead.bench.records import append
from clearhead.models import ClearheadConfig, ClearheadForCausalLM

FORMS = {
    "collinear exact": ("collinear", {"mode": "exact"}),
    "collinear slack": ("collinear", {"mode": "slack"}),
    "differential collinear": ("differential_collinear", {}),
}
# Attention implementations: the CPU kernel reads held keys as they are, SDPA has them expanded first.
BACKENDS = ("cpu", "sdpa")


def step(
    form: str, compact: bool, backend: str, batch: int, kv_heads: int, tokens: int, dtype: torch.dtype
) -> tuple[Call, int]:
    """One decoded token, which is then taken off the cache again, and the bytes of the cache."""
    attention, options = FORMS[form]
    config = ClearheadConfig(
        vocab_size=1024,
        hidden_size=512,
        num_hidden_layers=6,
        num_attention_heads=8,
        num_key_value_heads=kv_heads,
        attention=attention,
        attention_options=options,
        max_position_embeddings=tokens + 1,
        compact_cache=compact,
    )
    torch.manual_seed(0)
    model: Any = ClearheadForCausalLM(config)
    model = model.to(dtype).eval()
    model.set_attn_implementation(backend)
    cache: Any = DynamicCache()
    ids = torch.randint(1024, (batch, 1))
    with torch.no_grad():
        model(ids, past_key_values=cache)
    for layer in cache.layers:
        layer.keys = torch.randn(*layer.keys.shape[:2], tokens, layer.keys.shape[3]).to(dtype).abs()
        layer.values = torch.randn(*layer.values.shape[:2], tokens, layer.values.shape[3]).to(dtype)
    size = sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)

    @torch.no_grad()
    def run() -> None:
        model(ids, past_key_values=cache, use_cache=True)
        cache.crop(-1)

    return run, size


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--out", type=Path, default=Path("runs/bench/compact_cache.jsonl"))
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    common = {"machine": facts(), "versions": versions()}
    cases = itertools.product(FORMS, BACKENDS, (1, 4), (8, 2), (torch.float32, torch.bfloat16))
    for form, backend, batch, kv_heads, dtype in cases:
        made = {
            name: step(form, name == "compact", backend, batch, kv_heads, arguments.tokens, dtype)
            for name in ("plain", "compact")
        }
        calls = {name: call for name, (call, _) in made.items()}
        warm_up(calls)
        rounds = list(interleaved(calls, arguments.rounds))
        ratio = ratios(rounds, "compact", "plain")
        entry = {
            "form": form,
            "backend": backend,
            "batch": batch,
            "kv_heads": kv_heads,
            "dtype": str(dtype).removeprefix("torch."),
            "tokens": arguments.tokens,
            "plain_ms": spread([found["plain"] * 1e3 for found in rounds]).median,
            "compact_ms": spread([found["compact"] * 1e3 for found in rounds]).median,
            "time_ratio": {"median": ratio.median, "q1": ratio.q1, "q3": ratio.q3},
            "memory_ratio": made["compact"][1] / made["plain"][1],
        }
        print(
            f"{form:24} {backend:5} batch {batch}, {kv_heads} key-value heads, {entry['dtype']:9} "
            f"plain {entry['plain_ms']:8.2f} ms, compact {entry['compact_ms']:8.2f} ms, "
            f"{ratio.median:.2f} ({ratio.q1:.2f} to {ratio.q3:.2f}), memory {entry['memory_ratio']:.2f}",
            flush=True,
        )
        append(arguments.out, [{**entry, **common, "rounds": arguments.rounds}])


if __name__ == "__main__":
    main()

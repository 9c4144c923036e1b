"""The counting model of `clearhead.kernels.triton.counting` on real shapes, and a roofline.

    python benchmarks/gpu/model.py           -> results/triton_model.jsonl

The roofline's time is what a GPU would take at its data sheet's rates if nothing else cost anything. It is a bound from
a model and no measurement; kernels in practice reach a part of it.
"""

import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from clearhead.kernels.triton import configs
from clearhead.kernels.triton.configs import Config, Key
from clearhead.kernels.triton.counting import CountedAttention, Work, backward, forward, twin

RESULTS = Path(__file__).parents[1] / "results" / "triton_model.jsonl"
# NVIDIA's data sheets (SXM): dense bfloat16 operations a second, bytes a second, multiprocessors.
DEVICES = {"H100": ("sm_90", 989e12, 3.35e12, 132), "A100": ("sm_80", 312e12, 2.04e12, 108)}
FORMS = {"v1": (2, True, 2), "v2": (2, False, 1), "softmax": (1, False, 1)}


def problem(form: str, width: int, length: int) -> CountedAttention:
    """16 softmax heads' worth of projections, one sequence, causal."""
    streams, own_keys, wide = FORMS[form]
    heads = 8 if own_keys else 16
    return CountedAttention(
        1, heads, heads, length, length, width, wide * width, streams, own_keys, causal=True
    )


def config_of(architecture: str, direction: str, a: CountedAttention) -> Config:
    key = Key(architecture, direction, 16, configs.padded(a.width), configs.padded(a.value_width), a.streams)
    return configs.choose(key)


def both(architecture: str, a: CountedAttention, processors: int) -> dict[str, Work]:
    config = config_of(architecture, "backward", a)
    stretches = min(-(-2 * processors // a.pairs), -(-a.keys // config.block_n), -(-a.rows // config.block_m))
    return {
        "forward": forward(a, config_of(architecture, "forward", a)),
        "backward": backward(a, config, stretches),
    }


def main() -> None:
    lines: list[dict[str, Any]] = []
    for device, (architecture, rate, bandwidth, processors) in DEVICES.items():
        for form in FORMS:
            for width in (64, 128):
                for length in (2048, 4096, 16384):
                    a = problem(form, width, length)
                    ours, theirs = both(architecture, a, processors), both(architecture, twin(a), processors)
                    for direction, work in ours.items():
                        other = theirs[direction]
                        bound = max(2 * work.executed / rate, work.moved / bandwidth)
                        lines.append(
                            {
                                "model": True, "device": device, "form": form, "width": width, "length": length,
                                "direction": direction, **asdict(work),
                                "arithmetic over twin": round(exact(a, direction) / exact(twin(a), direction), 3),
                                "moved over twin": round(work.moved / other.moved, 3),
                                "roofline ms": round(1e3 * bound, 4),
                                "roofline over twin": round(
                                    bound / max(2 * other.executed / rate, other.moved / bandwidth), 3
                                ),
                                # What the shared cache would have to give for the arithmetic to be the bound.
                                "asked TB/s at the roofline": round(work.asked / bound / 1e12, 2),
                            }
                        )  # fmt: skip
    RESULTS.write_text("".join(json.dumps(line) + "\n" for line in lines))


def exact(a: CountedAttention, direction: str) -> int:
    """Multiply-adds with tiles of one row and one key: no tile is half hidden."""
    one = Config(1, 1, 1, 1)
    a = replace(a, queries=256, keys=256)
    return (forward(a, one) if direction == "forward" else backward(a, one)).executed


if __name__ == "__main__":
    main()

"""The counting model of `clearhead.kernels.triton.counting` on real shapes, and a roofline.

    python benchmarks/gpu/model.py           -> results/triton_model.jsonl

The roofline's time is what a GPU would take at its data sheet's rates if nothing else cost anything. It is a bound from
a model and no measurement; kernels in practice reach a part of it.

What the kernel does itself that others would do before or behind it (lines with "part") is counted in bytes: of the
kernel, of a kernel of its own beside it, and of PyTorch's operations one by one, whose tensors are counted as they run.
"""

import json
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from clearhead.core.norm import RMSNorm
from clearhead.core.streams import Streams
from clearhead.kernels.triton import configs
from clearhead.kernels.triton.configs import Config, Key
from clearhead.kernels.triton.counting import (
    CountedAttention,
    Work,
    backward,
    deltas,
    expansion,
    forward,
    norm_apart,
    twin,
)

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
    for width in (64, 128):
        lines += [*norm_lines(width), *gate_lines(width)]
        lines += [line for heads in ((16, 16), (16, 2)) for line in held_lines(width, *heads)]
    RESULTS.write_text("".join(json.dumps(line) + "\n" for line in lines))


class Traffic(TorchDispatchMode):
    """Bytes of the tensors that each operation reads and writes; what only looks at memory another way is free."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = function(*args, **(kwargs or {}))
        if not function.is_view and function is not torch.ops.aten.detach.default:
            every = [*torch.utils._pytree.tree_leaves((args, kwargs)), *torch.utils._pytree.tree_leaves(out)]
            self.bytes += sum(x.numel() * x.element_size() for x in every if isinstance(x, Tensor))
        return out


def one_by_one(run: Callable[[], Any]) -> int:
    with Traffic() as traffic:
        run()
    return traffic.bytes


def part(what: str, a: CountedAttention, direction: str, ours: int, own: int, singly: int) -> dict[str, Any]:
    """Of a call's bytes: with it in the kernel, as a kernel of its own, as operations one by one; and H100's time."""
    bandwidth = DEVICES["H100"][2]
    return {
        "model": True, "part": what, "device": "H100", "heads": a.heads, "groups": a.groups, "width": a.width,
        "queries": a.queries, "keys": a.keys, "direction": direction,
        "in the kernel": ours, "a kernel of its own": own, "one by one": singly,
        "ms less than a kernel of its own": round(1e3 * (own - ours) / bandwidth, 4),
        "ms less than one by one": round(1e3 * (singly - ours) / bandwidth, 4),
    }  # fmt: skip


def norm_lines(width: int, length: int = 4096) -> list[dict[str, Any]]:
    """V1's head norm with its factor: bytes of the call's rows (the backward pass: of what comes before its tiles)."""
    plain = problem("v1", width, length)
    normed, config, rows = replace(plain, normed=True), config_of("sm_90", "forward", plain), 64
    norm = RMSNorm(plain.value_width, 1e-5).bfloat16()
    x = torch.randn(rows, plain.value_width, dtype=torch.bfloat16, requires_grad=True)
    scale = plain.pairs * plain.rows // rows
    out, lines = norm(x) * 0.8, []
    singly = [
        scale * one_by_one(run)
        for run in (
            lambda: norm(x) * 0.8,
            lambda: torch.autograd.grad(out, (x, norm.weight), torch.ones_like(out)),
        )
    ]
    for name, keep in (("forward, for a gradient", True), ("forward", False)):
        ours, apart = (forward(a, config, keep).moved for a in (normed, plain))
        own = norm_apart(plain, False)
        lines.append(part("head norm", plain, name, ours, apart + own, apart + singly[0]))
    apart, own = deltas(plain), norm_apart(plain, True)
    return [*lines, part("head norm", plain, "backward", deltas(normed), apart + own, apart + singly[1])]


def gate_lines(width: int, length: int = 4096) -> list[dict[str, Any]]:
    """V2's sigmoid: bytes of the call; a gate is read in 2 bytes by the kernel, or made of them and read in 4."""
    a, rows = problem("v2", width, length), 64
    count, raw = a.pairs * a.rows, torch.randn(rows, dtype=torch.bfloat16, requires_grad=True)
    gate = raw.float().sigmoid()
    singly = one_by_one(lambda: raw.float().sigmoid()) * count // rows
    back = one_by_one(lambda: torch.autograd.grad(gate, raw, torch.ones_like(gate))) * count // rows
    moved = forward(a, config_of("sm_90", "forward", a)).moved
    before = deltas(a)
    return [
        part("sigmoid", a, "forward", moved + 2 * count, moved + (6 + 4) * count, moved + singly + 4 * count),
        # λ once more in float32 for the tiles; dλ in 2 bytes, or in 4 that another kernel turns into 2.
        part("sigmoid", a, "backward", before + (2 + 4 + 2) * count, before + (4 + 4 + 10) * count,
             before + (4 + 4) * count + back),
    ]  # fmt: skip


def held_lines(width: int, heads: int, groups: int, keys: int = 8192) -> list[dict[str, Any]]:
    """A token of collinear attention behind a compact cache, beside a plain cache's."""
    a = CountedAttention(1, heads, groups, 1, keys, width, width, 1, own_keys=False, causal=True)
    held, config = replace(a, held=True), config_of("sm_90", "decode", a)
    tokens = 64
    streams = Streams(
        (torch.zeros(1, 1, 1, width),),
        (torch.zeros(1, groups, tokens, width // 2, dtype=torch.bfloat16),),
        torch.zeros(1, groups, tokens, width, dtype=torch.bfloat16),
        table=torch.zeros(1, tokens, width),
    )
    plain = forward(a, config, False).moved
    singly = one_by_one(streams.expanded) * keys // tokens
    line = part(
        "held keys", a, "decode", forward(held, config, False).moved, plain + expansion(a), plain + singly
    )
    return [line | {"with a plain cache": plain}]


def exact(a: CountedAttention, direction: str) -> int:
    """Multiply-adds with tiles of one row and one key: no tile is half hidden."""
    one = Config(1, 1, 1, 1)
    a = replace(a, queries=256, keys=256)
    return (forward(a, one) if direction == "forward" else backward(a, one)).executed


if __name__ == "__main__":
    main()

"""Rows shared out over two GPUs by PyTorch's context parallelism: losses and gradients beside those of one process.

    torchrun --nproc-per-node 2 benchmarks/gpu/context_parallel.py [--length 1024] [--out FILE]

Every process holds the whole model and a part of every row; ring attention under SDPA brings the rest. Each variant in
float32, where it may differ from one process by 1e-4 of the largest number, and in bfloat16, where it may be twice as
far from float32 as one process in bfloat16 is. A line a case; the exit code is 1 if one is farther. It has been run on
no GPU yet: what is not the device is tested on CPUs (tests/parallel/test_context.py).
"""

import argparse
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor.experimental import context_parallel

from clearhead.models import ClearheadConfig, ClearheadForCausalLM

VARIANTS: dict[str, dict[str, Any]] = {
    "Transformer": {},
    "DIFF V1": {"attention": "differential"},
    "DIFF V2": {"attention": "differential_v2"},
    "CoCA": {"attention": "collinear"},
    "DIFF V1 + CoCA": {"attention": "differential_collinear"},
    "DIFF V2 + CoCA": {"attention": "differential_v2_collinear"},
}
SHAPE: dict[str, Any] = {
    "vocab_size": 512,
    "hidden_size": 512,
    "num_hidden_layers": 3,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "initializer_range": 0.05,
    "attn_implementation": "sdpa",
}
FLOAT32_BAR, TIMES = 1e-4, 2.0
# A loss in nats and the gradient of every parameter.
Found = tuple[Tensor, dict[str, Tensor]]


def reason_against(processes: int, devices: int) -> str | None:
    """Why nothing can be compared here, in one sentence; None where it can."""
    if devices < 2:
        return f"context parallelism needs two CUDA devices, and this machine has {devices}"
    if processes < 2:
        return "start it with two processes or more: torchrun --nproc-per-node 2 benchmarks/gpu/context_parallel.py"
    return None if processes <= devices else f"{processes} processes need as many CUDA devices, not {devices}"


def rows(length: int, batch: int = 2) -> dict[str, Tensor]:
    """Random tokens (B, L), their positions, and labels that are shifted already."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(3, SHAPE["vocab_size"], (batch, length), generator=generator)
    return {
        "input_ids": ids,
        "shift_labels": F.pad(ids[:, 1:], (0, 1), value=-100),
        "position_ids": torch.arange(length).expand(batch, -1).contiguous(),
    }


def whole(model: ClearheadForCausalLM, given: dict[str, Tensor]) -> Found:
    """What one process finds."""
    labels = int((given["shift_labels"] != -100).sum())
    loss = model(**given, use_cache=False, num_items_in_batch=labels).loss
    loss.backward()
    return loss.detach(), _gradients(model)


def shared_out(model: ClearheadForCausalLM, given: dict[str, Tensor], mesh: DeviceMesh) -> Found:
    """The same by all processes of `mesh`, each with a part of every row."""
    labels = int((given["shift_labels"] != -100).sum())
    # They are cut in place.
    given = {name: value.clone() for name, value in given.items()}
    buffers = list(given.values())
    with context_parallel(
        mesh, buffers=buffers, buffer_seq_dims=[1] * len(buffers), no_restore_buffers=set(buffers)
    ):
        loss = model(**given, use_cache=False, num_items_in_batch=labels).loss
        loss.backward()
    found = loss.detach().clone(), _gradients(model)
    for part in (found[0], *found[1].values()):
        dist.all_reduce(part, group=mesh.get_group())
    return found


def _gradients(model: ClearheadForCausalLM) -> dict[str, Tensor]:
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return found


def apart(found: Found, expected: Found) -> tuple[float, float]:
    """How far the losses are apart, and the gradients of the parameter where they are farthest.

    Beside the loss; beside a parameter's largest gradient, or a hundredth of the largest of all where that is more:
    what is all but zero, as V1's λ at its start, is rounding alone.
    """
    if found[1].keys() != expected[1].keys():
        raise ValueError(f"gradients of {found[1].keys() ^ expected[1].keys()} are missing on one side")
    largest = {name: float(gradient.abs().max()) for name, gradient in expected[1].items()}
    least = max(largest.values()) / 100
    far = {name: float((found[1][name].double() - g.double()).abs().max()) for name, g in expected[1].items()}
    loss = abs(float(found[0]) / float(expected[0]) - 1)
    return loss, max(far[name] / max(largest[name], least) for name in far)


def make(variant: str, device: str, dtype: torch.dtype, **changes: Any) -> ClearheadForCausalLM:
    """The same weights in every process and dtype."""
    torch.manual_seed(0)
    model = ClearheadForCausalLM(ClearheadConfig(**{**SHAPE, **VARIANTS[variant], **changes}))
    return model.to(device=device, dtype=dtype)  # type: ignore[call-arg]  # decorated, as mypy sees it


def compare(
    device: str, mesh: DeviceMesh, length: int, say: Callable[[str], None], **changes: Any
) -> list[dict[str, Any]]:
    """A record for each variant and dtype; `changes` to the configuration."""
    records = []
    given = {name: value.to(device) for name, value in rows(length).items()}
    for variant in VARIANTS:
        exact = None
        for dtype, bar in ((torch.float32, FLOAT32_BAR), (torch.bfloat16, None)):
            model = make(variant, device, dtype, **changes)
            alone, shared = whole(model, given), shared_out(model, given, mesh)
            exact = exact or alone
            loss, gradient = apart(shared, exact)
            bars = (bar, bar) if bar else tuple(TIMES * far for far in apart(alone, exact))
            # What is rounded once more, where a part is added to another, is no more than a step of the dtype.
            most_loss, most_gradient = (b + torch.finfo(dtype).eps for b in bars)
            record = {
                "variant": variant,
                "dtype": str(dtype).removeprefix("torch."),
                "length": length,
                "processes": mesh.size(),
                "loss": loss,
                "gradient": gradient,
                "bars": [most_loss, most_gradient],
                "holds": loss <= most_loss and gradient <= most_gradient,
            }
            records.append(record)
            say(
                f"{variant:16} {record['dtype']:8} loss {loss:.1e} (at most {most_loss:.1e}), gradient "
                f"{gradient:.1e} (at most {most_gradient:.1e}): {'holds' if record['holds'] else 'FAILS'}"
            )
    return records


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--length", type=int, default=1024, help="of a row; two pieces a process divide it")
    parser.add_argument("--out", type=Path, default=Path("runs/bench/context_parallel.jsonl"))
    arguments = parser.parse_args()
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    reason = reason_against(processes, torch.cuda.device_count())
    if reason is not None:
        sys.exit(f"benchmarks/gpu/context_parallel.py: {reason}")
    if arguments.length % (2 * processes):
        sys.exit(f"--length {arguments.length}: make it a multiple of {2 * processes}, two pieces a process")
    from clearhead.bench.machine import facts, versions
    from clearhead.bench.records import append

    torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    mesh = init_device_mesh("cuda", (processes,))
    first = dist.get_rank() == 0
    records = compare("cuda", mesh, arguments.length, lambda line: print(line, flush=True) if first else None)
    if first:
        name = torch.cuda.get_device_name()
        append(
            arguments.out, [r | {"device": name, "machine": facts(), "versions": versions()} for r in records]
        )
    dist.destroy_process_group()
    sys.exit(0 if all(record["holds"] for record in records) else 1)


if __name__ == "__main__":
    main()

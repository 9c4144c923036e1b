"""Context parallelism in two processes on a CPU: PyTorch's own, with SDPA's operator for CPUs beside those for GPUs.

PyTorch's table of operators whose rows it shares out has only CUDA's. Here the CPU's fused one is put into it, with
PyTorch's own ring around it, so that everything but the operator is what two GPUs would run: the buffers cut in pieces
from both ends, its function in SDPA's place, the exchange of keys and values, their gradients on the way back.
"""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist
from accelerate.big_modeling import _attach_context_parallel_hooks
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard
from torch.distributed.tensor.experimental import context_parallel
from torch.distributed.tensor.experimental._context_parallel import _attention as ring
from torch.utils._pytree import tree_map
from transformers import Trainer

from clearhead.functional import attention
from clearhead.models import ClearheadForCausalLM
from tests.contracts.model_cases import VARIANTS, make_model, tokens
from tests.gpu.test_session import script

_FORWARD = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default
_BACKWARD = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward.default
LENGTH, SEQUENCE = 16, 2


def _handle(op: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[DTensor, ...]:
    """The operator over all parts, as PyTorch's handler does it for CUDA's."""
    mesh = next(x.device_mesh for x in args if isinstance(x, DTensor))
    names = [argument.name for argument in op._schema.arguments]
    given = dict(zip(names, args, strict=False)) | kwargs
    given = tree_map(lambda x: x._local_tensor if isinstance(x, DTensor) else x, given)
    assert given.pop("attn_mask", None) is None
    if op is _FORWARD:
        found = ring._templated_ring_attention(mesh.get_group(), SEQUENCE, op, **given)
    else:
        found = ring._templated_ring_attention_backward(
            mesh.get_group(), SEQUENCE, op, grad_out_name="grad_out", **given
        )
    return tuple(DTensor.from_local(x, mesh, [Shard(SEQUENCE)], run_check=False) for x in found)


@contextmanager
def on_cpus(exact: bool = False) -> Iterator[None]:
    """PyTorch's context parallelism takes CPUs; exact: parts are added up in the model's dtype, not in float32."""
    with (
        patch.dict(ring.custom_ops, {_FORWARD: _handle, _BACKWARD: _handle}),
        patch.object(ring._cp_options, "convert_to_f32", not exact),
    ):
        yield


def everything(folder: Path, rank: int) -> None:
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    check = script("context_parallel")
    with on_cpus():
        small = {"vocab_size": 512, "hidden_size": 32, "head_dim": 8, "num_hidden_layers": 1}
        found: dict[str, Any] = {"script": check.compare("cpu", mesh, LENGTH, lambda line: None, **small)}
    with on_cpus(exact=True):
        found["variants"] = {name: _apart(name, check, mesh) for name in VARIANTS}
        found["trainer"] = _by_transformers(check, mesh)
        found["refusals"] = _refusals(mesh)
    (folder / f"context.{rank}.json").write_text(json.dumps(found))


def _given(batch: int = 2) -> dict[str, Tensor]:
    ids = tokens(batch, LENGTH)
    labels = torch.cat((ids[:, 1:], torch.full((batch, 1), -100)), dim=1)
    positions = torch.arange(LENGTH).expand(batch, -1).contiguous()
    return {"input_ids": ids, "shift_labels": labels, "position_ids": positions}


def _apart(name: str, check: Any, mesh: Any) -> list[list[float]]:
    """In float64, by the engine that is named and by the one that is chosen; under padding at a row's end too."""
    found = []
    for implementation in ("sdpa", "clearhead"):
        model = make_model(name, dtype=torch.float64, attn_implementation=implementation)
        given = _given()
        if implementation == "sdpa":
            given["attention_mask"] = torch.ones_like(given["input_ids"])
            given["attention_mask"][1, -3:] = 0
            given["shift_labels"][1, -4:] = -100
        found.append(list(check.apart(check.shared_out(model, given, mesh), check.whole(model, given))))
    return found


def _by_transformers(check: Any, mesh: Any) -> list[float]:
    """As Trainer prepares a batch for Accelerate, which has looked through the model; labels, and no positions."""
    model = make_model("differential", dtype=torch.float64, attn_implementation="sdpa")
    given = _given()
    expected = check.whole(model, given)
    _attach_context_parallel_hooks(model)
    here = SimpleNamespace(cp_enabled=True, cp_backend="torch")
    accelerator = SimpleNamespace(
        parallelism_config=here, maybe_context_parallel=partial(context_parallel, mesh)
    )
    trainer: Any = SimpleNamespace(accelerator=accelerator)
    ids = given["input_ids"]
    around, inputs = Trainer._prepare_context_parallel_inputs(
        trainer, model, {"input_ids": ids, "labels": ids.clone()}
    )
    with around():
        count = ids.shape[0] * (LENGTH - 1)
        loss = model(**inputs, use_cache=False, num_items_in_batch=count).loss
        loss.backward()
    found = loss.detach().clone(), {name: p.grad for name, p in model.named_parameters()}
    for part in (found[0], *found[1].values()):
        dist.all_reduce(part)
    return list(check.apart(found, expected))


def _refusals(mesh: Any) -> dict[str, str]:
    """What is said of what PyTorch's context parallelism cannot do; nothing where it went through."""
    padded = torch.ones(2, LENGTH, dtype=torch.long)
    padded[:, :3] = 0
    # A document's end in a part, not between two.
    back = torch.arange(LENGTH) % 5
    told: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
        "no positions": ({}, {"position_ids": None}),
        "documents": ({}, {"position_ids": back.expand(2, -1).contiguous()}),
        "numbered documents": ({}, {"seq_idx": back.expand(2, -1).contiguous()}),
        "padding": ({}, {"attention_mask": padded}),
        "window": ({"sliding_window": 4, "attn_implementation": "sdpa"}, {}),
        "slopes": ({"position": "alibi", "attn_implementation": "sdpa"}, {}),
        "mask": ({}, {"attention_mask": torch.ones(2, 1, LENGTH, LENGTH, dtype=torch.bool)}),
        "scaling": (
            {
                "rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4},
                "max_position_embeddings": 8,
            },
            {},
        ),
        "engine": ({"attn_implementation": "eager"}, {}),
    }
    found = {}
    for name, (changes, other) in told.items():
        model = make_model("differential", **changes)
        found[name] = _said(model, {k: v for k, v in {**_given(), **other}.items() if v is not None}, mesh)
    x = torch.randn(1, 2, LENGTH, 4)
    try:
        with context_parallel(mesh, buffers=[x], buffer_seq_dims=[2]):
            attention(x, x, x, is_causal=True, backend="cpu")
        found["function"] = ""
    except ValueError as error:
        found["function"] = str(error)
    return found


class Reached(Exception):
    """SDPA was called: nothing had been refused."""


def _reached(*_: Any) -> None:
    raise Reached


def _said(model: ClearheadForCausalLM, given: dict[str, Tensor], mesh: Any) -> str:
    """A process that refuses leaves the others waiting for it, so nobody gets as far as the ring."""
    buffers = [value for value in given.values() if value.ndim == 2]
    try:
        with (
            patch.dict(ring.custom_ops, {_FORWARD: _reached}),
            context_parallel(mesh, buffers=buffers, buffer_seq_dims=[1] * len(buffers)),
        ):
            model(**given, use_cache=False)
    except ValueError as error:
        return str(error)
    except Reached:
        return ""
    raise AssertionError("SDPA was not called")

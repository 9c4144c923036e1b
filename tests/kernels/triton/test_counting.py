"""The counting model counts what the interpreter does: every product of tiles, and every tile of K and V read once."""

from dataclasses import replace
from typing import Any

import pytest
import torch

from clearhead.kernels.triton import counting, launch
from clearhead.kernels.triton.configs import INTERPRETED, Config
from clearhead.kernels.triton.counting import CountedAttention
from tests.kernels.support import Case, make_inputs, op_of

V1 = Case(
    own_keys=True, batch=1, heads=2, groups=1, queries=33, keys=48, width=16, value_width=32, causal=True
)
CASES = {
    "v1": V1,
    "v2": replace(V1, own_keys=False, value_width=16, causal=False),
    "softmax": replace(V1, streams=1, own_keys=False, groups=2),
}


def model_of(case: Case) -> CountedAttention:
    sizes = (case.batch, case.heads, case.groups, case.queries, case.keys, case.width, case.value_width)
    return CountedAttention(*sizes, case.streams, case.own_keys, case.causal, 4)


@pytest.mark.parametrize("name", CASES)
def test_multiply_adds_and_reads_of_keys(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from triton.runtime import interpreter

    case, done = CASES[name], {"products": 0, "numbers": 0}
    dot, load = interpreter.InterpreterBuilder.create_dot, interpreter.InterpreterBuilder.create_masked_load

    def create_dot(self: Any, a: Any, b: Any, *rest: Any) -> Any:
        done["products"] += a.data.shape[0] * a.data.shape[1] * b.data.shape[1]
        return dot(self, a, b, *rest)

    def create_masked_load(self: Any, pointers: Any, *rest: Any) -> Any:
        done["numbers"] += pointers.data.size if pointers.data.ndim == 2 else 0
        return load(self, pointers, *rest)

    monkeypatch.setattr(interpreter.InterpreterBuilder, "create_dot", create_dot)
    monkeypatch.setattr(interpreter.InterpreterBuilder, "create_masked_load", create_masked_load)
    monkeypatch.setattr(launch, "_INTERPRETED_PROCESSORS", 1)
    a = model_of(case)
    leaves = [x.float().requires_grad_() for x in make_inputs(case, torch.float32).tensors]
    out = op_of(case, "triton")(*leaves)
    assert done["products"] == counting.forward(a, INTERPRETED).executed
    # Queries once a block of rows, keys and values once a tile, for all heads of the group and both streams.
    rows = -(-a.rows // 16) * 16 * a.streams * a.width
    assert done["numbers"] == a.pairs * (rows + counting.tiles(a, INTERPRETED) * 16 * a.key_numbers)
    done["products"] = 0
    torch.autograd.grad(out.sum(), leaves)
    assert done["products"] == counting.backward(a, INTERPRETED).executed


def test_v1_over_the_twin() -> None:
    one = Config(1, 1, 1, 1)
    a = CountedAttention(1, 8, 8, 128, 128, 64, 128, 2, own_keys=True, causal=True)
    twin = counting.twin(a)
    assert counting.forward(a, one).executed / counting.forward(twin, one).executed == 1.5
    assert counting.backward(a, one).executed / counting.backward(twin, one).executed == 1.0

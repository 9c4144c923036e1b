"""The counting model counts what the interpreter does: every product of tiles, and every tile of K and V read once."""

from dataclasses import replace
from typing import Any

import pytest
import torch

from clearhead.core.masks import MaskSpec
from clearhead.kernels.triton import counting, launch
from clearhead.kernels.triton.configs import INTERPRETED, Config
from clearhead.kernels.triton.counting import CountedAttention
from tests.kernels.support import Case, make_inputs, op_of
from tests.kernels.triton.test_compact import heads_of, run
from tests.kernels.triton.test_endings import Ending, in_kernel

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


@pytest.fixture
def moved(monkeypatch: pytest.MonkeyPatch) -> dict[str, int]:
    """Numbers of tiles that the interpreter loads and stores, with one program a row block."""
    from triton.runtime import interpreter

    seen, builder = {"loads": 0, "stores": 0}, interpreter.InterpreterBuilder
    load, store = builder.create_masked_load, builder.create_masked_store

    def create_masked_load(self: Any, pointers: Any, *rest: Any) -> Any:
        seen["loads"] += pointers.data.size if pointers.data.ndim == 2 else 0
        return load(self, pointers, *rest)

    def create_masked_store(self: Any, pointers: Any, *rest: Any) -> Any:
        seen["stores"] += pointers.data.size if pointers.data.ndim == 2 else 0
        return store(self, pointers, *rest)

    monkeypatch.setattr(builder, "create_masked_load", create_masked_load)
    monkeypatch.setattr(builder, "create_masked_store", create_masked_store)
    monkeypatch.setattr(launch, "_INTERPRETED_PROCESSORS", 1)
    return seen


@torch.no_grad()
def test_reads_of_held_keys(moved: dict[str, int]) -> None:
    """Half of every key, and the table once for a tile, whatever the streams."""
    shape = (4, 2, 1, 70, 32, 64)
    heads = heads_of(shape, "own keys", torch.float32, 1)
    run(heads, MaskSpec(is_causal=True))
    a = CountedAttention(1, *shape, 2, own_keys=True, causal=True, bytes=4, held=True)
    tiles = counting.tiles(a, INTERPRETED)
    assert moved["loads"] == a.pairs * (16 * 2 * a.width + tiles * 16 * (a.key_numbers + a.table // 4))
    assert (
        a.key_numbers == 32 + 64
        and counting.forward(a, INTERPRETED).executed == a.pairs * tiles * 256 * 2 * 96
    )


def test_rows_of_a_norm(moved: dict[str, int]) -> None:
    """It stores the rows before it once more and reads none; before the backward pass its gradient is one more row."""
    rows, found = 32 * 32, {}
    for norm in (False, True):
        ending, before = Ending(replace(V1, queries=16), norm=norm), dict(moved)
        made = make_inputs(ending.case, torch.float32)
        leaves = [x.float().requires_grad_() for x in made.tensors] + [
            torch.ones(32, requires_grad=True)
        ] * norm
        out = in_kernel(ending)(*leaves)
        forward = {name: moved[name] - before[name] for name in moved}
        before = dict(moved)
        torch.autograd.grad(out.sum(), leaves)
        found[norm] = forward, {name: moved[name] - before[name] for name in moved}
    a = replace(model_of(replace(V1, queries=16)), normed=True)
    one = rows * 4
    kept = (
        counting.forward(a, INTERPRETED).moved - counting.forward(replace(a, normed=False), INTERPRETED).moved
    )
    assert kept == one and counting.norm_apart(a, False) == 2 * one
    assert found[True][0]["stores"] - found[False][0]["stores"] == rows
    assert found[True][0]["loads"] == found[False][0]["loads"]
    assert counting.deltas(a) - counting.deltas(replace(a, normed=False)) == one
    assert found[True][1]["stores"] - found[False][1]["stores"] == rows
    assert found[True][1]["loads"] == found[False][1]["loads"]


def test_v1_over_the_twin() -> None:
    one = Config(1, 1, 1, 1)
    a = CountedAttention(1, 8, 8, 128, 128, 64, 128, 2, own_keys=True, causal=True)
    twin = counting.twin(a)
    assert counting.forward(a, one).executed / counting.forward(twin, one).executed == 1.5
    assert counting.backward(a, one).executed / counting.backward(twin, one).executed == 1.0

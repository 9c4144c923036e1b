"""Blocks of keys that the CPU kernel leaves out: never more of a query's softmax than was allowed, and which ones."""

from collections.abc import Callable
from dataclasses import replace
from functools import lru_cache
from typing import Any

import pytest
import torch
from torch import Tensor

from clearhead.functional import BlockSparse
from clearhead.kernels import ops
from tests.kernels.support import (
    DTYPES,
    Case,
    answers,
    assert_right,
    every_set,
    make_inputs,
    make_masks,
    op_of,
    oracle_of,
    solve,
)

BLOCK, ROWS = 128, 64
# Rounding of what the share is computed from, and of the oracle's input.
SLIPPED = 1e-4
SMALL = Case(batch=1, heads=2, groups=1, queries=192, keys=700, causal=True)
CASES = {
    "softmax": replace(SMALL, streams=1, lam=0.0),
    "V1, two groups": replace(SMALL, own_keys=True, groups=2, width=12, value_width=24),
    "V2, one key-value head": replace(SMALL, heads=3, width=32, batch=2, keys=400),
    "three heads of 70 queries": replace(SMALL, heads=3, queries=70, keys=777),
    "window": replace(SMALL, keys=900, window=420),
    "window, not causal": replace(SMALL, streams=1, queries=640, keys=640, causal=False, window=300, lam=0.0),
    "all keys": replace(SMALL, own_keys=True, queries=640, keys=640, causal=False, heads=1),
    "padding": replace(SMALL, batch=2, keys=800, hidden=("left padding",)),
    "scattered padding": replace(SMALL, queries=128, keys=500, hidden=("padding",)),
    "documents": replace(SMALL, keys=1500, hidden=("shared runs",)),
    "scattered documents": replace(SMALL, queries=128, keys=500, hidden=("documents",)),
    "scale below zero": replace(SMALL, scale=-0.3),
}


@lru_cache(4)
def clustered(case: Case, dtype: torch.dtype) -> tuple[Tensor, ...]:
    """Queries, keys and values in float64: the keys of a block lie together, a chunk of queries looks for one block.

    One key in some blocks lies far from the others, where a mean does not show it.
    """
    rng = torch.Generator().manual_seed(case.keys + case.width)

    def rand(*size: int) -> Tensor:
        return torch.randn(size, generator=rng, dtype=torch.float64)

    q, k, v, *rest = make_inputs(case, dtype).tensors
    blocks = -(-case.keys // BLOCK)
    centres = torch.nn.functional.normalize(rand(k.shape[1], blocks, case.width), dim=-1)
    k = 0.05 * k + 3 * centres.repeat_interleave(BLOCK, 1)[:, : case.keys]
    sought = torch.randint(0, blocks, (case.queries // ROWS + 1,), generator=rng)
    streams, repeats = case.streams, case.heads // case.groups
    for h in range(q.shape[1]):
        group = h // streams // repeats
        own = group * 2 + h % 2 if case.own_keys else group
        aim = centres[own][sought].repeat_interleave(ROWS, 0)[: case.queries]
        q[:, h] = 0.1 * q[:, h] + 4 * case.width**0.5 * aim * (-1 if (case.scale or 1) < 0 else 1)
    far = torch.arange(BLOCK // 2, case.keys, 3 * BLOCK)
    k[:, :, far] = centres[:, sought[-1] :][:, :1] * 5
    return tuple(x.to(dtype).double() for x in (q, k, v)) + tuple(rest)


@lru_cache(4)
def solved(case: Case, dtype: torch.dtype) -> tuple[Tensor, tuple[Tensor, ...]]:
    """The output of `clustered` in float64, and each stream's map (B, H, L, S).

    Not by the oracle that goes row by row: it takes seconds for as many rows as there are here.
    """
    q, k, v, *rest = clustered(case, dtype)
    found = maps(case, q, k)
    first, *second = (p @ v.repeat_interleave(case.heads // case.groups, 1) for p in found)
    out = first - (rest[0] if rest else float(case.lam)) * second[0] if second else first
    return out, tuple(found)


def maps(case: Case, q: Tensor, k: Tensor) -> list[Tensor]:
    scale = case.width**-0.5 if case.scale is None else case.scale
    found = []
    for s in range(case.streams):
        own = k[:, s::2] if case.own_keys else k
        logits = scale * q[:, s :: case.streams] @ own.repeat_interleave(case.heads // case.groups, 1).mT
        logits = logits.masked_fill(~make_masks(case).allowed, float("-inf"))
        found.append(logits.softmax(-1).nan_to_num(0.0))
    return found


def size_of_rounding(case: Case, dtype: torch.dtype) -> Tensor:
    """(B, H, L, E): what rounding may do, units of the same sum in absolute values, more where logits are large."""
    q, k, v, *rest = clustered(case, dtype)
    found = solved(case, dtype)[1]
    scale = case.width**-0.5 if case.scale is None else case.scale
    largest = float(abs(scale) * q.abs().amax(2).max() * k.abs().amax(2).max() * case.width)
    units = torch.finfo(dtype).eps + 2 * torch.finfo(torch.float32).eps * largest
    weights = found[0] + sum((rest[0].abs() if rest else abs(float(case.lam))) * p for p in found[1:])
    return 4 * units * weights @ v.abs().repeat_interleave(case.heads // case.groups, 1)


def counts(case: Case, tensors: tuple[Tensor, ...], dtype: torch.dtype, sparse: BlockSparse) -> list[int]:
    """Pairs of a chunk and a block: seen, computed, used."""
    q, k, v, *rest = (x.to(dtype) for x in tensors)
    gate = None
    if case.streams == 2:
        lam = rest[0] if rest else torch.tensor(float(case.lam))
        gate = lam.float().expand(case.batch, case.heads, case.queries, 1)
    arguments = make_masks(case).arguments
    blocks = torch.ops.clearhead.block_sparse_attention(
        q[:, :: case.streams],
        q[:, 1::2] if case.streams == 2 else None,
        k[:, ::2] if case.own_keys else k,
        k[:, 1::2] if case.own_keys else None,
        v,
        gate,
        arguments.get("key_padding_mask"),
        arguments.get("documents"),
        None,
        case.keys - case.queries,
        case.window or 0,
        case.causal,
        case.width**-0.5 if case.scale is None else case.scale,
        sparse.left_out,
        sparse.estimate == "moments",
    )[1]
    return list(blocks.tolist())


def sparse_op(case: Case, **fields: Any) -> Callable[..., Tensor]:
    return op_of(case, "cpu", block_sparse={"least": 1, **fields})


def of(function: Callable[..., Tensor], tensors: tuple[Tensor, ...], dtype: torch.dtype) -> Tensor:
    q, k, v, *rest = tensors
    with torch.no_grad():
        out: Tensor = function(*(x.to(dtype) for x in (q, k, v)), *(x.float() for x in rest))
    return out.double()


@every_set
@pytest.mark.parametrize("left_out", (0.02, 0.4))
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_no_query_loses_more_than_was_allowed(
    case: Case, dtype: torch.dtype, left_out: float, isa: str
) -> None:
    """Values that name their block: a row's output is zero in the channels of the blocks that it was refused."""
    q, k, _, *rest = tensors = clustered(case, dtype)
    blocks = -(-case.keys // BLOCK)
    named = torch.nn.functional.one_hot(torch.arange(case.keys) // BLOCK, blocks).double()
    v = named.expand(case.batch, case.groups, -1, -1)
    found = of(sparse_op(case, left_out=left_out), (q, k, v, *rest), dtype)
    for p in solved(case, dtype)[1]:
        mass = p @ named
        lost = (mass * (found == 0)).sum(-1)
        assert float(lost.max()) <= left_out * (1 + SLIPPED) + SLIPPED * (dtype == torch.bfloat16)
    seen, computed, used = counts(case, tensors, dtype, BlockSparse(left_out))
    assert seen >= computed >= used > 0
    # Blocks that hide a key from anyone are kept.
    assert used < seen or left_out < 0.4 or case.hidden in (("padding",), ("documents",)), (
        "nothing was left out: nothing was tested"
    )


@every_set
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_outputs_are_as_near_as_the_formula_says(case: Case, dtype: torch.dtype, isa: str) -> None:
    left_out = 0.2
    tensors = clustered(case, dtype)
    found = of(sparse_op(case, left_out=left_out), tensors, dtype)
    v = tensors[2]
    gate = tensors[3].abs() if len(tensors) == 4 else abs(float(case.lam)) if case.streams == 2 else 0.0
    span = (v.amax(2, keepdim=True) - v.amin(2, keepdim=True)).repeat_interleave(case.heads // case.groups, 1)
    bound = left_out * (1 + gate) * span * (1 + SLIPPED)
    assert bool(((found - solved(case, dtype)[0]).abs() <= bound + size_of_rounding(case, dtype)).all())


@every_set
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("name", ("softmax", "V1, two groups", "V2, one key-value head", "padding"))
def test_random_keys_lose_nothing_and_are_right(name: str, dtype: torch.dtype, isa: str) -> None:
    """Where nothing is left out the output is that of all keys, to rounding."""
    case = replace(CASES[name], queries=80, keys=300)
    solution = solve(case, dtype)
    seen, computed, used = counts(case, solution.inputs.tensors, dtype, BlockSparse(1e-6))
    assert seen == computed == used
    found = answers(sparse_op(case, left_out=1e-6), solution.inputs, dtype, "dense", grad=False)
    assert_right(found, solution, dtype)


def test_pairs_are_counted_that_are_seen() -> None:
    for name in ("V2, one key-value head", "three heads of 70 queries", "window", "padding", "documents"):
        case = CASES[name]
        tensors = make_inputs(case, torch.float32).tensors
        rows = make_masks(case).allowed.expand(case.batch, case.heads // case.groups, -1, -1).flatten(1, 2)
        pad = [-rows.shape[-1] % BLOCK, -rows.shape[1] % ROWS]
        rows = torch.nn.functional.pad(rows, (0, pad[0], 0, pad[1]))
        tiles = rows.unflatten(1, (-1, ROWS)).unflatten(3, (-1, BLOCK)).permute(0, 1, 3, 2, 4)
        pairs = int(tiles.flatten(3).any(-1).sum()) * case.groups
        found = counts(case, tensors, torch.float32, BlockSparse(1e-6))[0]
        # What rows see is bounded by documents' numbers, not looked up pair by pair.
        assert found >= pairs and (found == pairs or case.hidden)


@every_set
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_zero_changes_no_bit(dtype: torch.dtype, isa: str) -> None:
    for name in ("softmax", "V1, two groups", "window"):
        case = CASES[name]
        tensors = clustered(case, dtype)
        whole = of(op_of(case, "cpu"), tensors, dtype)
        for fields in ({"left_out": 0.0}, {"left_out": 0.5, "least": case.queries + 1}):
            assert torch.equal(of(sparse_op(case, **fields), tensors, dtype), whole)


@every_set
def test_moments_are_near_for_keys_that_are_spread_normally(isa: str) -> None:
    case = replace(CASES["softmax"], keys=1500, width=32, batch=1)
    rng = torch.Generator().manual_seed(3)
    q, k, *_ = make_inputs(case, torch.float32).tensors
    # Means apart by block, and spreads apart by channel.
    means = torch.randn(1, case.groups, 12, case.width, generator=rng, dtype=torch.float64)
    k = k * torch.linspace(0.1, 1.0, case.width) + 1.5 * means.repeat_interleave(BLOCK, 2)[:, :, : case.keys]
    aims = torch.randn(1, case.heads, case.queries // ROWS, case.width, generator=rng, dtype=torch.float64)
    q = 2 * aims.repeat_interleave(ROWS, 2) + 0.5 * q
    named = torch.nn.functional.one_hot(torch.arange(case.keys) // BLOCK, 12).double()
    v = named.expand(1, case.groups, -1, -1)
    q, k = (x.float().double() for x in (q, k))
    found = of(sparse_op(case, left_out=0.1, estimate="moments"), (q, k, v), torch.float32)
    lost = (maps(case, q, k)[0] @ named * (found == 0)).sum(-1)
    assert 0.02 < float(lost.max()) < 0.2 and float(lost.mean()) < 0.1
    some = counts(case, (q, k, v), torch.float32, BlockSparse(0.1, "moments"))
    assert some[1] < some[0], "no logits were spared"


def test_a_key_far_from_its_block_is_found_by_the_bound() -> None:
    """Mean and variance do not show one key in 128 that takes nearly all of the softmax; largest numbers do."""
    case = Case(streams=1, batch=1, heads=1, groups=1, queries=128, keys=640, causal=True, width=16, lam=0.0)
    q, k, v = (0.01 * x for x in make_inputs(case, torch.float32).tensors)
    q[..., 0], k[:, :, 300, 0] = 8.0, 6.0
    whole = oracle_of(case)(q, k, v)
    near = of(sparse_op(case, left_out=0.9), (q, k, v), torch.float32)
    # All other keys together hold 0.4 % of the mass.
    assert float((near - whole).norm() / whole.norm()) < 1e-2
    far = of(sparse_op(case, left_out=0.9, estimate="moments"), (q, k, v), torch.float32)
    assert float((far - whole).norm() / whole.norm()) > 0.5


@every_set
def test_what_is_not_finite_reaches_those_that_see_it(isa: str) -> None:
    """NaN in a block that all rows see, in one that hides it from some, in a query; an infinite key."""
    case = CASES["V1, two groups"]
    for where, value in ((10, "nan"), (200, "nan"), (case.keys - 40, "nan"), (200, "inf")):
        q, k, v, *rest = clustered(case, torch.float32)
        q, k = q.clone(), k.clone()
        k[0, 0, where, 3] = float(value)
        q[0, 1, 5, 2] = float("nan")
        whole = of(op_of(case, "cpu"), (q, k, v, *rest), torch.float32)
        found = of(sparse_op(case, left_out=0.3), (q, k, v, *rest), torch.float32)
        assert torch.equal(found.isnan(), whole.isnan())


def test_threads_change_no_bit() -> None:
    for name in ("V1, two groups", "documents", "three heads of 70 queries"):
        case = CASES[name]
        tensors = clustered(case, torch.float32)
        found = []
        for threads in (1, 3):
            torch.set_num_threads(threads)
            found.append(of(sparse_op(case, left_out=0.2), tensors, torch.float32))
        assert torch.equal(*found)


@pytest.mark.parametrize("name", ("V1, two groups", "softmax", "padding"))
def test_operator_is_well_behaved(name: str) -> None:
    case = CASES[name]
    q, k, v, *rest = (x.float() for x in clustered(case, torch.float32))
    two = case.streams == 2
    gate = rest[0].expand(case.batch, case.heads, case.queries, 1) if rest else None
    arguments = make_masks(case).arguments
    torch.library.opcheck(
        torch.ops.clearhead.block_sparse_attention,
        (
            *(q[:, :: case.streams], q[:, 1::2] if two else None),
            *(k[:, ::2] if case.own_keys else k, k[:, 1::2] if case.own_keys else None),
            *(v, gate, arguments.get("key_padding_mask"), None, None),
            *(case.keys - case.queries, 0, True, 0.25, 0.1, False),
        ),
        test_utils=("test_schema", "test_faketensor"),
    )
    assert ops.no_blocks(v).tolist() == [0, 0, 0]

"""Attention over the codes of a quantised cache, by the CPU kernel where they lie and in plain PyTorch by pieces."""

from dataclasses import replace
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from clearhead.core.attend import attend, difference, prepare, problem_of, single
from clearhead.core.dispatch import load_backend
from clearhead.core.masks import MaskSpec
from clearhead.core.quantised import hold
from clearhead.core.streams import Streams
from clearhead.kernels.cpu import direct
from tests.kernels.support import every_set

SCALE = 0.2


class Shape(NamedTuple):
    heads: int
    groups: int
    queries: int
    held: int
    newest: int
    width: int
    value_width: int


# Few rows and many; widths that fill vectors, quads and groups of channels and such that do not.
SHAPES = (
    Shape(8, 2, 1, 256, 44, 64, 128),
    Shape(8, 8, 1, 128, 1, 32, 64),
    Shape(4, 1, 2, 128, 77, 32, 32),
    Shape(6, 2, 1, 256, 3, 12, 20),
    Shape(2, 2, 3, 384, 116, 144, 72),
    Shape(4, 4, 1, 128, 9, 10, 65),
    Shape(8, 2, 7, 256, 44, 40, 96),
    Shape(4, 2, 70, 128, 100, 24, 72),
)
STREAMS = ((1, True), (2, False), (2, True))


class Problem(NamedTuple):
    """Streams whose first keys are codes; the same in float64 with what the codes stand for, and as it was before."""

    heads: Streams
    exact: Streams
    before: Streams


def problem(
    shape: Shape,
    streams: int,
    shared: bool,
    bits: int,
    dtype: torch.dtype,
    table: bool = False,
    batch: int = 2,
) -> Problem:
    rng = torch.Generator().manual_seed(sum(shape) + streams)
    keys = shape.held + shape.newest

    def some(*size: int) -> Tensor:
        return torch.randn(size, generator=rng).to(dtype)

    q = tuple(some(batch, shape.heads, shape.queries, shape.width) for _ in range(streams))
    width = shape.width // 2 if table else shape.width
    k = tuple(some(batch, shape.groups, keys, width) for _ in range(1 if shared else streams))
    v = some(batch, shape.groups, keys, shape.value_width)
    gate = 2 * torch.rand(batch, shape.heads, shape.queries, 1, generator=rng) if streams == 2 else None
    places = torch.randn(batch, keys, shape.width, generator=rng) if table else None
    held = hold(tuple(x[:, :, : shape.held] for x in k), v[:, :, : shape.held], bits)
    newest = (tuple(x[:, :, shape.held :] for x in k), v[:, :, shape.held :])
    old_keys, old_values = held.expanded(torch.float64)
    whole = tuple(torch.cat((a, b.double()), 2) for a, b in zip(old_keys, newest[0], strict=True))
    wide = [None if x is None else x.double() for x in (gate, places)]
    queries = tuple(x.double() for x in q)
    return Problem(
        Streams(q, *newest, gate, places, held),
        Streams(queries, whole, torch.cat((old_values, newest[1].double()), 2), *wide),
        Streams(queries, tuple(x.double() for x in k), v.double(), *wide),
    )


def run(heads: Streams, mask: MaskSpec, backend: str) -> Tensor:
    mix = single if len(heads.q) == 1 else difference
    made = prepare((load_backend(backend),), problem_of(heads, mask, mix.__name__), mask, False)
    return attend(heads, made, SCALE, mix)[0]


def masks_of(shape: Shape, batch: int = 2) -> dict[str, MaskSpec]:
    keys = shape.held + shape.newest
    padding = torch.ones(batch, keys, dtype=torch.bool)
    padding[0, : shape.held - 20] = False
    padding[:, shape.held - 1] = False
    nothing = torch.zeros(batch, keys, dtype=torch.bool)
    return {
        "causal": MaskSpec(is_causal=True),
        "padded": MaskSpec(is_causal=True, key_padding=padding),
        "hidden": MaskSpec(is_causal=True, key_padding=nothing),
        "window": MaskSpec(is_causal=True, window=keys // 2 + 3),
        "shifted": MaskSpec(is_causal=True, offset=torch.tensor(keys - shape.queries - 5)),
    }


def assert_right(found: Tensor, case: Problem, mask: MaskSpec, dtype: torch.dtype) -> None:
    """As far off as eager attention over the same numbers in the same type, twice over, and an eighth of what the
    codes cost.

    The latter is for factors that the kernel rounds to 16 bits before it multiplies them with codes.
    """
    expected = run(case.exact, mask, "eager")
    numbers = replace(
        case.exact,
        q=case.heads.q,
        k=tuple(x.to(dtype) for x in case.exact.k),
        v=case.exact.v.to(dtype),
        gate=case.heads.gate,
        table=case.heads.table,
    )
    eager = (run(numbers, mask, "eager").double() - expected).norm()
    cost = (run(case.before, mask, "eager") - expected).norm()
    assert (found.double() - expected).norm() <= 2 * eager + cost / 8 + 1e-6 * expected.norm()


@every_set
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("shape", SHAPES, ids=lambda s: "-".join(map(str, s)))
@torch.no_grad()
def test_codes_are_what_they_stand_for(isa: str, shape: Shape, bits: int, dtype: torch.dtype) -> None:
    for streams, shared in STREAMS:
        case = problem(shape, streams, shared, bits, dtype)
        for mask in masks_of(shape).values():
            assert_right(run(case.heads, mask, "cpu"), case, mask, dtype)


@every_set
@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize(
    "shape", [s for s in SHAPES if s.width % 4 == 0], ids=lambda s: "-".join(map(str, s))
)
@torch.no_grad()
def test_codes_of_half_keys_meet_their_table(isa: str, shape: Shape, bits: int) -> None:
    for streams, shared in STREAMS:
        case = problem(shape, streams, shared, bits, torch.float32, table=True)
        for mask in masks_of(shape).values():
            assert_right(run(case.heads, mask, "cpu"), case, mask, torch.float32)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16], ids=str)
@pytest.mark.parametrize("table", [False, True])
@pytest.mark.parametrize("shape", [SHAPES[0], SHAPES[3], SHAPES[7]], ids=lambda s: "-".join(map(str, s)))
@torch.no_grad()
def test_pieces_are_the_whole(
    shape: Shape, table: bool, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("clearhead.kernels.blocks.PIECE", 128)
    for streams, shared in STREAMS:
        case = problem(shape, streams, shared, 8, dtype, table)
        for mask in masks_of(shape).values():
            expected = run(case.exact, mask, "eager")
            error = (run(case.heads, mask, "blocks").double() - expected).abs().max()
            # Float16 keeps 11 bits of queries and of the answer; all between is float32.
            assert error <= 16 * torch.finfo(dtype).eps * (1 + expected.abs().max())


@torch.no_grad()
def test_pieces_know_slopes_and_dense_masks() -> None:
    shape = SHAPES[6]
    case = problem(shape, 2, False, 8, torch.float64)
    keys = shape.held + shape.newest
    bias = torch.randn(1, 1, shape.queries, keys, generator=torch.Generator().manual_seed(0))
    slopes = torch.linspace(0.01, 0.3, shape.heads)
    for mask in (
        MaskSpec(is_causal=True, slopes=slopes),
        MaskSpec(dense=bias.double()),
        MaskSpec(dense=bias > 0, window=150),
    ):
        expected = run(case.exact, mask, "eager")
        torch.testing.assert_close(run(case.heads, mask, "blocks"), expected, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize(("bits", "most"), [(8, 0.01), (4, 0.2)])
@pytest.mark.parametrize("kind", ["plain", "outlier channels", "shifted", "positive"])
@torch.no_grad()
def test_what_codes_cost_on_random_keys(kind: str, bits: int, most: float) -> None:
    """Of attention's output: at most 1 % with 8 bits; with 4 bits 10 to 16 %."""
    rng = torch.Generator().manual_seed(1)
    q = tuple(torch.randn(1, 8, 4, 64, generator=rng) for _ in range(2))
    k = [torch.randn(1, 2, 1024 + 32, 64, generator=rng) for _ in range(2)]
    v = torch.randn(1, 2, 1024 + 32, 128, generator=rng)
    if kind == "outlier channels":
        large = torch.where(torch.arange(64) % 16 == 5, 20.0, 1.0)
        k, q = [x * large for x in k], tuple(x / large for x in q)
    if kind == "shifted":
        k = [x + 5 * torch.randn(64, generator=rng) for x in k]
    if kind == "positive":
        k = [x.relu() for x in k]
    gate = torch.full((1, 8, 4, 1), 0.5)
    held = hold(tuple(x[:, :, :1024] for x in k), v[:, :, :1024], bits)
    found = Streams(q, tuple(x[:, :, 1024:] for x in k), v[:, :, 1024:], gate, None, held)
    mask, scale = MaskSpec(is_causal=True), 0.125
    made = prepare((load_backend("cpu"),), problem_of(found, mask, "difference"), mask, False)
    plain = Streams(q, tuple(k), v, gate)
    eager = prepare((load_backend("eager"),), problem_of(plain, mask, "difference"), mask, False)
    expected = attend(plain, eager, scale, difference)[0]
    error = (attend(found, made, scale, difference)[0] - expected).norm() / expected.norm()
    assert error <= most


@every_set
@torch.no_grad()
def test_a_query_that_is_not_finite_gives_nan_and_no_other_does(isa: str) -> None:
    for bad in (float("nan"), float("inf")):
        case = problem(SHAPES[0], 2, False, 8, torch.float32)
        mask = MaskSpec(is_causal=True)
        expected = run(case.heads, mask, "cpu")
        case.heads.q[0][0, 3, 0, 7] = bad
        found = run(case.heads, mask, "cpu")
        assert found[0, 3].isnan().all()
        found[0, 3] = expected[0, 3]
        torch.testing.assert_close(found, expected, atol=1e-6, rtol=0)


@torch.no_grad()
def test_the_operator_gives_what_a_direct_call_gives(monkeypatch: pytest.MonkeyPatch) -> None:
    cases = [
        (problem(shape, 2, False, bits, torch.bfloat16, table), mask)
        for shape in (SHAPES[0], SHAPES[7])
        for bits in (8, 4)
        for table in (False, True)
        for mask in masks_of(shape).values()
    ]
    # What a layer with a window holds is a part of the cache: its codes are not dense.
    held = cases[0][0].heads.held
    assert held is not None
    part = replace(cases[0][0].heads, held=held.part(128, 128))
    heads = [case.heads for case, _ in cases]
    found = [run(x, mask, "cpu") for x, (_, mask) in zip(heads, cases, strict=True)]
    found_part = run(part, MaskSpec(is_causal=True), "cpu")
    monkeypatch.setattr(direct, "possible", lambda tensors: False)
    for x, (_, mask), expected in zip(heads, cases, found, strict=True):
        assert torch.equal(run(x, mask, "cpu"), expected)
    assert torch.equal(run(part, MaskSpec(is_causal=True), "cpu"), found_part)


@torch.no_grad()
def test_it_compiles() -> None:
    case = problem(SHAPES[0], 2, False, 8, torch.float32)
    mask = MaskSpec(is_causal=True)
    compiled = torch.compile(lambda h: run(h, mask, "cpu"), backend="aot_eager", fullgraph=True)
    assert torch.equal(compiled(case.heads), run(case.heads, mask, "cpu"))


def test_others_refuse_codes_by_name() -> None:
    case = problem(SHAPES[0], 2, False, 8, torch.float32)
    mask = MaskSpec(is_causal=True)
    for backend in ("eager", "sdpa"):
        with pytest.raises(
            ValueError, match="not as the codes of a quantised cache; cpu and blocks take those"
        ):
            run(case.heads, mask, backend)
    case.heads.q[0].requires_grad_()
    with pytest.raises(ValueError, match="have no gradient"):
        run(case.heads, mask, "cpu")
    with pytest.raises(ValueError, match="codes have no gradient"):
        run(case.heads, mask, "blocks")
    with pytest.raises(ValueError, match="for the codes of a quantised cache"):
        run(case.exact, mask, "blocks")

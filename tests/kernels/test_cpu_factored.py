"""Decoding against keys that are held at half their width, with a table of their places."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from clearhead.core.attend import attend, difference, prepare, problem_of, single
from clearhead.core.dispatch import load_backend
from clearhead.core.masks import MaskSpec
from clearhead.core.streams import Streams
from tests.kernels.support import every_set

# query heads, key-value heads, queries, keys, D, E
SHAPES = (
    (8, 2, 1, 300, 64, 128),
    (8, 8, 1, 129, 64, 64),
    (4, 1, 2, 77, 32, 32),
    (6, 2, 1, 1, 12, 20),
    (2, 2, 3, 500, 128, 32),
)


def heads_of(shape: tuple[int, ...], streams: int, shared: bool, batch: int, dtype: torch.dtype) -> Streams:
    count, groups, queries, keys, width, value = shape
    rng = torch.Generator().manual_seed(sum(shape) + streams)

    def some(*size: int) -> Tensor:
        return torch.randn(size, generator=rng).to(dtype)

    gate = torch.rand(batch, count, queries, 1, generator=rng) if streams == 2 else None
    return Streams(
        tuple(some(batch, count, queries, width) for _ in range(streams)),
        tuple(some(batch, groups, keys, width // 2) for _ in range(1 if shared else streams)),
        some(batch, groups, keys, value),
        gate,
        torch.randn(batch, keys, width, generator=rng),
    )


def wide(heads: Streams) -> Streams:
    def double(x: Tensor) -> Tensor:
        return x.double()

    assert heads.table is not None
    gate = None if heads.gate is None else heads.gate.double()
    return Streams(
        tuple(map(double, heads.q)), tuple(map(double, heads.k)), heads.v.double(), gate, heads.table.double()
    )


def run(heads: Streams, mask: MaskSpec, backend: str) -> Tensor:
    mix = single if len(heads.q) == 1 else difference
    problem = problem_of(heads, mask, mix.__name__)
    return attend(heads, prepare((load_backend(backend),), problem, mask, False), 0.3, mix)[0]


def masks_of(shape: tuple[int, ...], batch: int) -> dict[str, MaskSpec]:
    keys = shape[3]
    padding = torch.ones(batch, keys, dtype=torch.bool)
    padding[0, : keys // 3] = False
    return {
        "causal": MaskSpec(is_causal=True),
        "padded": MaskSpec(is_causal=True, key_padding=padding),
        "window": MaskSpec(is_causal=True, window=max(1, keys // 2)),
        "shifted": MaskSpec(is_causal=True, offset=torch.tensor(max(0, keys - shape[2] - 5))),
    }


@every_set
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize(("streams", "shared"), [(1, True), (2, False), (2, True)])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@torch.no_grad()
def test_it_equals_attention_over_the_expanded_keys(
    isa: str, shape: tuple[int, ...], streams: int, shared: bool, dtype: torch.dtype
) -> None:
    heads = heads_of(shape, streams, shared, 2, dtype)
    for name, mask in masks_of(shape, 2).items():
        expected = run(wide(heads), mask, "eager")
        eager = (run(heads, mask, "eager").double() - expected).abs().max()
        found = (run(heads, mask, "cpu").double() - expected).abs().max()
        assert found <= 2 * eager + 4 * torch.finfo(dtype).eps * expected.abs().max(), name


@torch.no_grad()
def test_one_table_serves_the_whole_batch() -> None:
    heads = heads_of(SHAPES[0], 2, False, 3, torch.float32)
    assert heads.table is not None
    heads = replace(heads, table=heads.table[:1])
    mask = MaskSpec(is_causal=True)
    torch.testing.assert_close(run(heads, mask, "cpu"), run(heads, mask, "eager"), atol=2e-6, rtol=2e-5)


def test_more_rows_and_gradients_take_the_expanded_keys() -> None:
    for shape in ((8, 1, 3, 40, 16, 16), (2, 2, 1, 40, 16, 16)):
        heads = heads_of(shape, 1, True, 1, torch.float32)
        heads = replace(heads, k=(heads.k[0].requires_grad_(),))
        found = run(heads, MaskSpec(is_causal=True), "cpu")
        assert found.requires_grad
        torch.testing.assert_close(found, run(heads, MaskSpec(is_causal=True), "eager"), atol=2e-6, rtol=2e-5)


@torch.no_grad()
def test_a_hidden_key_may_hold_nan() -> None:
    heads = heads_of(SHAPES[0], 2, False, 2, torch.float32)
    padding = torch.ones(2, SHAPES[0][3], dtype=torch.bool)
    padding[0, :40] = False
    mask = MaskSpec(is_causal=True, key_padding=padding)
    expected = run(heads, mask, "cpu")
    for x in (*heads.k, heads.v):
        x[0, :, :40] = float("nan")
    assert torch.equal(run(heads, mask, "cpu"), expected)


@torch.no_grad()
def test_it_compiles() -> None:
    heads = heads_of(SHAPES[0], 2, False, 1, torch.float32)
    mask = MaskSpec(is_causal=True)
    compiled = torch.compile(lambda h: run(h, mask, "cpu"), backend="aot_eager", fullgraph=True)
    assert torch.equal(compiled(heads), run(heads, mask, "cpu"))

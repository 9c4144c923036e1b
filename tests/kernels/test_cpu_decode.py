"""Few rows against keys as they lie, the keys of a head divided among threads or not."""

import pytest
import torch
from torch import Tensor

from clearhead.core.attend import attend, difference, prepare, problem_of
from clearhead.core.dispatch import load_backend
from clearhead.core.masks import MaskSpec
from clearhead.core.streams import Streams
from clearhead.functional import attention, differential_attention
from tests.kernels.support import every_set


def both(inputs: tuple[Tensor, ...], dtype: torch.dtype, **options: object) -> tuple[Tensor, Tensor, Tensor]:
    """What the kernel finds, what eager attention finds in the same dtype, and what it is in float64."""

    def run(backend: str, to: torch.dtype) -> Tensor:
        q, k, v, *lam = (x.to(to) for x in inputs)
        if not lam:
            return attention(q, k, v, is_causal=True, backend=backend, **options).double()
        return differential_attention(q, k, v, lam[0], is_causal=True, backend=backend, **options).double()

    return run("cpu", dtype), run("eager", dtype), run("eager", torch.float64)


def close(found: Tensor, eager: Tensor, exact: Tensor, dtype: torch.dtype) -> None:
    floor = 4 * torch.finfo(dtype).eps * exact.abs().max()
    assert (found - exact).abs().max() <= 2 * (eager - exact).abs().max() + floor


@every_set
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("rows", [1, 3, 4, 8, 9])
@pytest.mark.parametrize("threads", [2, 3])
@torch.no_grad()
def test_keys_of_one_head_are_divided_among_threads(
    isa: str, threads: int, rows: int, dtype: torch.dtype
) -> None:
    torch.set_num_threads(threads)
    rng = torch.Generator().manual_seed(rows)
    keys = 700

    def some(*size: int) -> Tensor:
        return torch.randn(size, generator=rng)

    k, v = some(1, 2, keys, 40), some(1, 1, keys, 72)
    # The largest logits lie in the last part alone: every part has another reference.
    k[:, :, 600:] *= 6
    inputs = (some(1, 2 * rows, 1, 40), k, v, torch.rand(1, rows, 1, 1, generator=rng))
    padding = torch.ones(1, keys, dtype=torch.bool)
    padding[:, :300] = False
    for options in ({}, {"window": 65}, {"key_padding_mask": padding}):
        close(*both(inputs, dtype, **options), dtype)
    alone = (inputs[0][:, :rows], k[:, :1], v)
    close(*both(alone, dtype), dtype)


@every_set
@torch.no_grad()
def test_a_part_in_which_a_row_sees_nothing_adds_nothing(isa: str) -> None:
    torch.set_num_threads(2)
    rng = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, 1, n, 16, generator=rng) for n in (2, 512, 512))
    padding = torch.zeros(1, 512, dtype=torch.bool)
    padding[:, 500] = True
    found, eager, exact = both((q, k, v), torch.float32, key_padding_mask=padding)
    close(found, eager, exact, torch.float32)
    assert torch.equal(found[0, 0, 0], v[0, 0, 500].double())
    padding[:] = False
    assert not attention(q, k, v, is_causal=True, key_padding_mask=padding, backend="cpu").any()


@every_set
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("width", [16, 32, 64, 128, 256])
@torch.no_grad()
def test_widths_of_whole_vectors_and_keys_of_both_streams_side_by_side(
    isa: str, width: int, dtype: torch.dtype
) -> None:
    rng = torch.Generator().manual_seed(width)
    mask = MaskSpec(is_causal=True)

    def some(*size: int) -> Tensor:
        return torch.randn(size, generator=rng)

    def mixed(
        backend: str, to: torch.dtype, q: Tensor, k: tuple[Tensor, ...], v: Tensor, gate: Tensor
    ) -> Tensor:
        heads = Streams(
            q.to(to).chunk(2, 1), tuple(x if x.dtype == to else x.to(to) for x in k), v.to(to), gate
        )
        prepared = prepare((load_backend(backend),), problem_of(heads, mask, "difference"), mask, False)
        return attend(heads, prepared, width**-0.5, difference)[0].double()

    for rows, keys, wide in ((1, 131, 2 * width), (2, 33, width), (3, 64, 2 * width), (6, 95, 48)):
        # As in a cache: a row of memory holds the keys of both streams.
        side = some(1, 2, keys, 2 * width).to(dtype)
        views, copies = side.chunk(2, 3), tuple(x.contiguous() for x in side.chunk(2, 3))
        rest = (some(1, 4 * rows, 1, width).to(dtype), some(1, 2, keys, wide).to(dtype))
        gate = torch.rand(1, 2 * rows, 1, 1, generator=rng)
        exact = mixed("eager", torch.float64, rest[0], views, rest[1], gate)
        eager = mixed("eager", dtype, rest[0], views, rest[1], gate)
        found = mixed("cpu", dtype, rest[0], side.chunk(2, 3), rest[1], gate)
        close(found, eager, exact, dtype)
        assert torch.equal(found, mixed("cpu", dtype, rest[0], copies, rest[1], gate))

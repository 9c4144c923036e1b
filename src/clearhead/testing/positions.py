"""Contract of position methods.

Legend: B batch, H query heads, L tokens, D key width.
"""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from clearhead.positions.base import Position
from clearhead.testing.backends import relative_error
from clearhead.testing.masks import rand

B, H, L = 2, 4, 7


def check_position(
    cls: type[Position],
    *,
    head_dim: int = 8,
    parameters: Mapping[str, Any] | None = None,
    max_positions: int | None = None,
    relative: bool = True,
    oracle: Callable[[Tensor, Tensor], Tensor] | None = None,
) -> None:
    """Raise AssertionError unless `cls` is a position method that layers and models can use.

    parameters: the configuration's `rope_parameters`, as `from_parameters` takes them.
    relative:   logits depend on the distance of query and key alone, so that shifting both changes nothing.
    oracle:     queries (B, H, L, D) and positions (B, L) -> turned queries, in float64 and apart from the method.

    Checked: shapes and dtypes, gradients, queries turned in pieces as whole, keys at positions of their own, angles
    that bfloat16 does not round, no buffer in the state dict, buffers right after a cast, and slopes.
    """
    place = cls.from_parameters(head_dim, dict(parameters or {}), max_positions)
    name = cls.__name__
    positions = torch.arange(L)[None] + torch.tensor([[0], [11]])
    length = torch.full((B, 1), 2 * L + 11)
    q, k = rand(B, H, L, head_dim, seed=1), rand(B, H, L, head_dim, seed=2)

    def turned(at: Tensor, x: Tensor = q) -> Tensor:
        return place(at, None, length, x.dtype).query(x)

    whole = turned(positions)
    assert whole.shape == q.shape and whole.dtype == q.dtype, f"{name}: the query changes its shape or dtype"
    leaf = q.clone().requires_grad_()
    turned(positions, leaf).square().sum().backward()
    assert leaf.grad is not None and bool(leaf.grad.isfinite().all()), (
        f"{name}: no gradient reaches the query"
    )
    part = turned(positions[:, 3:], q[:, :, 3:])
    _near(part, whole[:, :, 3:], 1e-12, f"{name}: a piece of the queries is not turned as in the whole")
    keys = place(positions, None, length, k.dtype).key(k)
    apart = place(positions[:, -1:], positions, length, k.dtype)
    _near(apart.key(k), keys, 1e-12, f"{name}: keys with positions of their own are not turned as others")
    if relative:
        _check_relative(place, positions, length, q, k, name)
    if oracle is not None:
        _near(whole, oracle(q, positions), 1e-10, f"{name}: it is not what its oracle says")
    _check_precision(place, length, q, name)
    assert not place.state_dict(), f"{name}: buffers that can be computed belong to no checkpoint"
    _check_slopes(place, name)


def _logits(place: Position, positions: Tensor, length: Tensor, q: Tensor, k: Tensor) -> Tensor:
    rotation = place(positions, None, length, q.dtype)
    return rotation.query(q) @ rotation.key(k).mT


def _check_relative(
    place: Position, positions: Tensor, length: Tensor, q: Tensor, k: Tensor, name: str
) -> None:
    here = _logits(place, positions, length, q, k)
    there = _logits(place, positions + 5, length, q, k)
    _near(there, here, 1e-9, f"{name}: logits change when query and key are shifted together")


def _check_precision(place: Position, length: Tensor, q: Tensor, name: str) -> None:
    # Past 256 bfloat16 skips positions, past 2048 float16 does: angles taken in them would be radians off.
    far = torch.arange(4090, 4090 + q.shape[2])[None].expand(q.shape[0], -1)
    request = length.clamp(min=4096 + q.shape[2])
    for dtype in (torch.float32, torch.bfloat16):
        rounded = q.to(dtype)
        exact = place(far, None, request, torch.float64).query(rounded.double())
        again = place.to(dtype)(far, None, request, dtype).query(rounded)
        assert again.dtype == dtype, f"{name}: {dtype} queries come back as {again.dtype}"
        floor = 2e-3 if dtype == torch.float32 else 2e-2
        _near(again, exact, floor, f"{name}: at position 4096 in {dtype} it is off by more than rounding")
    place.double()


def _check_slopes(place: Position, name: str) -> None:
    slopes = place.slopes(H)
    if slopes is None:
        return
    right = slopes.shape == (H,) and slopes.dtype in (torch.float32, torch.float64)
    assert right, (
        f"{name}: slopes must be (H,) in float32 or float64, not {slopes.dtype} {tuple(slopes.shape)}"
    )
    assert bool(slopes.isfinite().all()), f"{name}: a slope is not finite"


def _near(found: Tensor, expected: Tensor, most: float, sentence: str) -> None:
    error = relative_error(found, expected)
    assert error <= most, f"{sentence} ({error:.1e})"

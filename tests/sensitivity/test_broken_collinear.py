"""Break one term of collinear attention, alone and in differential attention's two streams: the oracle must notice."""

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from clearhead.core.streams import Streams
from clearhead.positions.base import Rotation
from clearhead.variants.base import Variant
from clearhead.variants.differential_collinear import DifferentialCollinear, DifferentialV2Collinear
from clearhead.variants.placement import Activation, CollinearPlacement, Mode
from tests.sensitivity.test_broken_terms import (
    Patch,
    groups_tiled,
    halves_paired,
    keys_swapped_between_streams,
    must_be_noticed,
    no_factor,
    no_lambda,
    no_sigmoid,
    rotated_backwards,
    streams_swapped,
    wrong_sign,
)


def t_tied_after_relu(patch: Patch) -> None:
    def key(self: CollinearPlacement, k: Tensor, rotation: Rotation) -> Tensor:
        first, second = k.chunk(2, dim=-1)
        t = (torch.relu(first) + torch.relu(second)) / 2
        return rotation.key(torch.cat((t, t if self.mode == "slack" else torch.zeros_like(t)), dim=-1))

    patch.setattr(CollinearPlacement, "key", key)


def t_negative(patch: Patch) -> None:
    def key(self: CollinearPlacement, k: Tensor, rotation: Rotation) -> Tensor:
        first, second = k.chunk(2, dim=-1)
        t = (first + second) / 2
        return rotation.key(torch.cat((t, t if self.mode == "slack" else torch.zeros_like(t)), dim=-1))

    patch.setattr(CollinearPlacement, "key", key)


def t_in_both_components(patch: Patch) -> None:
    """exact with k' = (t, t): an initial angle of 45 degrees."""
    original = CollinearPlacement.key
    patch.setattr(
        CollinearPlacement, "key", lambda self, *arguments: original(replace(self, mode="slack"), *arguments)
    )


def mode_of(other: Mode) -> Callable[[Patch], None]:
    def apply(patch: Patch) -> None:
        original = CollinearPlacement.__init__

        def init(self: CollinearPlacement, head_dim: int, mode: str, activation: Activation) -> None:
            original(self, head_dim, other, activation)

        patch.setattr(CollinearPlacement, "__init__", init)

    apply.__name__ = f"mode_{other}"
    return apply


def length_not_squared(patch: Patch) -> None:
    """|q_j| instead of |q_j|²."""

    def query(self: CollinearPlacement, q: Tensor, rotation: Rotation) -> Tensor:
        first, second = q.chunk(2, dim=-1)
        length = (first.square() + second.square()).sqrt()
        return rotation.query(torch.cat((length, torch.zeros_like(length)), dim=-1))

    patch.setattr(CollinearPlacement, "query", query)


def noise_not_collinear(patch: Patch) -> None:
    """The second stream as ordinary RoPE has it."""

    def place(self: Variant, heads: Streams, rotation: Rotation) -> Streams:
        q, k = (
            [self.place_query(q, rotation) for q in heads.q],
            [self.place_key(k, rotation) for k in heads.k],
        )
        q[1] = rotation.query(heads.q[1])
        if not heads.shares_keys:
            k[1] = rotation.key(heads.k[1])
        return replace(heads, q=tuple(q), k=tuple(k))

    patch.setattr(DifferentialCollinear, "place", place)
    patch.setattr(DifferentialV2Collinear, "place", place)


def only_noise_keys_ordinary(patch: Patch) -> None:
    """q2 collinear against a rotated k2: neither mechanism."""

    def place(self: Variant, heads: Streams, rotation: Rotation) -> Streams:
        placed = Variant.place(self, heads, rotation)
        return replace(placed, k=(placed.k[0], rotation.key(heads.k[1])))

    patch.setattr(DifferentialCollinear, "place", place)


def one_t_for_both_streams(patch: Patch) -> None:
    def place(self: Variant, heads: Streams, rotation: Rotation) -> Streams:
        placed = Variant.place(self, heads, rotation)
        return replace(placed, k=(placed.k[0],) * 2)

    patch.setattr(DifferentialCollinear, "place", place)


BREAKS: list[tuple[Callable[[Patch], None], str]] = [
    *((t_tied_after_relu, name) for name in ("collinear", "collinear_slack", "collinear_strict")),
    (t_negative, "collinear"),
    (t_in_both_components, "collinear"),
    (length_not_squared, "collinear"),
    (mode_of("strict"), "collinear"),
    (mode_of("slack"), "collinear"),
    (mode_of("exact"), "collinear_strict"),
    (mode_of("exact"), "collinear_slack"),
    *(
        (broken, name)
        for name in ("differential_collinear", "differential_v2_collinear")
        for broken in (
            wrong_sign,
            no_lambda,
            streams_swapped,
            halves_paired,
            noise_not_collinear,
            t_negative,
            t_in_both_components,
            length_not_squared,
            rotated_backwards,
            groups_tiled,
            mode_of("strict"),
        )
    ),
    (mode_of("exact"), "differential_collinear_slack"),
    (mode_of("exact"), "differential_v2_collinear_strict"),
    (only_noise_keys_ordinary, "differential_collinear"),
    (one_t_for_both_streams, "differential_collinear"),
    (keys_swapped_between_streams, "differential_collinear"),
    (no_factor, "differential_collinear"),
    (no_sigmoid, "differential_v2_collinear"),
]


@pytest.mark.parametrize(("broken", "name"), BREAKS, ids=lambda value: getattr(value, "__name__", value))
def test_the_oracle_notices(broken: Callable[[Patch], None], name: str) -> None:
    must_be_noticed(broken, name, "causal")

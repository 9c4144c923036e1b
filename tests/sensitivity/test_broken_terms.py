"""Break one term at a time: the comparison with the oracle must notice. A test that cannot fail proves nothing."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

import clearhead.engines.eager as eager
import clearhead.variants.learned_lambda as learned_lambda
from clearhead.core.attend import Mix
from clearhead.core.masks import MaskSpec
from clearhead.core.streams import split_heads
from clearhead.nn import ProjectedAttention
from clearhead.positions.base import PlaneRotation, Rotation
from clearhead.positions.scaling.default import DefaultScaling
from clearhead.variants.base import Variant
from clearhead.variants.differential import Differential
from clearhead.variants.differential_v2 import DifferentialV2
from tests.contracts.layer_cases import compare

Patch = pytest.MonkeyPatch


def mixed(patch: Patch, mix: Mix) -> None:
    for variant in (Differential, DifferentialV2):
        patch.setattr(variant, "mix", property(lambda self: mix))
        patch.setattr(variant, "mixing", "other")


def wrong_sign(patch: Patch) -> None:
    mixed(patch, lambda streams, gate: streams[0] + gate * streams[1])


def no_lambda(patch: Patch) -> None:
    mixed(patch, lambda streams, gate: streams[0] - (1 + 0 * gate) * streams[1])


def streams_swapped(patch: Patch) -> None:
    mixed(patch, lambda streams, gate: streams[1] - gate * streams[0])


def halves_paired(patch: Patch) -> None:
    """Heads i and i + H instead of 2i and 2i + 1: transformers' order in V1, the wrong one of V2's authors."""

    def halves(self: Variant, q: Tensor) -> tuple[Tensor, ...]:
        return split_heads(q, 2 * self.sizes.heads).chunk(2, dim=1)

    patch.setattr(Differential, "split_queries", halves)
    patch.setattr(DifferentialV2, "split_queries", halves)


def keys_halves_paired(patch: Patch) -> None:
    patch.setattr(
        Differential, "split_keys", lambda self, k: split_heads(k, 2 * self.sizes.kv_heads).chunk(2, dim=1)
    )


def one_key_for_both_streams(patch: Patch) -> None:
    patch.setattr(
        Differential, "split_keys", lambda self, k: (split_heads(k, 2 * self.sizes.kv_heads)[:, 0::2],) * 2
    )


def keys_swapped_between_streams(patch: Patch) -> None:
    original = Differential.split_keys
    patch.setattr(Differential, "split_keys", lambda self, k: original(self, k)[::-1])


def no_factor(patch: Patch) -> None:
    patch.setattr(Differential, "finish", lambda self, o: self.head_norm(o))


def learned_factor(patch: Patch) -> None:
    patch.setattr(Differential, "finish", lambda self, o: self.head_norm(o) * (1 - self.lambda_full()))


def no_head_norm(patch: Patch) -> None:
    patch.setattr(
        Differential, "finish", lambda self, o: (o + 0 * self.head_norm(o)) * (1 - self.lambda_init)
    )


def norm_over_all_heads(patch: Patch) -> None:
    def finish(self: Differential, o: Tensor) -> Tensor:
        assert self.head_norm is not None
        mean = o.square().mean(dim=(1, 3), keepdim=True)
        return o * torch.rsqrt(mean + self.head_norm.eps) * self.head_norm.weight * (1 - self.lambda_init)

    patch.setattr(Differential, "finish", finish)


def other_epsilon(patch: Patch) -> None:
    original = Differential.finish

    def finish(self: Differential, o: Tensor) -> Tensor:
        assert self.head_norm is not None
        self.head_norm.eps = 1e-6
        return original(self, o)

    patch.setattr(Differential, "finish", finish)


def layers_counted_from_one(patch: Patch) -> None:
    patch.setattr(
        learned_lambda,
        "depth_lambda_init",
        lambda layer: 0.8 - 0.6 * torch.exp(torch.tensor(-0.3 * (layer + 1))).item(),
    )


def lambda_of_products(patch: Patch) -> None:
    """λ without the exponentials."""

    def lambda_full(self: Differential) -> Tensor:
        return (
            (self.lambda_q1 * self.lambda_k1).sum()
            - (self.lambda_q2 * self.lambda_k2).sum()
            + self.lambda_init
        )

    patch.setattr(Differential, "lambda_full", lambda_full)


def detached_lambda(patch: Patch) -> None:
    """Right values, no gradient: only the comparison of gradients can notice."""
    original = Differential.lambda_full

    def lambda_full(self: Differential) -> Tensor:
        value = original(self)
        return value.detach() + 0.0 * (value - value.detach())

    patch.setattr(Differential, "lambda_full", lambda_full)


def no_sigmoid(patch: Patch) -> None:
    patch.setattr(DifferentialV2, "gate", lambda self, x: self.lambda_proj(x).transpose(1, 2)[..., None])


def gates_of_the_wrong_token(patch: Patch) -> None:
    original = DifferentialV2.gate
    patch.setattr(DifferentialV2, "gate", lambda self, x: original(self, x).roll(1, dims=2))


def scale_of_two_widths(patch: Patch) -> None:
    original = ProjectedAttention.combine

    def combine(self: ProjectedAttention, *arguments: object) -> object:
        self.scale = self.scale / 2**0.5
        return original(self, *arguments)  # type: ignore[arg-type]

    patch.setattr(ProjectedAttention, "combine", combine)


def mask_off_by_one(patch: Patch) -> None:
    original = MaskSpec.query_positions
    patch.setattr(MaskSpec, "query_positions", lambda self, *arguments: original(self, *arguments) + 1)


def top_left_mask(patch: Patch) -> None:
    """The first L positions instead of the last."""
    patch.setattr(
        MaskSpec, "query_positions", lambda self, queries, keys, device: torch.arange(queries, device=device)
    )


def window_wider_by(step: int) -> Callable[[Patch], None]:
    def apply(patch: Patch) -> None:
        original = MaskSpec.visible

        def visible(self: MaskSpec, *arguments: Any) -> Tensor:
            assert self.window is not None
            return original(replace(self, window=self.window + step), *arguments)

        patch.setattr(MaskSpec, "visible", visible)

    apply.__name__ = f"window_wider_by_{step}"
    return apply


def window_backwards_only(patch: Patch) -> None:
    """Everything ahead seen where the window has two sides."""
    original = MaskSpec.visible

    def visible(self: MaskSpec, queries: int, keys: int, device: torch.device) -> Tensor:
        ahead = torch.ones(queries, keys, dtype=torch.bool, device=device).triu(keys - queries + 1)
        everything = original(replace(self, window=None), queries, keys, device)
        return original(self, queries, keys, device) | (everything & ahead)

    patch.setattr(MaskSpec, "visible", visible)


def padding_lost(patch: Patch) -> None:
    original = MaskSpec.visible
    patch.setattr(
        MaskSpec, "visible", lambda self, *arguments: original(MaskSpec(is_causal=self.is_causal), *arguments)
    )


def groups_tiled(patch: Patch) -> None:
    """Head h on group h mod G instead of h // (H / G)."""
    patch.setattr(eager, "repeat_kv", lambda x, heads: x.repeat(1, heads // x.shape[1], 1, 1))


def keys_not_rotated(patch: Patch) -> None:
    patch.setattr(PlaneRotation, "key", lambda self, x: x)


def only_signal_rotated(patch: Patch) -> None:
    original = Variant.place

    def place(self: Variant, heads: object, rotation: Rotation) -> object:
        placed = original(self, heads, rotation)  # type: ignore[arg-type]
        return type(placed)((placed.q[0], *heads.q[1:]), placed.k, placed.v, placed.gate)  # type: ignore[attr-defined]

    patch.setattr(Variant, "place", place)


def values_rotated(patch: Patch) -> None:
    original = Variant.place

    def place(self: Variant, heads: object, rotation: Rotation) -> object:
        placed = original(self, heads, rotation)  # type: ignore[arg-type]
        return type(placed)(placed.q, placed.k, rotation.key(placed.v), placed.gate)

    patch.setattr(Variant, "place", place)


def rotated_backwards(patch: Patch) -> None:
    """The angle's sign on the query only, so that scores depend on m + n."""
    original = PlaneRotation.query

    def query(self: PlaneRotation, x: Tensor) -> Tensor:
        return original(PlaneRotation(self.query_cos, -self.query_sin, self.key_cos, self.key_sin), x)

    patch.setattr(PlaneRotation, "query", query)


def other_frequencies(patch: Patch) -> None:
    """θ_j = base^(−j/D) instead of base^(−2j/D)."""

    def tables(self: DefaultScaling, dtype: torch.dtype = torch.float32, device: object = None) -> Tensor:
        return self.theta ** (-torch.arange(self.head_dim // 2, dtype=dtype) / self.head_dim)[None]

    patch.setattr(DefaultScaling, "tables", tables)


def no_zeros_for_blind_rows(patch: Patch) -> None:
    """The mean of all values, which a finite "minus infinity" gives."""
    original = MaskSpec.materialise

    def materialise(self: MaskSpec, *arguments: object) -> Tensor:
        allowed = original(self, *arguments)  # type: ignore[arg-type]
        return allowed | ~allowed.any(-1, keepdim=True)

    patch.setattr(MaskSpec, "materialise", materialise)


BREAKS: list[tuple[Callable[[Patch], None], str, str]] = [
    (wrong_sign, "differential", "causal"),
    (wrong_sign, "differential_v2", "causal"),
    (no_lambda, "differential", "causal"),
    (no_lambda, "differential_v2", "causal"),
    (streams_swapped, "differential", "causal"),
    (streams_swapped, "differential_v2", "causal"),
    (halves_paired, "differential", "causal"),
    (halves_paired, "differential_v2", "causal"),
    (keys_halves_paired, "differential", "causal"),
    (one_key_for_both_streams, "differential", "causal"),
    (keys_swapped_between_streams, "differential", "causal"),
    (no_factor, "differential", "causal"),
    (learned_factor, "differential", "causal"),
    (no_head_norm, "differential", "causal"),
    (norm_over_all_heads, "differential", "causal"),
    (other_epsilon, "differential", "causal"),
    (layers_counted_from_one, "differential", "causal"),
    (lambda_of_products, "differential", "causal"),
    (detached_lambda, "differential", "causal"),
    (no_sigmoid, "differential_v2", "causal"),
    (gates_of_the_wrong_token, "differential_v2", "causal"),
    *(
        (scale_of_two_widths, name, "causal")
        for name in ("softmax", "differential", "differential_v2", "collinear")
    ),
    *(
        (mask_off_by_one, name, "cross_causal")
        for name in ("softmax", "differential", "differential_v2", "collinear")
    ),
    (top_left_mask, "differential", "cross_causal"),
    *(
        (window_wider_by(step), name, call)
        for step in (-1, 1)
        for name, call in (
            ("softmax", "window"),
            ("differential", "window_both_ways"),
            ("collinear", "cross_window"),
        )
    ),
    (window_backwards_only, "softmax", "cross_window"),
    (padding_lost, "differential", "padding"),
    (padding_lost, "differential", "documents"),
    (padding_lost, "collinear", "mask"),
    (no_zeros_for_blind_rows, "softmax", "mask"),
    (no_zeros_for_blind_rows, "differential", "padding"),
    (groups_tiled, "softmax", "causal"),
    (groups_tiled, "differential", "causal"),
    (groups_tiled, "differential_v2", "causal"),
    (groups_tiled, "collinear", "causal"),
    (keys_not_rotated, "differential", "causal"),
    (only_signal_rotated, "differential", "causal"),
    (only_signal_rotated, "differential_v2", "causal"),
    (values_rotated, "softmax", "causal"),
    (rotated_backwards, "softmax", "causal"),
    (rotated_backwards, "collinear", "causal"),
    (other_frequencies, "softmax", "causal"),
]


def must_be_noticed(broken: Callable[[Patch], None], name: str, call: str) -> None:
    compare(name, "gqa", call, "eager")
    with pytest.MonkeyPatch.context() as patch:
        broken(patch)
        with pytest.raises(AssertionError, match="off its oracle"):
            compare(name, "gqa", call, "eager")


@pytest.mark.parametrize(
    ("broken", "name", "call"), BREAKS, ids=lambda value: getattr(value, "__name__", value)
)
def test_the_oracle_notices(broken: Callable[[Patch], None], name: str, call: str) -> None:
    must_be_noticed(broken, name, call)

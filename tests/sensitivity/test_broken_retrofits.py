"""Break one term of what goes into models that exist: the comparison with the oracle must notice."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from clearhead.variants.dex import DexFactor, DexSubtraction
from clearhead.variants.diff_lora import DiffLora
from clearhead.variants.differential import Differential
from clearhead.variants.differential_v2 import DifferentialV2
from clearhead.variants.schedule import TrainingProgress
from tests.sensitivity.test_broken_terms import Patch, keys_swapped_between_streams, must_be_noticed


def schedule_forgotten(patch: Patch) -> None:
    patch.setattr(TrainingProgress, "forward", lambda self: torch.ones_like(self.progress))


def schedule_squared(patch: Patch) -> None:
    original = TrainingProgress.forward
    patch.setattr(TrainingProgress, "forward", lambda self: original(self).square())


def bias_left_out(patch: Patch) -> None:
    def gate(self: DifferentialV2, x: Tensor) -> Tensor:
        raw = self.lambda_proj(x) - self.lambda_proj.bias + 0 * self.lambda_proj.bias
        return raw.sigmoid().transpose(1, 2)[..., None]

    patch.setattr(DifferentialV2, "gate", gate)


def norm_where_there_is_none(patch: Patch) -> None:
    patch.setattr(Differential, "finish", lambda self, o: o * (1 - self.lambda_init))


def dex_added(patch: Patch) -> None:
    original = DexSubtraction.forward
    patch.setattr(DexSubtraction, "forward", lambda self, o: 2 * o - original(self, o))


def dex_transposed(patch: Patch) -> None:
    def forward(self: DexSubtraction, o: Tensor) -> Tensor:
        chosen = torch.tensor(self.heads)
        return o.index_add(1, chosen, -self.factor() * (o.index_select(1, chosen) @ self.weight.T))

    patch.setattr(DexSubtraction, "forward", forward)


def dex_of_all_heads(patch: Patch) -> None:
    patch.setattr(DexSubtraction, "forward", lambda self, o: o - self.factor() * (o @ self.weight))


def hump_left_out(patch: Patch) -> None:
    patch.setattr(DexFactor, "forward", lambda self: self.schedule() * self.lambda_learn)


def learned_part_not_annealed(patch: Patch) -> None:
    original = DexFactor.forward
    patch.setattr(
        DexFactor,
        "forward",
        lambda self: original(self) + (1 - self.schedule()) * self.lambda_learn,
    )


def alpha_not_divided_by_rank(patch: Patch) -> None:
    original = DiffLora._streams

    def streams(self: DiffLora, *arguments: object) -> tuple[Tensor, ...]:
        self.scaling = 4.5
        return original(self, *arguments)  # type: ignore[arg-type]

    patch.setattr(DiffLora, "_streams", streams)


def second_stream_with_the_first_one_s_weights(patch: Patch) -> None:
    original = DiffLora._streams

    def streams(self: DiffLora, *arguments: object) -> tuple[Tensor, ...]:
        first, second = original(self, *arguments)  # type: ignore[arg-type]
        return first, first + second

    patch.setattr(DiffLora, "_streams", streams)


BREAKS: list[tuple[Callable[[Patch], None], str]] = [
    (schedule_forgotten, "differential_own"),
    (schedule_squared, "differential_own"),
    (keys_swapped_between_streams, "differential_own"),
    (norm_where_there_is_none, "differential_own"),
    (bias_left_out, "differential_v2_bias"),
    (schedule_forgotten, "dex"),
    (dex_added, "dex"),
    (dex_transposed, "dex"),
    (dex_of_all_heads, "dex"),
    (hump_left_out, "dex"),
    (learned_part_not_annealed, "dex"),
    (schedule_forgotten, "diff_lora"),
    (alpha_not_divided_by_rank, "diff_lora"),
    (second_stream_with_the_first_one_s_weights, "diff_lora"),
]


@pytest.mark.parametrize(("broken", "name"), BREAKS, ids=lambda value: getattr(value, "__name__", value))
def test_the_oracle_notices(broken: Callable[[Patch], None], name: str) -> None:
    must_be_noticed(broken, name, "padding")

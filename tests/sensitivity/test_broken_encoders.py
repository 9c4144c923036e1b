"""Break one thing of an encoder: the comparison with its oracle must notice."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from clearhead.core.masks import MaskSpec
from clearhead.models import (
    ClearheadEncoderConfig,
    ClearheadEncoderForSequenceClassification,
    encoder_heads,
    forward_inputs,
)
from clearhead.models.kinds import Present
from tests.contracts.encoder_cases import (
    make_encoder,
    oracle_head,
    oracle_logits,
    oracle_states,
    weights_of,
)
from tests.contracts.model_cases import tokens
from tests.contracts.support import distance

Patch = pytest.MonkeyPatch
PADDED = torch.tensor([[0, 0, 1, 1, 1, 1], [1, 1, 1, 1, 1, 0]])


def causal(patch: Patch, model: Any) -> None:
    patch.setattr(ClearheadEncoderConfig, "causal", True)


def wider_window(patch: Patch, model: Any) -> None:
    of = Present.of
    patch.setattr(Present, "of", lambda self, mask, past, window: of(self, mask, past, window + 1))


def one_sided_window(patch: Patch, model: Any) -> None:
    visible = MaskSpec.visible

    def broken(self: MaskSpec, queries: int, keys: int, device: torch.device) -> Tensor:
        seen = visible(self, queries, keys, device)
        return seen.tril() if self.window is not None else seen

    patch.setattr(MaskSpec, "visible", broken)


def no_embedding_norm(patch: Patch, model: Any) -> None:
    model.model.embed_norm.forward = lambda x: x


def no_padding(patch: Patch, model: Any) -> None:
    def unpadded(mask: Tensor, documents: Tensor | None, look: bool) -> tuple[bool, Tensor | None]:
        return False, documents

    patch.setattr(forward_inputs, "has_padding", unpadded)


def approximate_gelu(patch: Patch, model: Any) -> None:
    gelu = F.gelu
    patch.setattr(F, "gelu", lambda x: gelu(x, approximate="tanh"))


def no_bias(patch: Patch, model: Any) -> None:
    with torch.no_grad():
        model.lm_head.bias.add_(0.1)
    model.lm_head.forward = lambda x: F.linear(x, model.lm_head.weight)


BREAKS: list[Callable[[Patch, Any], None]] = [
    causal,
    wider_window,
    one_sided_window,
    no_embedding_norm,
    no_padding,
    approximate_gelu,
    no_bias,
]


@pytest.mark.parametrize("name", ["softmax", "differential_v2", "collinear_slack"])
@pytest.mark.parametrize("broken", BREAKS, ids=lambda broken: broken.__name__)
@torch.no_grad()
def test_the_oracle_notices(
    broken: Callable[[Patch, Any], None], name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, ids = make_encoder(name, dtype=torch.float64, layers=[{}, {"sliding_window": 2}]), tokens(2, 6)
    model.set_attn_implementation("eager")

    def apart() -> float:
        expected, _ = oracle_logits(name, "gqa", model, weights_of(model), ids, key_padding=PADDED.bool())
        found = model(ids, attention_mask=PADDED, position_ids=torch.arange(6)[None]).logits
        return distance(found * PADDED[..., None], expected * PADDED[..., None])

    assert apart() < 1e-10
    broken(monkeypatch, model)
    assert apart() > 1e-6


def padding_in_the_mean(patch: Patch) -> None:
    original = encoder_heads.pool
    patch.setattr(encoder_heads, "pool", lambda states, mask, *rest: original(states, None, *rest))


@torch.no_grad()
def test_the_mean_over_real_tokens_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    model = make_encoder("softmax", dtype=torch.float64, head=ClearheadEncoderForSequenceClassification)
    ids = tokens(2, 6)

    def apart() -> float:
        weights = weights_of(model)
        states, _ = oracle_states("softmax", "gqa", model, weights, ids[1:, :5])
        read = oracle_head(model, weights, states.mean(1))
        expected = torch.einsum("bi,oi->bo", read, weights["classifier.weight"]) + weights["classifier.bias"]
        return distance(model(ids, attention_mask=PADDED).logits[1:], expected)

    assert apart() < 1e-10
    padding_in_the_mean(monkeypatch)
    assert apart() > 1e-6

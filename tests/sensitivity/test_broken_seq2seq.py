"""Break one thing between an encoder and a decoder: the comparison with the oracle must notice."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from clearhead.models import cross_decoder
from tests.contracts.encoder_cases import weights_of
from tests.contracts.model_cases import tokens
from tests.contracts.seq2seq_cases import PAD, START, make_seq2seq, seq2seq_oracle
from tests.contracts.support import distance

Patch = pytest.MonkeyPatch
MASK = torch.tensor([[0, 0, 1, 1, 1, 1], [1, 1, 1, 1, 1, 0]])


def no_padding(patch: Patch, model: Any) -> None:
    patch.setattr(cross_decoder, "has_padding", lambda mask, documents: (False, documents))


def places_of_padding_counted(patch: Patch, model: Any) -> None:
    method = model.get_decoder().cross_position.rotation
    slots = torch.arange(6)[None]
    patch.setattr(
        model.get_decoder().cross_position,
        "rotation",
        lambda here, _, length=None: method(here, slots, length),
    )


def keys_at_the_queries_places(patch: Patch, model: Any) -> None:
    method = model.get_decoder().cross_position.rotation
    patch.setattr(
        model.get_decoder().cross_position,
        "rotation",
        lambda here, there, length=None: method(here, there.clamp(max=here.shape[1] - 1), length),
    )


def unnormed_source(patch: Patch, model: Any) -> None:
    model.get_encoder().norm.forward = lambda x: x


def lambda_of_the_source(patch: Patch, model: Any) -> None:
    """V2's λ(x) of the source's first tokens, which have the decoder's width here."""
    for layer in model.get_decoder().layers:
        variant, attention = layer.cross_attn.variant, layer.cross_attn
        project, gate = attention.project, variant.gate

        def broken(
            x: Tensor,
            context: Tensor,
            *rest: Any,
            project: Any = project,
            variant: Any = variant,
            gate: Any = gate,
            **options: Any,
        ) -> Any:
            patch.setattr(variant, "gate", lambda _: gate(context[:, : x.shape[1]]))
            return project(x, context, *rest, **options)

        patch.setattr(attention, "project", broken)


def first_layer_s_norm(patch: Patch, model: Any) -> None:
    """Cross-attention that reads what self-attention read."""
    for layer in model.get_decoder().layers:
        layer.cross_attention_layernorm = layer.input_layernorm


def causal(patch: Patch, model: Any) -> None:
    whole = cross_decoder.MaskSpec
    patch.setattr(cross_decoder, "MaskSpec", lambda **parts: whole(is_causal=True, offset=0, **parts))


BREAKS = [
    (no_padding, "differential", "nope"),
    (places_of_padding_counted, "collinear_slack", "rope"),
    (keys_at_the_queries_places, "collinear", "rope"),
    (unnormed_source, "differential", "nope"),
    (lambda_of_the_source, "differential_v2", "nope"),
    (first_layer_s_norm, "softmax", "nope"),
    (causal, "softmax", "nope"),
]


def error(name: str, cross_position: str, broken: Callable[..., None] | None) -> float:
    """How far the logits are from the oracle's, with something broken or nothing."""
    patch = Patch()
    model = make_seq2seq(
        name, dtype=torch.float64, cross_position=cross_position, encoder={"hidden_size": 24}
    )
    source, target = tokens(2, 6).masked_fill(MASK == 0, PAD), tokens(2, 4)
    real = MASK.bool()
    expected = seq2seq_oracle(
        name, "gqa", weights_of(model), source, target, cross_position=cross_position, source_real=real
    )[0]
    try:
        if broken is not None:
            broken(patch, model)
        with torch.no_grad():
            return distance(model(source, attention_mask=MASK, decoder_input_ids=target).logits, expected)
    finally:
        patch.undo()


@pytest.mark.parametrize(("broken", "name", "cross_position"), BREAKS, ids=[b[0].__name__ for b in BREAKS])
def test_the_oracle_notices(broken: Callable[..., None], name: str, cross_position: str) -> None:
    assert error(name, cross_position, None) < 1e-10
    assert error(name, cross_position, broken) > 1e-6


@torch.no_grad()
def test_a_cache_that_forgets_the_source_is_noticed() -> None:
    """Of the source's keys and values, kept from the first step on, the last are lost: other logits than uncached."""
    model = make_seq2seq("differential", dtype=torch.float64)
    source, row = tokens(2, 6), torch.full((2, 1), START)
    step = model(source, decoder_input_ids=row)
    whole = model(source, decoder_input_ids=row.expand(-1, 2), use_cache=False).logits[:, 1]
    store = step.past_key_values
    assert distance(model(source, decoder_input_ids=row, past_key_values=store).logits[:, 0], whole) < 1e-10
    for layer in store.cross_attention_cache.layers:
        layer.values[:, :, -1] = 0.0
    assert distance(model(source, decoder_input_ids=row, past_key_values=store).logits[:, 0], whole) > 1e-6

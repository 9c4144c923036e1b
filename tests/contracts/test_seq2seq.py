"""Encoder-decoders against the oracle, and everything a Hugging Face encoder-decoder is expected to do."""

from typing import Any

import pytest
import torch
from torch import Tensor

from tests.contracts.model_cases import LAYERS, LAYOUTS, VARIANTS, VOCABULARY, tokens
from tests.contracts.seq2seq_cases import (
    CASES,
    PAD,
    START,
    make_seq2seq,
    seq2seq_oracle,
    weights_of,
)
from tests.contracts.support import distance
from tests.oracles.seq2seq import loss, shifted

every_case = pytest.mark.parametrize(("name", "cross_position"), CASES)
every_variant = pytest.mark.parametrize("name", VARIANTS)
every_layout = pytest.mark.parametrize("layout", LAYOUTS)


def padded_source() -> tuple[Tensor, Tensor]:
    """Three sources of 6, 4 and 3 tokens: whole, padded on the left, and on both sides."""
    rows, mask = tokens(3, 6, seed=5), torch.ones(3, 6, dtype=torch.long)
    mask[1, :2] = 0
    mask[2, :1] = 0
    mask[2, 4:] = 0
    return rows.masked_fill(mask == 0, PAD), mask


@every_layout
@every_case
def test_logits_maps_and_gradients_are_the_oracle_s(name: str, cross_position: str, layout: str) -> None:
    model = make_seq2seq(name, layout, torch.float64, cross_position=cross_position)
    (source, mask), target = padded_source(), tokens(3, 5)
    weights = weights_of(model)
    logits, *maps = seq2seq_oracle(
        name, layout, weights, source, target, cross_position=cross_position, source_real=mask.bool()
    )
    found = model(source, attention_mask=mask, decoder_input_ids=target)
    assert distance(found.logits, logits) < 1e-10
    with_maps = model(source, attention_mask=mask, decoder_input_ids=target, output_attentions=True)
    assert distance(with_maps.logits, logits) < 1e-10
    rows = mask.bool()[:, None, :, None]
    for ours, theirs in zip(
        (with_maps.encoder_attentions, with_maps.decoder_attentions, with_maps.cross_attentions), maps, strict=True
    ):
        assert len(ours) == LAYERS
        for index, (a, b) in enumerate(zip(ours, theirs, strict=True)):
            seen = rows if a.shape[2] == 6 else torch.ones(())
            assert distance(a * seen, b * seen) < 1e-10, index
    # What a padded token of the source would have said is nobody's.
    pull = torch.randn(logits.shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    (logits * pull).sum().backward()
    (found.logits * pull).sum().backward()
    for key, parameter in model.named_parameters():
        expected = weights[key].grad
        assert expected is not None and parameter.grad is not None, key
        scale = max(float(expected.abs().max()), 1.0)
        assert distance(parameter.grad, expected) < 1e-10 * scale, key

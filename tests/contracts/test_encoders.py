"""Encoders against the float64 oracle: every variant on every position that an encoder may have."""

from typing import Any

import pytest
import torch
from torch import Tensor

from clearhead import registry
from clearhead.models import ClearheadForMaskedLM
from clearhead.registry import resolve
from tests.contracts.encoder_cases import make_encoder, oracle_logits, weights_of
from tests.contracts.model_cases import LAYERS, LAYOUTS, VARIANTS, tokens
from tests.contracts.position_cases import SCALINGS, TRAINED, turning_of
from tests.contracts.support import distance

every_variant = pytest.mark.parametrize("name", VARIANTS)
every_layout = pytest.mark.parametrize("layout", LAYOUTS)
# Configurations of positions and windows, by a name.
PLACES: dict[str, dict[str, Any]] = {
    "rope": {"position": "rope"},
    "alibi": {"position": "alibi"},
    "rope and nope": {"layer_positions": ["rope", "nope"]},
    "alibi and rope": {"layer_positions": ["alibi", "rope"]},
    "window": {"sliding_window": 3},
    "window and all": {"layers": [{}, {"sliding_window": 2}]},
    "alibi, window": {"position": "alibi", "sliding_window": 3},
}
CASES = [
    (name, place)
    for name in VARIANTS
    for place, settings in PLACES.items()
    if "collinear" not in name
    or all(kind in ("rope",) for kind in settings.get("layer_positions", [settings.get("position", "rope")]))
]
every_case = pytest.mark.parametrize(("name", "place"), CASES)


def test_no_position_of_the_registry_is_left_out() -> None:
    causal_only = {name for name in registry.POSITIONS if resolve("positions", name).causal_only}
    tried = {"rope", "alibi", "nope"}
    assert tried | causal_only == set(registry.POSITIONS) and not tried & causal_only


def value_and_gradients(
    model: ClearheadForMaskedLM, ids: Tensor, cotangent: Tensor, **arguments: Any
) -> dict[str, Tensor]:
    out = model(ids, **arguments).logits
    named = dict(model.named_parameters())
    gradients = torch.autograd.grad((out * cotangent).sum(), list(named.values()))
    return {"logits": out, **dict(zip(named, gradients, strict=True))}


def expected_of(
    name: str, layout: str, model: ClearheadForMaskedLM, ids: Tensor, cotangent: Tensor, **arguments: Any
) -> dict[str, Tensor]:
    weights = weights_of(model)
    out, _ = oracle_logits(name, layout, model, weights, ids, **arguments)
    named = {key: value for key, value in weights.items() if value.requires_grad}
    gradients = torch.autograd.grad((out * cotangent).sum(), list(named.values()))
    return {"logits": out, **dict(zip(named, gradients, strict=True))}


def furthest(found: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    """The largest difference; gradients by the size of the largest number among them."""
    assert found.keys() == expected.keys()
    return max(
        distance(found[key], expected[key]) / max(1.0, float(expected[key].detach().abs().max()))
        for key in found
    )


def cotangent_of(ids: Tensor, model: ClearheadForMaskedLM) -> Tensor:
    rng = torch.Generator().manual_seed(5)
    return torch.randn(*ids.shape, model.config.vocab_size, generator=rng, dtype=torch.float64)


@every_layout
@every_case
def test_logits_and_gradients_are_the_oracle_s(name: str, place: str, layout: str) -> None:
    model, ids = make_encoder(name, layout, torch.float64, **PLACES[place]), tokens(2, 6)
    cotangent = cotangent_of(ids, model)
    expected = expected_of(name, layout, model, ids, cotangent)
    assert furthest(value_and_gradients(model, ids, cotangent), expected) < 1e-10
    if layout == "gqa":
        model.set_attn_implementation("sdpa")
        assert furthest(value_and_gradients(model, ids, cotangent), expected) < 1e-10


@every_case
def test_effective_maps_are_the_oracle_s(name: str, place: str) -> None:
    model, ids = make_encoder(name, dtype=torch.float64, **PLACES[place]), tokens(2, 6)
    expected, maps = oracle_logits(name, "gqa", model, weights_of(model), ids)
    found = model(ids, output_attentions=True)
    assert distance(found.logits, expected) < 1e-10
    assert len(found.attentions) == LAYERS
    assert max(distance(a, b) for a, b in zip(found.attentions, maps, strict=True)) < 1e-10
    assert any(bool(m.triu(1).abs().max() > 1e-6) for m in maps), "tokens see those behind them"


@every_case
def test_padding_on_either_side_and_packed_rows(name: str, place: str) -> None:
    """Against rows alone, values and gradients: padded left and right in one batch, and packed without padding."""
    model = make_encoder(name, dtype=torch.float64, **PLACES[place])
    rows = [tokens(1, length, seed=length) for length in (4, 1, 3)]
    cotangents = [cotangent_of(row, model) for row in rows]
    parts = [expected_of(name, "gqa", model, *pair) for pair in zip(rows, cotangents, strict=True)]
    expected = {key: sum(part[key] for part in parts) for key in parts[0] if key != "logits"}
    logits = [part["logits"][0] for part in parts]

    shifts, width = (1, 4, 0), 6
    ids = torch.zeros(3, width, dtype=torch.long)
    mask, cotangent = torch.zeros_like(ids), torch.zeros(3, width, model.config.vocab_size).double()
    for index, (row, shift) in enumerate(zip(rows, shifts, strict=True)):
        here = slice(shift, shift + row.shape[1])
        ids[index, here], mask[index, here], cotangent[index, here] = row[0], 1, cotangents[index][0]
    # The padding's own embedding has no gradient here, as the cotangent of padding is zero.
    found = value_and_gradients(model, ids, cotangent, attention_mask=mask)
    for index, (row, shift) in enumerate(zip(logits, shifts, strict=True)):
        assert distance(found["logits"][index, shift : shift + len(row)], row) < 1e-10
    assert furthest({key: found[key] for key in expected}, expected) < 1e-10

    packed, positions = torch.cat(rows, 1), torch.cat([torch.arange(row.shape[1]) for row in rows])[None]
    found = value_and_gradients(model, packed, torch.cat(cotangents, 1), position_ids=positions)
    assert distance(found["logits"][0], torch.cat(logits)) < 1e-10
    assert furthest({key: found[key] for key in expected}, expected) < 1e-10


@pytest.mark.parametrize("scaling", SCALINGS)
@every_variant
def test_logits_past_the_trained_length_are_the_oracle_s(name: str, scaling: str) -> None:
    """Of two texts in one row, which scalings that look at the length turn by their own."""
    settings = {"rope_parameters": dict(SCALINGS[scaling]), "max_position_embeddings": TRAINED}
    model = make_encoder(name, dtype=torch.float64, **settings)
    rows = [tokens(1, length, seed=length) for length in (11, 4)]
    weights = weights_of(model)
    expected = [
        oracle_logits(name, "gqa", model, weights, row, base=turning_of(scaling, row.shape[1]))[0]
        for row in rows
    ]
    positions = torch.cat([torch.arange(row.shape[1]) for row in rows])[None]
    with torch.no_grad():
        found = model(torch.cat(rows, 1), position_ids=positions).logits
    assert distance(found, torch.cat(expected, 1)) < 1e-10


@every_variant
def test_packed_rows_in_a_batch_and_by_flash_attention_s_keywords(name: str) -> None:
    model = make_encoder(name, dtype=torch.float64)
    ids, positions = tokens(2, 7), torch.tensor([[0, 1, 2, 0, 1, 2, 3], [0, 1, 2, 3, 4, 0, 1]])
    weights = weights_of(model)
    documents = torch.tensor([[1, 1, 1, 2, 2, 2, 2], [1, 1, 1, 1, 1, 2, 2]])
    expected, _ = oracle_logits(name, "gqa", model, weights, ids, documents=documents, positions=positions)
    assert distance(model(ids, position_ids=positions).logits, expected) < 1e-10
    assert (
        distance(model(ids, position_ids=positions, attention_mask=torch.ones_like(ids)).logits, expected)
        < 1e-10
    )
    bounds = torch.tensor([0, 3, 7], dtype=torch.int32)
    found = model(ids[:1], cu_seq_lens_q=bounds, cu_seq_lens_k=bounds).logits
    assert distance(found, expected[:1]) < 1e-10
    found = model(ids, seq_idx=documents.int()).logits
    assert distance(found, expected) < 1e-10


@pytest.mark.parametrize("form", ["bool", "added"])
@every_variant
def test_a_mask_of_four_dimensions_says_everything(name: str, form: str) -> None:
    model, ids = make_encoder(name, dtype=torch.float64), tokens(2, 6)
    rng = torch.Generator().manual_seed(1)
    seen = torch.rand(2, 6, 6, generator=rng) < 0.6
    seen |= torch.eye(6, dtype=torch.bool)
    expected, _ = oracle_logits(name, "gqa", model, weights_of(model), ids, allowed=seen)
    mask = seen[:, None]
    if form == "added":
        mask = torch.zeros(mask.shape, dtype=torch.float64).masked_fill(~mask, float("-inf"))
    assert distance(model(ids, attention_mask=mask).logits, expected) < 1e-10


@every_variant
def test_the_four_cases_of_distance(name: str) -> None:
    """Exact and strict collinear attention cannot tell before from behind: logits are even in the distance.

    So reversed rows give reversed outputs, as under ALiBi's |m − n|; RoPE, and slack, do tell. A layer that does is
    enough.
    """
    even = "collinear" in name and not name.endswith("slack")
    ids = tokens(2, 6)

    def moved(**changes: Any) -> float:
        model = make_encoder(name, dtype=torch.float64, **changes)
        return distance(model(ids.flip(1)).logits.flip(1), model(ids).logits)

    assert moved() < 1e-10 if even else moved() > 1e-2
    if even:
        assert moved(layers=[{}, {"attention": "softmax"}]) > 1e-2
    elif "collinear" not in name:
        assert moved(position="alibi") < 1e-10


@every_variant
def test_shift_invariance(name: str) -> None:
    model, ids = make_encoder(name, dtype=torch.float64), tokens(2, 6)
    here = torch.arange(6)[None]
    near, far = (model(ids, position_ids=p).logits for p in (here, here + 1000))
    assert distance(near, far) > 1e-2 if name.endswith("slack") else distance(near, far) < 1e-9

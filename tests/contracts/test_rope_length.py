"""One length for a whole request: caches, batches, packed rows and earlier inputs never change a result."""

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache, LlamaConfig, StaticCache

from clearhead.models import ClearheadForCausalLM
from clearhead.nn import Attention
from tests.contracts.model_cases import VARIANTS, left_padded, tokens
from tests.contracts.position_cases import (
    BY_LENGTH,
    SCALINGS,
    TRAINED,
    expected_logits,
    scaled_model,
)
from tests.contracts.support import distance, rand

NEW = 6
every_variant = pytest.mark.parametrize("name", VARIANTS)
every_scaling = pytest.mark.parametrize("scaling", SCALINGS)
by_length = pytest.mark.parametrize("scaling", BY_LENGTH)
both_caches = pytest.mark.parametrize("cache", ["dynamic", "static"])


def make_cache(kind: str, model: ClearheadForCausalLM, length: int) -> Any:
    return StaticCache(config=model.config, max_cache_len=length) if kind == "static" else DynamicCache()


@both_caches
@every_scaling
@every_variant
@torch.no_grad()
def test_cached_decoding_past_the_trained_length_is_the_full_forward(
    name: str, scaling: str, cache: str
) -> None:
    """From inside the trained length to past it, by chunks and by tokens, at one length."""
    for dtype, bound in ((torch.float64, 1e-10), (torch.float32, 1e-4)):
        model, ids = scaled_model(name, scaling, dtype), tokens(2, 15)
        full = model(ids, rope_length=20, use_cache=False).logits
        store = make_cache(cache, model, 17)
        parts = [
            model(part, past_key_values=store, rope_length=20).logits
            for part in ids.split([5, 1, 4, 1, 1, 3], dim=1)
        ]
        assert distance(torch.cat(parts, 1), full) < bound


@by_length
@every_variant
def test_rope_length_is_the_oracle_s(name: str, scaling: str) -> None:
    """One length for all rows, and one for each."""
    model, ids = scaled_model(name, scaling, torch.float64), tokens(2, 7)
    for lengths in (7, 30, torch.tensor([30, 8]), torch.tensor(11)):
        found = model(ids, rope_length=lengths).logits
        each = [lengths] * 2 if isinstance(lengths, int) else lengths.expand(2).tolist()
        for row in range(2):
            expected = expected_logits(name, scaling, model, ids[row], each[row])
            assert distance(found[row], expected) < 1e-10


@by_length
@every_variant
def test_a_row_does_not_notice_its_neighbours(name: str, scaling: str) -> None:
    """Rows shorter and longer than the trained length, padded on either side, or packed into one."""
    model = scaled_model(name, scaling, torch.float64)
    rows = [tokens(1, length, seed=length)[0] for length in (3, 13, 9)]
    expected = [expected_logits(name, scaling, model, row) for row in rows]
    ids, mask = left_padded(rows)
    found = model(ids, attention_mask=mask).logits
    for index, row in enumerate(rows):
        assert distance(found[index, -len(row) :], expected[index]) < 1e-10
    turned = (ids.flip(1), mask.flip(1))
    for index, row in enumerate(rows):
        turned[0][index, : len(row)] = row
    # Padding has positions too, and long ones; they are not the request's.
    where = torch.arange(13).expand(3, -1)
    for positions in (None, where):
        found = model(turned[0], attention_mask=turned[1], position_ids=positions).logits
        for index, row in enumerate(rows):
            assert distance(found[index, : len(row)], expected[index]) < 1e-10
    positions = torch.cat([torch.arange(len(row)) for row in rows])[None]
    found = model(torch.cat(rows)[None], position_ids=positions).logits[0]
    assert distance(found, torch.cat(expected)) < 1e-10


@by_length
def test_a_long_input_leaves_no_trace(scaling: str) -> None:
    model, short, long = scaled_model("softmax", scaling), tokens(1, TRAINED), tokens(1, 40)
    before = model(short).logits
    first = model(long).logits
    assert torch.equal(model(short).logits, before)
    assert torch.equal(model(long).logits, first)
    model.generate(long, max_new_tokens=4, do_sample=False, pad_token_id=0)
    assert torch.equal(model(short).logits, before)


@torch.no_grad()
def greedy_by_hand(model: ClearheadForCausalLM, row: Tensor) -> tuple[Tensor, Tensor]:
    """One full forward pass a token, each at the length that the request will have in the end."""
    found, length = [], len(row) + NEW
    for _ in range(NEW):
        logits = model(row[None], use_cache=False, rope_length=length).logits[0, -1]
        found.append(logits)
        row = torch.cat((row, logits.argmax()[None]))
    return row[-NEW:], torch.stack(found)


@pytest.mark.parametrize("cache", ["dynamic", "static", None])
@by_length
@every_variant
def test_generate_freezes_the_prompt_and_all_new_tokens(name: str, scaling: str, cache: str | None) -> None:
    """In one batch: rows that end at the trained length, cross it with their last token, and begin past it."""
    model = scaled_model(name, scaling)
    rows = [tokens(1, length, seed=length)[0] for length in (2, 3, 12)]
    ids, mask = left_padded(rows)
    chosen: dict[str, Any] = {"use_cache": False} if cache is None else {"cache_implementation": cache}
    for ending in ({"max_new_tokens": NEW}, {"max_length": 12 + NEW}):
        out = model.generate(
            ids,
            attention_mask=mask,
            do_sample=False,
            output_logits=True,
            return_dict_in_generate=True,
            **ending,
            **chosen,
        )
        logits = torch.stack(out.logits, dim=1)
        for index, row in enumerate(rows):
            expected_tokens, expected_logits = greedy_by_hand(model, row)
            assert torch.equal(out.sequences[index, -NEW:], expected_tokens)
            assert distance(logits[index], expected_logits) < 1e-4


@both_caches
@by_length
def test_beams_and_embeddings_are_frozen_alike(scaling: str, cache: str) -> None:
    model, ids = scaled_model("differential", scaling), tokens(2, 10)
    arguments: dict[str, Any] = {"max_new_tokens": NEW, "num_beams": 3, "do_sample": False, "pad_token_id": 0}
    plain = model.generate(ids, use_cache=False, **arguments)
    assert torch.equal(model.generate(ids, cache_implementation=cache, **arguments), plain)
    embedded = model.generate(
        inputs_embeds=model.get_input_embeddings()(ids), cache_implementation=cache, **arguments
    )
    assert torch.equal(embedded, plain[:, 10:])


def test_generate_takes_a_length_and_chunks() -> None:
    model, ids = scaled_model("softmax", "dynamic"), tokens(1, 12)
    arguments: dict[str, Any] = {"max_new_tokens": NEW, "do_sample": False, "output_logits": True}
    arguments |= {"return_dict_in_generate": True, "pad_token_id": 0}
    plain = torch.stack(model.generate(ids, **arguments).logits)
    chunked = torch.stack(model.generate(ids, prefill_chunk_size=5, **arguments).logits)
    assert distance(chunked, plain) < 1e-4
    longer = model.generate(ids, rope_length=40, **arguments).logits
    assert distance(torch.stack(longer), plain) > 1e-3
    assert distance(longer[0], model(ids, rope_length=40).logits[:, -1]) < 1e-5


def test_a_cache_without_a_length_is_refused_where_it_matters() -> None:
    model, ids = scaled_model("softmax", "dynamic"), tokens(1, 12)
    store = DynamicCache()
    parts = [model(part, past_key_values=store).logits for part in ids[:, :TRAINED].split(4, dim=1)]
    assert distance(torch.cat(parts, 1), model(ids[:, :TRAINED]).logits) < 1e-5
    with pytest.raises(ValueError, match="rope_length is missing: the cache may hold 9 tokens"):
        model(ids[:, TRAINED : TRAINED + 1], past_key_values=store)
    within, beyond = (make_cache("static", model, length) for length in (TRAINED, TRAINED + 1))
    for part in ids[:, :TRAINED].split(4, dim=1):
        model(part, past_key_values=within)
    model(ids[:, :4], past_key_values=beyond)
    with pytest.raises(ValueError, match="rope_length is missing: the cache may hold 9 tokens"):
        model(ids[:, 4:5], past_key_values=beyond)
    with pytest.raises(ValueError, match="rope_length is missing"):
        model.generate(ids, past_key_values=store, max_new_tokens=3)
    # A scaling that does not depend on the length never asks.
    static, store = scaled_model("softmax", "yarn"), DynamicCache()
    static(ids[:, :10], past_key_values=store)
    static(ids[:, 10:], past_key_values=store, rope_length=3)


def test_a_prefix_that_was_cached_with_the_length_goes_on() -> None:
    model, ids = scaled_model("collinear", "dynamic"), tokens(1, 12)
    store = DynamicCache()
    with torch.no_grad():
        model(ids[:, :7], past_key_values=store, rope_length=12 + NEW)
    arguments: dict[str, Any] = {"max_new_tokens": NEW, "do_sample": False, "pad_token_id": 0}
    ones = torch.ones_like(ids)
    found = model.generate(ids, attention_mask=ones, past_key_values=store, rope_length=12 + NEW, **arguments)
    assert torch.equal(found, model.generate(ids, **arguments))


@pytest.mark.parametrize(
    ("message", "length"),
    [
        ("rope_length must be at least 1, not 0", 0),
        ("rope_length must be at least 1, not True", True),
        ("rope_length must hold integers", torch.tensor([9.0, 9.0])),
        ("rope_length has shape (2, 7)", torch.ones(2, 7).long()),
        ("rope_length has shape (3,); expected one length for each row, (2,)", torch.tensor([9, 9, 9])),
    ],
)
def test_what_is_no_length_is_an_error(message: str, length: Any) -> None:
    model = scaled_model("softmax", "dynamic")
    with pytest.raises(ValueError) as caught:
        model(tokens(2, 7), rope_length=length)
    assert message in str(caught.value)


@by_length
@torch.no_grad()
def test_compiles_as_one_graph_with_and_without_a_length(scaling: str) -> None:
    torch._dynamo.reset()
    model, ids = scaled_model("collinear", scaling, num_hidden_layers=1), tokens(2, 12)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    packed = {"position_ids": torch.tensor([[*range(9), *range(3)]] * 2), "use_cache": False}
    ways: tuple[dict[str, Any], ...] = ({}, {"rope_length": torch.tensor([12, 30])}, packed)
    for way in ways:
        assert distance(compiled(input_ids=ids, **way).logits, model(ids, **way).logits) < 1e-5


@torch.no_grad()
def test_a_compiled_decode_step_past_the_trained_length_is_one_graph() -> None:
    torch._dynamo.reset()
    model, ids = scaled_model("differential", "dynamic", num_hidden_layers=1), tokens(2, 12)
    length = torch.tensor([12, 20])
    expected = model(ids, use_cache=False, rope_length=length).logits
    store = make_cache("static", model, 14)
    model(ids[:, :6], past_key_values=store, rope_length=length)
    step = torch.compile(model, fullgraph=True, backend="aot_eager")
    for index in range(6, 12):
        with torch._dynamo.config.patch(error_on_recompile=index > 7):
            found = step(input_ids=ids[:, index : index + 1], past_key_values=store, rope_length=length)
        assert distance(found.logits[:, 0], expected[:, index]) < 1e-5


def layer_of(scaling: str) -> Attention:
    torch.manual_seed(0)
    return Attention(16, 4, rope_parameters=SCALINGS[scaling], max_positions=TRAINED).double()


@by_length
@torch.no_grad()
def test_layers_know_the_length_of_rows_documents_and_contexts(scaling: str) -> None:
    layer, x, other = layer_of(scaling), rand(1, 12, 16, seed=1), rand(1, 5, 16, seed=2)
    alone, short = layer(x, is_causal=True), layer(other, is_causal=True)
    assert distance(layer(x, is_causal=True, rope_length=12), alone) == 0
    assert distance(layer(other, is_causal=True, rope_length=40), short) > 1e-4
    padded = torch.cat((other, rand(1, 7, 16, seed=3)), dim=1)
    real = torch.ones(2, 12, dtype=torch.bool)
    real[1, 5:] = False
    both = layer(torch.cat((x, padded)), is_causal=True, key_padding_mask=real)
    assert distance(both[:1], alone) < 1e-12
    assert distance(both[1:, :5], short) < 1e-12
    # Documents in any order and with any numbers.
    packed = {"documents": torch.tensor([[7] * 5 + [-2] * 12]), "is_causal": True}
    where = torch.cat((torch.arange(5), torch.arange(12)))[None]
    found = layer(torch.cat((other, x), dim=1), positions=where, **packed)
    assert distance(found, torch.cat((short, alone), dim=1)) < 1e-12
    # Of a query and its context the longer one counts.
    across = layer(other, x)
    assert distance(across, layer(other, x, rope_length=12)) == 0
    with pytest.raises(ValueError, match="with a context, documents do not say"):
        layer(x, x, documents=torch.zeros(1, 12).long())


@pytest.mark.parametrize("cache", ["dynamic", "static"])
@torch.no_grad()
def test_a_cached_layer_needs_the_length(cache: str) -> None:
    layer, x = layer_of("dynamic"), rand(1, 12, 16, seed=1)
    fixed = StaticCache(config=LlamaConfig(num_hidden_layers=1), max_cache_len=14)
    store: Any = fixed if cache == "static" else DynamicCache()
    parts = [layer(part, is_causal=True, cache=store, rope_length=12) for part in x.split(3, dim=1)]
    assert distance(torch.cat(parts, 1), layer(x, is_causal=True)) < 1e-12
    with pytest.raises(ValueError, match="rope_length is missing"):
        layer(x[:, :1], is_causal=True, cache=store)

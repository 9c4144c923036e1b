"""Decoding with a cache gives the tokens and logits of decoding without one, for every variant and head layout."""

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache, StaticCache

from clearhead.models import ClearheadForCausalLM
from tests.contracts.flash import stand_in
from tests.contracts.model_cases import LAYOUTS, VARIANTS, float32_rounding, left_padded, make_model, tokens
from tests.contracts.support import distance

NEW = 6
every_variant = pytest.mark.parametrize("name", VARIANTS)
every_layout = pytest.mark.parametrize("layout", LAYOUTS)
both_caches = pytest.mark.parametrize("cache", ["dynamic", "static"])


@torch.no_grad()
def greedy_by_hand(model: ClearheadForCausalLM, row: Tensor) -> tuple[Tensor, Tensor]:
    """New tokens and their logits from one full forward pass a token: no cache, no generate, no padding."""
    found = []
    for _ in range(NEW):
        logits = model(row[None], use_cache=False).logits[0, -1]
        found.append(logits)
        row = torch.cat((row, logits.argmax()[None]))
    return row[-NEW:], torch.stack(found)


def generate(model: ClearheadForCausalLM, ids: Tensor, **arguments: Any) -> Any:
    return model.generate(
        ids,
        max_new_tokens=NEW,
        output_logits=True,
        return_dict_in_generate=True,
        **({"do_sample": False} | arguments),
    )


@both_caches
@every_layout
@every_variant
def test_cached_greedy_decoding_of_a_left_padded_batch(name: str, layout: str, cache: str) -> None:
    model, wide = make_model(name, layout), make_model(name, layout).double()
    rows = [tokens(1, length, seed=length)[0] for length in (3, 8, 5)]
    ids, mask = left_padded(rows)
    out = generate(model, ids, attention_mask=mask, cache_implementation=cache)
    logits = torch.stack(out.logits, dim=1)
    for index, row in enumerate(rows):
        expected_tokens, _ = greedy_by_hand(model, row)
        assert torch.equal(out.sequences[index, -NEW:], expected_tokens)
        whole, new = torch.cat((row, expected_tokens))[None], slice(len(row) - 1, -1)
        with torch.no_grad():
            exact = wide(whole).logits[0, new]
        assert distance(logits[index], exact) < 3 * float(float32_rounding(wide, whole)[0, new].max())


def make_cache(kind: str, model: ClearheadForCausalLM, length: int) -> Any:
    return StaticCache(config=model.config, max_cache_len=length) if kind == "static" else DynamicCache()


@both_caches
@pytest.mark.parametrize("chunks", [(1,) * 8, (5, 1, 1, 1), (3, 4, 1), (2, 6)], ids=str)
@every_variant
@torch.no_grad()
def test_chunked_prefill_and_token_by_token(name: str, chunks: tuple[int, ...], cache: str) -> None:
    """In float64, where a difference is a mistake; with a mask that also covers what is not written yet."""
    _chunked_prefill(make_model(name, dtype=torch.float64), chunks, cache, 1e-10)


@both_caches
@torch.no_grad()
def test_chunked_prefill_in_float32(cache: str) -> None:
    """What kernels run, which may read a mask only after the cache has moved on."""
    _chunked_prefill(make_model("differential_v2"), (3, 4, 1), cache, 1e-5)


def _chunked_prefill(model: ClearheadForCausalLM, chunks: tuple[int, ...], cache: str, bound: float) -> None:
    ids = tokens(2, 8)
    expected = model(ids, use_cache=False).logits
    for padded in (False, True):
        store = make_cache(cache, model, 11)
        mask = torch.ones(2, 8, dtype=torch.long)
        if padded:
            mask[0, :3] = 0
            expected = model(ids, attention_mask=mask, use_cache=False).logits
        found, start = [], 0
        for size in chunks:
            end = start + size
            step = {"attention_mask": mask[:, :end]} if padded else {}
            found.append(model(ids[:, start:end], past_key_values=store, **step).logits)
            start = end
        real = mask[..., None]
        assert distance(torch.cat(found, 1) * real, expected * real) < bound


@pytest.mark.parametrize("name", ["differential", "collinear", "differential_v2_collinear"])
@torch.no_grad()
def test_a_compiled_decode_step_is_one_graph_for_all_steps(name: str) -> None:
    """With a cache of fixed size, as for serving: no graph break, and no compilation after the second step."""
    torch._dynamo.reset()
    model, ids = make_model(name, num_hidden_layers=1), tokens(2, 9)
    expected = model(ids, use_cache=False).logits
    store = make_cache("static", model, 12)
    model(ids[:, :4], past_key_values=store)
    step = torch.compile(model, fullgraph=True, backend="aot_eager")
    for index in range(4, 9):
        with torch._dynamo.config.patch(error_on_recompile=index > 5):
            found = step(input_ids=ids[:, index : index + 1], past_key_values=store).logits
        assert distance(found[:, 0], expected[:, index]) < 1e-5


@both_caches
@every_variant
def test_beam_search_is_the_uncached_one(name: str, cache: str) -> None:
    model, ids = make_model(name), tokens(2, 5)
    arguments = {"num_beams": 3, "num_return_sequences": 2, "output_scores": True}
    plain = generate(model, ids, use_cache=False, **arguments)
    cached = generate(model, ids, cache_implementation=cache, **arguments)
    assert torch.equal(cached.sequences, plain.sequences)
    assert distance(cached.sequences_scores, plain.sequences_scores) < 1e-5


@every_variant
def test_sampling_is_the_uncached_one(name: str) -> None:
    model, (ids, mask) = make_model(name), left_padded([tokens(1, 4)[0], tokens(1, 6)[0]])
    runs = []
    for use_cache in (False, True):
        torch.manual_seed(3)
        arguments = {"do_sample": True, "top_k": 10, "temperature": 1.5, "attention_mask": mask}
        runs.append(generate(model, ids, use_cache=use_cache, **arguments).sequences)
    assert torch.equal(*runs)


def test_decoding_from_a_prefix_that_is_already_cached() -> None:
    model, ids = make_model("differential"), tokens(1, 7)
    store = DynamicCache()
    with torch.no_grad():
        model(ids[:, :4], past_key_values=store)
    continued = generate(model, ids, past_key_values=store, attention_mask=torch.ones_like(ids))
    assert torch.equal(continued.sequences, generate(model, ids).sequences)


def test_every_cache_holds_one_layout() -> None:
    """Keys (B, G, S, K·D) with the streams side by side, values (B, G, S, E): V1 costs what its twin costs."""
    shapes = {}
    for name in VARIANTS:
        store = DynamicCache()
        with torch.no_grad():
            make_model(name)(tokens(1, 5), past_key_values=store)
        shapes[name] = tuple(store.layers[0].keys.shape), tuple(store.layers[0].values.shape)
    assert shapes["softmax"] == ((1, 4, 5, 4), (1, 4, 5, 4))
    assert shapes["differential"] == ((1, 2, 5, 8), (1, 2, 5, 8))
    assert shapes["differential_v2"] == shapes["collinear"] == shapes["softmax"]
    assert shapes["differential_collinear"] == shapes["differential"]
    assert shapes["differential_v2_collinear"] == shapes["softmax"]


@pytest.mark.parametrize("name", ["differential", "differential_v2", "collinear", "differential_collinear"])
def test_flash_attention_2_decodes_a_left_padded_batch(name: str) -> None:
    model = make_model(name, dtype=torch.float64)
    ids, mask = left_padded([tokens(1, 3)[0], tokens(1, 6, seed=4)[0]])
    expected = generate(model, ids, attention_mask=mask)
    model.config._attn_implementation = "flash_attention_2"
    with stand_in() as recorder:
        found = generate(model, ids, attention_mask=mask)
    assert torch.equal(found.sequences, expected.sequences)
    assert distance(torch.stack(found.logits), torch.stack(expected.logits)) < 1e-10
    assert all(recorder.variable_length), "padding must have been taken out of the batch"

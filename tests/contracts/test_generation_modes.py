"""What the generation tests of transformers, which only its repository has, check: for every variant, with RoPE.

| what they check | where it is |
|---|---|
| greedy, with and without a cache, static and dynamic, left padding | test_generation.py |
| sampling with a seed; beam search; a prompt in pieces | test_generation.py |
| one graph for all steps of a static cache; a cache filled beforehand | test_generation.py |
| beam sampling | here |
| another model as assistant, prompt lookup | here; batches, windows: test_layers_differ.py |
| constraints: allowed tokens, banned words, a forced end | here |
| embeddings as input | here; with a tokenizer's stop strings: tests/load/test_clients.py |
| a cache quantised to eight bits | here; fewer bits: nowhere, their packages compile C++ at the first call |
| an offloaded cache | tests/fuzz, on GPUs: transformers moves it by their streams |
| going on from the cache that a call returned, dynamic and static | here |
| scores, logits, maps and hidden states of every step | here |
| room for more than is generated (max_cache_len) | here |
| contrastive search, DoLa, groups of beams, forced words | nowhere: transformers 5 downloads them as code |
"""

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache, StaticCache

from clearhead.models import ClearheadForCausalLM
from tests.contracts.model_cases import LAYERS, VARIANTS, VOCABULARY, WIDTH, make_model, tokens
from tests.contracts.support import distance

NEW = 6
PROMPT = tokens(2, 7, seed=2)
every_variant = pytest.mark.parametrize(
    "name", [name for name in VARIANTS if name not in ("collinear_strict", "differential_collinear_slack")]
)


def model_of(name: str) -> ClearheadForCausalLM:
    """In float64: what differs is a mistake."""
    return make_model(name, dtype=torch.float64)


def generate(model: ClearheadForCausalLM, ids: Tensor | None = PROMPT, **options: Any) -> Any:
    return model.generate(ids, **({"max_new_tokens": NEW, "do_sample": False} | options))


@pytest.mark.long
@every_variant
def test_beams_that_sample(name: str) -> None:
    model, found = model_of(name), []
    for use_cache in (False, True):
        torch.manual_seed(5)
        found.append(generate(model, num_beams=3, do_sample=True, temperature=1.5, use_cache=use_cache))
    assert torch.equal(*found)
    torch.manual_seed(6)
    assert not torch.equal(generate(model, num_beams=3, do_sample=True, temperature=1.5), found[0])


@every_variant
def test_guesses_are_kept_where_the_model_agrees(name: str) -> None:
    """Several tokens behind a cache at once, and a cache that is cut back: the tokens stay those of greedy decoding."""
    model, row = model_of(name), torch.cat((PROMPT[:1], PROMPT[:1, :5]), 1)
    expected = generate(model, row)
    # One that mostly guesses right, so that guesses are kept, and not always, so that some are thrown away.
    helper = model_of(name)
    with torch.no_grad():
        for weight in helper.parameters():
            weight.add_(0.05 * torch.randn(weight.shape, generator=torch.Generator().manual_seed(1)))
    assert torch.equal(generate(model, row, assistant_model=helper), expected)
    assert torch.equal(generate(model, row, prompt_lookup_num_tokens=3), expected)


@every_variant
@torch.no_grad()
def test_constraints_choose_among_the_model_s_own_logits(name: str) -> None:
    model, row = model_of(name), PROMPT[:1]
    greedy = generate(model, row)[0, row.shape[1] :].tolist()
    allowed = [token for token in range(3, VOCABULARY) if token % 2 and token != greedy[0]]
    found = generate(model, row, prefix_allowed_tokens_fn=lambda *unused: allowed)[0]
    banned = generate(model, row, bad_words_ids=[[greedy[0]], [greedy[1], greedy[2]]])[0]
    for place in range(row.shape[1], row.shape[1] + NEW):
        logits = model(found[None, :place], use_cache=False).logits[0, -1]
        assert found[place] == max(allowed, key=lambda token: float(logits[token]))
        logits = model(banned[None, :place], use_cache=False).logits[0, -1]
        logits[greedy[0]] = -torch.inf
        if banned[place - 1] == greedy[1]:
            logits[greedy[2]] = -torch.inf
        assert banned[place] == logits.argmax()
    ended = generate(model, row, forced_eos_token_id=2)[0, row.shape[1] :].tolist()
    assert ended == [*greedy[:-1], 2]


@every_variant
def test_embeddings_as_input(name: str) -> None:
    model = model_of(name)
    expected = generate(model)
    embedded = model.get_input_embeddings()(PROMPT).detach()
    assert torch.equal(generate(model, None, inputs_embeds=embedded), expected[:, PROMPT.shape[1] :])
    beams = generate(model, num_beams=3)
    assert torch.equal(generate(model, PROMPT, inputs_embeds=embedded, num_beams=3), beams)


@pytest.mark.parametrize("kind", ["dynamic", "static"])
@every_variant
def test_going_on_from_the_cache_that_a_call_returned(name: str, kind: str) -> None:
    model, length = model_of(name), PROMPT.shape[1] + NEW + 3 + NEW
    whole = DynamicCache() if kind == "dynamic" else StaticCache(config=model.config, max_cache_len=length)
    first = generate(model, past_key_values=whole, return_dict_in_generate=True)
    assert first.past_key_values is whole
    asked = torch.cat((first.sequences, tokens(2, 3, seed=8)), 1)
    # Or what was generated and looks like padding would be taken for it.
    options = {
        "attention_mask": torch.ones_like(asked),
        "return_dict_in_generate": True,
        "output_logits": True,
    }
    again = generate(model, asked, past_key_values=whole, **options)
    fresh = generate(model, asked, **options)
    assert torch.equal(again.sequences, fresh.sequences)
    assert distance(torch.stack(again.logits), torch.stack(fresh.logits)) < 1e-10


@every_variant
@torch.no_grad()
def test_what_every_step_returns(name: str) -> None:
    """Maps, states and logits of a step are the rows of one pass over the whole sequence."""
    model = model_of(name)
    shown = {"output_attentions": True, "output_hidden_states": True}
    out = generate(model, return_dict_in_generate=True, output_logits=True, output_scores=True, **shown)
    whole = model(out.sequences, use_cache=False, **shown)
    heads = model.model.layers[0].self_attn.variant.sizes.heads
    start, batch = PROMPT.shape[1], PROMPT.shape[0]
    assert len(out.attentions) == len(out.hidden_states) == len(out.logits) == len(out.scores) == NEW
    for step in range(NEW):
        end = start + step
        queries = slice(0, start) if step == 0 else slice(end - 1, end)
        count = queries.stop - queries.start
        assert len(out.attentions[step]) == LAYERS and len(out.hidden_states[step]) == LAYERS + 1
        for found, expected in zip(out.attentions[step], whole.attentions, strict=True):
            assert found.shape == (batch, heads, count, end)
            assert distance(found, expected[:, :, queries, :end]) < 1e-10
        for found, expected in zip(out.hidden_states[step], whole.hidden_states, strict=True):
            assert found.shape == (batch, count, WIDTH)
            assert distance(found, expected[:, queries]) < 1e-10
        assert out.logits[step].shape == out.scores[step].shape == (batch, VOCABULARY)
        assert distance(out.logits[step], whole.logits[:, end - 1]) < 1e-6


@pytest.mark.long
@every_variant
def test_room_for_more_than_is_generated(name: str) -> None:
    model = model_of(name)
    options = {"cache_implementation": "static", "max_cache_len": 40, "return_dict_in_generate": True}
    out = generate(model, **options)
    assert torch.equal(out.sequences, generate(model))
    sizes = model.model.layers[0].self_attn.variant.sizes
    keys, values = out.past_key_values.layers[0].keys, out.past_key_values.layers[0].values
    assert keys.shape == (2, sizes.kv_heads, 40, sizes.key_streams * sizes.key_width)
    assert values.shape == (2, sizes.kv_heads, 40, sizes.value_width)


@pytest.mark.long
@every_variant
def test_a_cache_in_eight_bits(name: str) -> None:
    """transformers' float8 layer, which needs no other package: what it holds is off by a sixteenth at most."""
    model = make_model(name)
    options = {"return_dict_in_generate": True, "output_logits": True}
    exact = generate(model, **options)
    cache = {"backend": "fp8"}
    found = generate(model, cache_implementation="quantized", cache_config=cache, **options)
    # The prompt is attended to before it is held.
    assert distance(found.logits[0], exact.logits[0]) < 1e-5
    assert 0 < distance(found.logits[1], exact.logits[1]) < 0.5 * float(exact.logits[1].abs().max())
    assert torch.stack(found.logits).isfinite().all()
    for layer, expected in zip(found.past_key_values.layers, exact.past_key_values.layers, strict=True):
        assert layer.get_seq_length() == expected.get_seq_length()

"""Caches that keep some of a prompt: which tokens, in which bytes, and that nothing else changes."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM

from clearhead.models import ClearheadConfig, ClearheadForCausalLM, EvictingCache
from clearhead.models.eviction import OF_KEYS, POLICIES, kept

ATTENTIONS = ("softmax", "differential", "differential_v2", "differential_collinear")


def model_of(attention: str, **more: Any) -> ClearheadForCausalLM:
    config = ClearheadConfig(
        vocab_size=61,
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=more.pop("num_hidden_layers", 2),
        num_attention_heads=4,
        num_key_value_heads=2,
        attention=attention,
        max_position_embeddings=128,
        initializer_range=0.3,
        pad_token_id=0,
        **more,
    )
    torch.manual_seed(0)
    return ClearheadForCausalLM(config).eval()


def tokens(batch: int = 2, length: int = 40) -> Tensor:
    return torch.randint(1, 61, (batch, length), generator=torch.Generator().manual_seed(3))


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("attention", ATTENTIONS)
@torch.no_grad()
def test_a_budget_of_everything_changes_nothing(attention: str, policy: str) -> None:
    model, ids = model_of(attention), tokens()
    expected = model(ids, use_cache=False).logits
    cache = EvictingCache(model.config, policy, 1.0, window=8)
    found = [model(part, past_key_values=cache).logits for part in ids.split([30, 7, 1, 2], 1)]
    torch.testing.assert_close(torch.cat(found, 1), expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize("policy", POLICIES)
@torch.no_grad()
def test_what_is_kept_is_counted(policy: str) -> None:
    model, ids = model_of("differential"), tokens()
    cache, plain = EvictingCache(model.config, policy, 0.3, window=4), DynamicCache()
    prompt = model(ids, past_key_values=cache).logits
    torch.testing.assert_close(prompt, model(ids, past_key_values=plain).logits, atol=1e-5, rtol=0)
    assert cache.get_seq_length() == 40
    assert cache.get_mask_sizes(1, 0) == (13, 28)
    whole = sum(x.keys.nbytes + x.values.nbytes for x in plain.layers)
    assert cache.nbytes == whole * math.ceil(0.3 * 40) / 40
    model(ids[:, :1], past_key_values=cache)
    assert cache.get_seq_length() == 41
    assert cache.layers[0].keys.shape[2] == 13


@pytest.mark.parametrize("attention", ATTENTIONS)
@torch.no_grad()
def test_later_tokens_see_the_kept_ones_in_their_own_places(attention: str) -> None:
    """Against the same prompt under a mask that shows those tokens alone, where all heads keep the same ones."""
    model, ids = model_of(attention, num_hidden_layers=1), tokens(1)
    cache = EvictingCache(model.config, "streaming_llm", 0.5, sinks=4)
    model(ids, past_key_values=cache)
    new = torch.tensor([[7, 9, 11]])
    found = model(new, past_key_values=cache).logits
    seen = torch.zeros(1, 1, 3, 43, dtype=torch.bool)
    seen[..., :4] = seen[..., 24:40] = True
    seen[..., 40:] = torch.ones(3, 3, dtype=torch.bool).tril()
    plain = DynamicCache()
    model(ids, past_key_values=plain)
    positions = torch.arange(40, 43)[None]
    expected = model(new, attention_mask=seen, position_ids=positions, past_key_values=plain).logits
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize("rank", ["effective", "signal"])
@pytest.mark.parametrize("attention", ATTENTIONS)
@torch.no_grad()
def test_attention_ranks_the_keys(attention: str, rank: str) -> None:
    """The policies' scores from the maps that the model itself gives, of its first layer."""
    model, ids = model_of(attention), tokens()
    effective = model(ids, output_attentions=True, use_cache=False).attentions[0].double()
    if rank == "signal":
        if not attention.startswith("differential"):
            pytest.skip("one stream is its own signal")
        given: list[Any] = []
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(EvictingCache, "evict", lambda self, *rest: given.append(rest))
            model(ids, past_key_values=EvictingCache(model.config, "tova", 0.5))
        streams, _, scale, *_ = given[0]
        q, k = streams.q[0].double(), streams.own_keys[0].double()
        logits = q @ k.repeat_interleave(q.shape[1] // k.shape[1], 1).mT * scale
        hidden = torch.ones(40, 40, dtype=torch.bool).triu(1)
        effective = logits.masked_fill(hidden, float("-inf")).softmax(-1)
    groups = model.model.layers[0].self_attn.variant.sizes.kv_heads
    maps = effective.abs().unflatten(1, (groups, -1)).mean(2)
    looked = torch.arange(40, 0, -1)
    snap = maps[:, :, -6:].mean(2)
    pooled = torch.stack([snap[..., max(0, j - 2) : j + 3].sum(-1) / 5 for j in range(40)], -1)
    wanted = {
        "tova": (maps[:, :, -1], 1),
        "observed_attention": (maps.sum(2) / looked, 6),
        "snapkv": (pooled, 6),
    }
    for policy, (scores, last) in wanted.items():
        cache = EvictingCache(model.config, policy, 0.4, window=6, rank=rank)
        model(ids, past_key_values=cache)
        plain = DynamicCache()
        model(ids, past_key_values=plain)
        scores = scores.clone()
        scores[..., 40 - last :] = 9.0
        best = scores.topk(16, -1).indices.sort(-1).values
        chosen = plain.layers[0].keys.gather(
            2, best[..., None].expand(-1, -1, -1, plain.layers[0].keys.shape[3])
        )
        assert torch.equal(cache.layers[0].keys, chosen), policy


@torch.no_grad()
def test_key_norms_rank_all_streams_of_a_key() -> None:
    model, ids = model_of("differential"), tokens()
    cache, plain = EvictingCache(model.config, "knorm", 0.25), DynamicCache()
    model(ids, past_key_values=cache)
    model(ids, past_key_values=plain)
    norms = plain.layers[0].keys.norm(dim=-1)
    found = cache.layers[0].keys.norm(dim=-1).sort().values
    # A token that comes twice has the same norm twice, but for rounding.
    torch.testing.assert_close(found, norms.sort().values[..., :10])


@pytest.mark.parametrize("policy", POLICIES)
@torch.no_grad()
def test_padding_goes_first_and_moves_nothing(policy: str) -> None:
    if policy == "random":
        pytest.skip("other numbers are drawn for another length")
    # Distinct tokens: the norms of equal ones are equal.
    model, ids = model_of("differential"), torch.arange(5, 53, 2)[None]
    padded = torch.cat((torch.zeros(1, 8, dtype=torch.long), ids), 1)
    mask = (padded != 0).long()
    both, twice = torch.cat((padded, tokens(1, 32)), 0), torch.cat((mask, torch.ones_like(mask)), 0)
    for budget, alone in ((0.375, 0.5), (0.875, 1.0)):
        cache = EvictingCache(model.config, policy, budget, window=4)
        model(both, attention_mask=twice, past_key_values=cache)
        own = EvictingCache(model.config, policy, alone, window=4)
        model(ids, past_key_values=own)
        for step in range(3):
            new = torch.full((2, 1), 5 + step)
            twice = torch.cat((twice, torch.ones(2, 1, dtype=torch.long)), 1)
            found = model(new, attention_mask=twice, past_key_values=cache).logits[:1]
            expected = model(new[:1], past_key_values=own).logits
            torch.testing.assert_close(found, expected, atol=1e-4, rtol=0)
        twice = torch.cat((mask, torch.ones_like(mask)), 0)


def test_kept_places_are_in_order_padding_in_front() -> None:
    scores = torch.tensor([[[5.0, 9.0, 1.0, 7.0, 3.0]]])
    assert kept(scores, None, 3).tolist() == [[[0, 1, 3]]]
    real = torch.tensor([[True, False, True, True, False]])
    assert kept(scores, real, 2).tolist() == [[[0, 3]]]
    assert kept(scores, real, 4).tolist()[0][0][1:] == [0, 2, 3]


@pytest.mark.parametrize("attention", ATTENTIONS)
def test_generation_and_beams_take_it(attention: str) -> None:
    model, ids = model_of(attention), tokens()
    mask = torch.ones_like(ids)
    mask[0, :5] = 0
    for extra in ({}, {"num_beams": 2}):
        cache = EvictingCache(model.config, "snapkv", 0.5, window=8)
        options = {"max_new_tokens": 5, "do_sample": False, "past_key_values": cache}
        assert model.generate(ids, attention_mask=mask, **options, **extra).shape == (2, 45)
        assert cache.layers[0].keys.shape[2] == 24


@torch.no_grad()
def test_layers_with_a_window_keep_it() -> None:
    layers = [{"sliding_window": 10}, {}]
    model, ids = model_of("differential", layers=layers), tokens()
    cache = EvictingCache(model.config, "tova", 0.25)
    model(ids, past_key_values=cache)
    model(ids[:, :2], past_key_values=cache)
    assert cache.layers[0].keys.shape[2] == 9
    assert cache.layers[1].keys.shape[2] == 12


@pytest.mark.parametrize("policy", OF_KEYS)
@torch.no_grad()
def test_models_of_others(policy: str) -> None:
    config = LlamaConfig(
        vocab_size=61,
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        initializer_range=0.3,
        eos_token_id=None,
    )
    torch.manual_seed(0)
    model, ids = LlamaForCausalLM(config).eval(), tokens()
    expected = model(ids, use_cache=False).logits
    whole = EvictingCache(config, policy, 1.0)
    found = [model(part, past_key_values=whole).logits for part in ids.split([30, 9, 1], 1)]
    torch.testing.assert_close(torch.cat(found, 1), expected, atol=1e-4, rtol=0)
    cache = EvictingCache(config, policy, 0.5)
    assert model.generate(ids, max_new_tokens=3, do_sample=False, past_key_values=cache).shape == (2, 43)
    assert cache.layers[0].keys.shape[2] == 22


def test_what_it_cannot_do_is_said() -> None:
    config = model_of("differential").config
    with pytest.raises(ValueError, match="policy must be one of streaming_llm, snapkv"):
        EvictingCache(config, "h2o")
    with pytest.raises(ValueError, match="budget must be above 0 and at most 1"):
        EvictingCache(config, budget=0)
    with pytest.raises(ValueError, match="rank must be one of effective, signal"):
        EvictingCache(config, rank="noise")
    with pytest.raises(ValueError, match="pool must be odd"):
        EvictingCache(config, pool=4)
    with pytest.raises(ValueError, match="needs queries"):
        EvictingCache(LlamaConfig(num_hidden_layers=1), "snapkv")
    with pytest.raises(ValueError, match="alibi"):
        EvictingCache(model_of("softmax", position="alibi").config)
    with pytest.raises(ValueError, match="compact"):
        EvictingCache(model_of("collinear", compact_cache=True).config)

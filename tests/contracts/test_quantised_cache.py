"""The quantised cache in models: what it holds, what it costs, and every operation of Hugging Face's caches."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM

from clearhead.core.quantised import KEY_BLOCK
from clearhead.models import ClearheadConfig, ClearheadForCausalLM, QuantisedCache
from clearhead.models.quantised_cache import QuantisedLayer
from clearhead.nn import Attention

MODELS: dict[str, dict[str, Any]] = {
    "softmax": {"attention": "softmax"},
    "differential": {"attention": "differential"},
    "differential, MQA": {"attention": "differential", "num_attention_heads": 8, "num_key_value_heads": 2},
    "differential_v2": {"attention": "differential_v2"},
    "collinear, compact": {"attention": "collinear", "compact_cache": True},
    "both, compact": {"attention": "differential_collinear", "compact_cache": True},
    "v2 both, compact": {"attention": "differential_v2_collinear", "compact_cache": True},
    "alibi": {"attention": "differential", "position": "alibi"},
    "window": {"attention": "differential", "sliding_window": 200},
    "mixed": {"attention": "differential", "layers": [{"sliding_window": 150}, {"attention": "softmax"}]},
}


def model_of(name: str) -> ClearheadForCausalLM:
    sizes = {"num_attention_heads": 4, "num_key_value_heads": 2, **MODELS[name]}
    config = ClearheadConfig(
        vocab_size=61,
        hidden_size=64,
        head_dim=64,
        intermediate_size=64,
        num_hidden_layers=2,
        max_position_embeddings=512,
        initializer_range=0.1,
        pad_token_id=0,
        **sizes,
    )
    torch.manual_seed(0)
    return ClearheadForCausalLM(config).eval()


def tokens(batch: int, length: int) -> tuple[Tensor, Tensor]:
    ids = torch.randint(1, 61, (batch, length), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    mask[0, : length // 6] = 0
    return ids, mask


def logits(model: Any, cache: Any, ids: Tensor, mask: Tensor, pieces: tuple[int, ...]) -> Tensor:
    found, past = [], 0
    for count in pieces:
        end = past + count
        step = model(ids[:, past:end], attention_mask=mask[:, :end], past_key_values=cache)
        found.append(step.logits)
        past = end
    return torch.cat(found, 1)


PIECES = (230, 1, 1, 40, 1, 130, 1, 1)


@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_logits_stay_close_in_chunks_steps_and_padding(name: str) -> None:
    model = model_of(name)
    ids, mask = tokens(2, sum(PIECES))
    expected = logits(model, DynamicCache(config=model.config), ids, mask, PIECES)
    real = mask.bool()
    for bits, most in ((8, 0.01), (4, 0.12)):
        cache = QuantisedCache(model.config, bits=bits)
        found = logits(model, cache, ids, mask, PIECES)
        assert cache.get_seq_length() == sum(PIECES)
        layer = cache.layers[-1]
        assert isinstance(layer, QuantisedLayer)
        assert layer.held is not None
        assert layer.held.bits == bits
        error = (found - expected)[real].norm() / expected[real].norm()
        assert 0 < error <= most


@pytest.mark.long
@pytest.mark.parametrize("name", ["softmax", "differential", "both, compact", "window"])
@torch.no_grad()
def test_the_kernel_and_plain_pytorch_agree(name: str) -> None:
    model = model_of(name)
    ids, mask = tokens(2, 330)
    first = QuantisedCache(model.config)
    model(ids[:, :300], attention_mask=mask[:, :300], past_key_values=first)
    second = copy.deepcopy(first)
    found = model(ids[:, 300:], attention_mask=mask, past_key_values=first).logits
    model.set_attn_implementation("blocks")
    expected = model(ids[:, 300:], attention_mask=mask, past_key_values=second).logits
    torch.testing.assert_close(found, expected, atol=2e-3, rtol=0)
    model.set_attn_implementation("sdpa")
    with pytest.raises(ValueError, match="codes of a quantised cache"):
        model(ids[:, -1:], attention_mask=torch.ones(2, 331), past_key_values=second)


@pytest.mark.parametrize("name", ["softmax", "differential", "both, compact", "mixed"])
def test_generation_takes_it(name: str) -> None:
    model = model_of(name)
    ids, mask = tokens(2, 190)
    options = {"attention_mask": mask, "max_new_tokens": 12, "do_sample": False}
    for extra in ({}, {"num_beams": 3}):
        cache = QuantisedCache(model.config)
        found = model.generate(ids, past_key_values=cache, **options, **extra)
        expected = model.generate(ids, **options, **extra)
        # Random weights decide by little: nearly all tokens agree, and the prompt's own next one always does.
        assert torch.equal(found[:, :191], expected[:, :191])
        assert (found == expected).float().mean() > 0.95
        assert cache.layers[0].held is not None


def contents(layer: Any, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    """All keys and values that a layer holds, as numbers."""
    keys, values = layer.keys, layer.values
    if layer.held is None:
        return keys, values
    streams, older = layer.held.expanded(dtype)
    return torch.cat((torch.cat(streams, -1), keys), 2), torch.cat((older, values), 2)


def filled(length: int, bits: int = 8, window: int | None = None, newest: int = 32) -> QuantisedLayer:
    layer = QuantisedLayer(bits, newest, streams=2, window=window)
    rng = torch.Generator().manual_seed(length)
    layer.hold(torch.randn(3, 2, length, 32, generator=rng), torch.randn(3, 2, length, 64, generator=rng))
    return layer


@pytest.mark.parametrize("removed", [0, 1, 40, 60, 160, 200, 320])
def test_crop_leaves_what_came_before(removed: int) -> None:
    layer = filled(320)
    keys, values = contents(layer)
    layer.crop(-removed)
    assert layer.get_seq_length() == 320 - removed
    assert layer.get_mask_sizes(5) == (325 - removed, 0)
    if removed < 320:
        found = contents(layer)
        torch.testing.assert_close(found[0], keys[:, :, : 320 - removed], atol=0, rtol=0)
        torch.testing.assert_close(found[1], values[:, :, : 320 - removed], atol=0, rtol=0)
    # What follows finds its place.
    new = torch.ones(3, 2, 3, 32), torch.ones(3, 2, 3, 64)
    _, keys, _ = layer.hold(*new)
    assert layer.get_seq_length() == 323 - removed
    assert (keys[:, :, -3:] == 1).all()


def test_rows_are_chosen_repeated_and_reordered() -> None:
    for change, index in (
        (lambda x: x.reorder_cache(torch.tensor([2, 0, 0])), [2, 0, 0]),
        (lambda x: x.batch_select_indices(torch.tensor([1])), [1]),
        (lambda x: x.batch_repeat_interleave(2), [0, 0, 1, 1, 2, 2]),
    ):
        layer = filled(300)
        before = contents(layer)
        change(layer)
        for found, expected in zip(contents(layer), before, strict=True):
            assert torch.equal(found, expected[index])
        layer.hold(torch.zeros(len(index), 2, 1, 32), torch.zeros(len(index), 2, 1, 64))
        assert layer.get_seq_length() == 301


def test_a_window_forgets_whole_blocks_and_says_so() -> None:
    layer = filled(1000, window=100)
    held = 1000 - layer.first
    assert layer.get_mask_sizes(1) == (held + 1, layer.first)
    assert layer.get_seq_length() == 1000
    # All that the next query sees, and not two blocks more.
    assert 99 <= held < 99 + 32 + 2 * KEY_BLOCK
    with pytest.raises(RuntimeError, match="activate_past_recording"):
        layer.crop(-(held - 50))
    layer = QuantisedLayer(8, 32, window=100)
    layer.activate_past_recording()
    layer.hold(torch.randn(1, 1, 1000, 8), torch.randn(1, 1, 1000, 8))
    assert layer.first == 0
    layer.crop(-600)
    assert layer.get_seq_length() == 400
    assert 99 <= 400 - layer.first < 99 + 32 + 2 * KEY_BLOCK


def test_what_was_returned_stays_as_it_was() -> None:
    layer = filled(40)
    _, keys, _ = layer.hold(torch.ones(3, 2, 1, 32), torch.ones(3, 2, 1, 64))
    copied = keys.clone()
    layer.crop(-1)
    layer.reorder_cache(torch.tensor([1, 1, 1]))
    layer.hold(torch.zeros(3, 2, 1, 32), torch.zeros(3, 2, 1, 64))
    assert torch.equal(keys, copied)


@pytest.mark.parametrize(("bits", "most"), [(8, 0.53), (4, 0.29)])
@pytest.mark.parametrize("name", ["softmax", "differential", "both, compact"])
def test_all_of_a_long_cache_is_as_small_as_promised(name: str, bits: int, most: float) -> None:
    config, length = model_of(name).config, 16_384 + 100
    cache, plain = QuantisedCache(config, bits=bits), DynamicCache(config=config)
    for layer, own in enumerate(config.per_layer_config):
        heads, width = own.num_key_value_heads, own.head_dim
        value_width = getattr(own, "v_head_dim", width)
        keys = torch.randn(1, heads, length, width).bfloat16()
        values = torch.randn(1, heads, length, value_width).bfloat16()
        cache.hold(keys, values, layer)
        plain.update(keys, values, layer)
    whole = sum(x.keys.nbytes + x.values.nbytes for x in plain.layers)
    assert cache.nbytes <= most * whole


@torch.no_grad()
def test_models_of_others_get_numbers() -> None:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=61,
        hidden_size=64,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        initializer_range=0.1,
        pad_token_id=0,
    )
    model = LlamaForCausalLM(config).eval()
    ids, mask = tokens(2, sum(PIECES))
    expected = logits(model, DynamicCache(config=config), ids, mask, PIECES)
    cache = QuantisedCache(config)
    found = logits(model, cache, ids, mask, PIECES)
    real = mask.bool()
    assert 0 < (found - expected)[real].norm() / expected[real].norm() <= 0.01
    assert cache.layers[0].held is not None
    model.generate(ids, attention_mask=mask, max_new_tokens=3, past_key_values=QuantisedCache(config))


@torch.no_grad()
def test_a_layer_takes_it() -> None:
    torch.manual_seed(0)
    layer = Attention(128, 4, variant="differential", num_kv_heads=2)
    x = torch.randn(2, 300, 128)
    expected = layer(x, is_causal=True)
    config = ClearheadConfig(
        hidden_size=128,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_hidden_layers=1,
        attention="differential",
    )
    cache = QuantisedCache(config)
    found = torch.cat([layer(part, is_causal=True, cache=cache) for part in x.split([250, 49, 1], 1)], 1)
    assert cache.layers[0].held is not None
    assert 0 < (found - expected).norm() / expected.norm() <= 0.01


def test_what_it_cannot_do_is_said() -> None:
    config = model_of("softmax").config
    for bits in (2, True, "8"):
        with pytest.raises(ValueError, match="bits must be 8, 4 or 3"):
            QuantisedCache(config, bits=bits)
    with pytest.raises(ValueError, match="newest must be at least 1"):
        QuantisedCache(config, newest=0)
    chunked = LlamaConfig(num_hidden_layers=1, layer_types=["chunked_attention"], attention_chunk_size=8)
    with pytest.raises(ValueError, match="not of chunked_attention"):
        QuantisedCache(chunked)
    model = model_of("softmax")
    with pytest.raises(ValueError, match="has no gradients"):
        model(torch.ones(1, 4, dtype=torch.long), past_key_values=QuantisedCache(config))
    layer = QuantisedLayer(8, 32)
    with pytest.raises(ValueError, match="NaN or infinite"):
        layer.hold(torch.full((1, 1, 200, 8), float("nan")), torch.zeros(1, 1, 200, 8))
    with pytest.raises(ValueError, match="crop takes a negative number"):
        filled(40).crop(3)
    with pytest.raises(ValueError, match="more tokens than the 40 held"):
        filled(40).crop(-41)

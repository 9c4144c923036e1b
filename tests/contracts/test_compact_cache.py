"""The compact cache of collinear models: half of every key, the same tokens."""

import itertools

import pytest
import torch
from huggingface_hub.errors import StrictDataclassError
from torch import Tensor
from transformers import DynamicCache, StaticCache

from clearhead.models import ClearheadConfig, ClearheadForCausalLM
from clearhead.positions.base import PlaneRotation, Rotation
from clearhead.positions.rope import Rope
from clearhead.variants.placement import CollinearPlacement

ATTENTIONS = {
    "exact": ("collinear", {"mode": "exact"}),
    "slack": ("collinear", {"mode": "slack"}),
    "strict": ("collinear", {"mode": "strict", "activation": "softplus"}),
    "differential": ("differential_collinear", {}),
    "differential v2": ("differential_v2_collinear", {"mode": "slack"}),
}
DYNAMIC = {"rope_type": "dynamic", "factor": 4.0, "rope_theta": 10000.0}
ROPES = {
    "rope": ("rope", {"rope_type": "default", "rope_theta": 10000.0}),
    "interleaved": ("rope", {"rope_type": "default", "rope_theta": 10000.0, "layout": "interleaved"}),
    "dynamic": ("rope", DYNAMIC),
    "xpos": ("xpos", {"rope_theta": 10000.0}),
}
both = pytest.mark.parametrize(("attention", "rope"), list(itertools.product(ATTENTIONS, ROPES)))


def model_of(attention: str, rope: str, compact: bool, kv_heads: int = 2) -> ClearheadForCausalLM:
    name, options = ATTENTIONS[attention]
    position, parameters = ROPES[rope]
    config = ClearheadConfig(
        vocab_size=61,
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=kv_heads,
        attention=name,
        attention_options=options,
        position=position,
        rope_parameters=parameters,
        max_position_embeddings=16,
        initializer_range=0.3,
        compact_cache=compact,
        pad_token_id=0,
    )
    torch.manual_seed(0)
    return ClearheadForCausalLM(config).eval()


def padded() -> tuple[Tensor, Tensor]:
    ids = torch.randint(1, 61, (3, 12), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    mask[0, :5] = 0
    mask[2, :1] = 0
    return ids * mask, mask


@both
@torch.no_grad()
def test_cached_logits_equal_a_full_forward(attention: str, rope: str) -> None:
    model, plain = model_of(attention, rope, True), model_of(attention, rope, False)
    ids = torch.randint(1, 61, (2, 24), generator=torch.Generator().manual_seed(2))
    expected = plain(ids, use_cache=False, rope_length=24).logits
    cache = DynamicCache()
    pieces = [ids[:, :7], ids[:, 7:10], *ids[:, 10:].split(1, dim=1)]
    found = [model(piece, past_key_values=cache, rope_length=24).logits for piece in pieces]
    torch.testing.assert_close(torch.cat(found, dim=1), expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize("cache", ["dynamic", "static"])
@both
def test_generation_gives_the_same_tokens(attention: str, rope: str, cache: str) -> None:
    ids, mask = padded()
    options = {"max_new_tokens": 10, "do_sample": False, "cache_implementation": cache}
    expected = model_of(attention, rope, False).generate(ids, attention_mask=mask, **options)
    found = model_of(attention, rope, True).generate(ids, attention_mask=mask, **options)
    assert torch.equal(found, expected)


def test_beams_give_the_same_tokens() -> None:
    ids, mask = padded()
    options = {"max_new_tokens": 8, "num_beams": 3, "do_sample": False}
    found, expected = (
        model_of("exact", "rope", compact).generate(ids, attention_mask=mask, **options)
        for compact in (True, False)
    )
    assert torch.equal(found, expected)


@pytest.mark.parametrize("attention", ATTENTIONS)
@pytest.mark.parametrize("static", [False, True], ids=["dynamic", "static"])
@torch.no_grad()
def test_keys_take_half_their_room(attention: str, static: bool) -> None:
    def size(compact: bool) -> tuple[int, int]:
        model = model_of(attention, "rope", compact)
        cache = StaticCache(config=model.config, max_cache_len=16) if static else DynamicCache()
        model(torch.ones(1, 8, dtype=torch.long), past_key_values=cache)
        layer = cache.layers[0]
        return layer.keys.nbytes, layer.values.nbytes

    (held, values), (keys, same) = size(True), size(False)
    assert 2 * held == keys
    assert values == same
    if attention != "differential v2":
        assert held + values == 0.75 * (keys + same)


@torch.no_grad()
def test_bfloat16_stays_close() -> None:
    ids = torch.randint(1, 61, (2, 20), generator=torch.Generator().manual_seed(3))
    exact = model_of("exact", "rope", False)(ids, use_cache=False).logits

    def error(compact: bool) -> float:
        model = model_of("exact", "rope", compact).bfloat16()
        cache = DynamicCache()
        found = [model(piece, past_key_values=cache).logits for piece in ids.split(1, dim=1)]
        return float((torch.cat(found, dim=1).float() - exact).abs().max())

    assert error(True) <= 1.5 * error(False)


@torch.no_grad()
def test_positions_that_do_not_count_tokens_are_refused() -> None:
    model = model_of("slack", "rope", True)
    cache = DynamicCache()
    model(torch.ones(1, 4, dtype=torch.long), past_key_values=cache)
    with pytest.raises(ValueError, match="compact cache counts positions itself"):
        model(torch.ones(1, 1, dtype=torch.long), past_key_values=cache, position_ids=torch.tensor([[9]]))


@torch.no_grad()
def test_packed_documents_are_read_as_without_it() -> None:
    ids = torch.randint(1, 61, (1, 12), generator=torch.Generator().manual_seed(4))
    positions = torch.tensor([[0, 1, 2, 3, 4, 0, 1, 2, 0, 1, 2, 3]])
    found, expected = (
        model_of("slack", "rope", compact)(ids, position_ids=positions).logits for compact in (True, False)
    )
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=0)


def test_only_collinear_keys_have_a_compact_form() -> None:
    with pytest.raises(StrictDataclassError, match="compact_cache"):
        ClearheadConfig(attention="softmax", compact_cache=True)


@torch.no_grad()
def test_a_decoding_step_compiles() -> None:
    model = model_of("exact", "rope", True)
    ids, mask = padded()
    cache = StaticCache(config=model.config, max_cache_len=16)
    model(ids, attention_mask=mask, past_key_values=cache)
    mask = torch.cat((mask, torch.ones(3, 1, dtype=torch.long)), dim=1)
    token = torch.full((3, 1), 5)
    twin = StaticCache(config=model.config, max_cache_len=16)
    model(ids, attention_mask=mask[:, :-1], past_key_values=twin)
    expected = model(token, attention_mask=mask, past_key_values=twin).logits
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(
        compiled(token, attention_mask=mask, past_key_values=cache).logits, expected, atol=1e-5, rtol=1e-4
    )


class Wrapped(Rotation):
    """Another rotation than the library's own, with nothing to look into."""

    def __init__(self, inner: PlaneRotation) -> None:
        self.inner = inner
        self.layout = inner.layout

    def query(self, x: Tensor) -> Tensor:
        return self.inner.query(x)

    def key(self, x: Tensor) -> Tensor:
        return self.inner.key(x)


@pytest.mark.parametrize("mode", ["exact", "slack"])
@pytest.mark.parametrize("layout", ["half", "interleaved"])
def test_any_rotation_has_a_table(mode: str, layout: str) -> None:
    placement = CollinearPlacement(8, mode)
    rotation = Rope(8, layout=layout).rotation(torch.arange(30)[None])
    found = placement.table(Wrapped(rotation), torch.device("cpu"))
    torch.testing.assert_close(placement.table(rotation, torch.device("cpu")), found)

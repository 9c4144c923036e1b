"""The cache that grows in place holds bit for bit what Hugging Face's growing cache holds, whatever is done to it."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache

from clearhead.models import (
    ClearheadConfig,
    ClearheadForCausalLM,
    ClearheadForConditionalGeneration,
    ClearheadSeq2SeqConfig,
    GrowingCache,
)
from clearhead.models.growing_cache import GrowingLayer

SIZES: dict[str, Any] = {
    "vocab_size": 61,
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "pad_token_id": 0,
}


def tokens(count: int, seed: int, batch: int = 2) -> tuple[Tensor, Tensor]:
    rng = torch.Generator().manual_seed(seed)
    return torch.randn(batch, 3, count, 8, generator=rng), torch.randn(batch, 3, count, 4, generator=rng)


def layers() -> tuple[GrowingLayer, Any]:
    """A layer that grows in place and Hugging Face's, after a prompt of five tokens and one more."""
    own, plain = GrowingLayer(), type(DynamicCache(config=ClearheadConfig(num_hidden_layers=1)).layers[0])()
    for step in (tokens(5, 0), tokens(1, 1)):
        own.update(*step)
        plain.update(*step)
    return own, plain


def alike(own: Any, plain: Any) -> None:
    assert own.get_seq_length() == plain.get_seq_length()
    assert torch.equal(own.keys, plain.keys) and torch.equal(own.values, plain.values)


@torch.no_grad()
def test_tokens_are_written_where_there_is_room_and_copied_where_there_is_none() -> None:
    own, plain = layers()
    places = set()
    for seed in range(200):
        step = tokens(1 + seed % 2, 2 + seed)
        own.update(*step)
        plain.update(*step)
        alike(own, plain)
        places.add(own.keys.data_ptr())
    # 300 tokens: room for 64 and then for an eighth at a time.
    assert len(places) <= 5
    step = tokens(500, 7)
    own.update(*step)
    plain.update(*step)
    alike(own, plain)


@torch.no_grad()
@pytest.mark.parametrize("change", ["crop", "reorder", "repeat", "select"])
def test_whoever_changes_a_layer_finds_it_as_hugging_faces(change: str) -> None:
    own, plain = layers()
    before = own.keys
    was = before.clone()
    for layer in (own, plain):
        if change == "crop":
            layer.crop(-2)
        elif change == "reorder":
            layer.reorder_cache(torch.tensor([1, 1]))
        elif change == "repeat":
            layer.batch_repeat_interleave(2)
        else:
            layer.batch_select_indices(torch.tensor([1]))
    for seed in (11, 12):
        step = tokens(1, seed, own.keys.shape[0])
        own.update(*step)
        plain.update(*step)
        alike(own, plain)
    # What somebody still holds from before the change has not been written over.
    assert torch.equal(before, was)


@torch.no_grad()
@pytest.mark.parametrize("copied", [copy.copy, copy.deepcopy])
def test_two_copies_that_go_on_do_not_write_into_one_another(copied: Any) -> None:
    own, plain = layers()
    other, plain_other = copied(own), copied(plain)
    for seed in (21, 22, 23):
        own.update(*tokens(1, seed))
        plain.update(*tokens(1, seed))
        other.update(*tokens(1, seed + 10))
        plain_other.update(*tokens(1, seed + 10))
        alike(own, plain)
        alike(other, plain_other)


def test_gradients_pass_what_was_added_later() -> None:
    own, _ = layers()
    keys, values = (x.requires_grad_() for x in tokens(1, 3))
    first, _ = own.update(keys, values)
    loss = (first * first).sum()
    own.update(*tokens(1, 4))
    loss.backward()
    assert keys.grad is not None and torch.equal(keys.grad, 2 * keys.detach())


def test_inference_mode_and_no_grad_may_take_turns() -> None:
    own, plain = GrowingLayer(), layers()[1].__class__()
    for seed in range(6):
        with torch.inference_mode() if seed % 3 else torch.no_grad():
            own.update(*tokens(2, seed))
            plain.update(*tokens(2, seed))
    alike(own, plain)


@torch.no_grad()
@pytest.mark.parametrize("attention", ["softmax", "differential", "differential_v2", "collinear"])
def test_models_make_it_and_write_the_same_text(attention: str) -> None:
    torch.manual_seed(0)
    layers: list[dict[str, Any]] = [{}, {"sliding_window": 8}]
    model = ClearheadForCausalLM(
        ClearheadConfig(**SIZES, num_hidden_layers=2, attention=attention, layers=layers)
    ).eval()
    ids = torch.randint(1, 61, (2, 12), generator=torch.Generator().manual_seed(2))
    mask = torch.ones_like(ids)
    mask[0, :5] = 0
    assert isinstance(model(ids).past_key_values, GrowingCache)
    for extra in ({}, {"num_beams": 2}):
        told = {
            "attention_mask": mask,
            "max_new_tokens": 9,
            "do_sample": False,
            "return_dict_in_generate": True,
        }
        found = model.generate(ids, **told, **extra)
        right = model.generate(ids, **told, **extra, past_key_values=DynamicCache(config=model.config))
        assert torch.equal(found.sequences, right.sequences)
        kinds = [type(layer) for layer in found.past_key_values.layers]
        assert kinds[0] is GrowingLayer and kinds[1] is type(right.past_key_values.layers[1])
        for own, plain in zip(found.past_key_values.layers, right.past_key_values.layers, strict=True):
            alike(own, plain)


@torch.no_grad()
def test_what_is_asked_for_is_taken() -> None:
    torch.manual_seed(0)
    model = ClearheadForCausalLM(ClearheadConfig(**SIZES, num_hidden_layers=1)).eval()
    ids = torch.tensor([[3, 4, 5]])
    for asked in (
        {"past_key_values": DynamicCache(config=model.config)},
        {"cache_implementation": "dynamic"},
    ):
        found = model.generate(ids, max_new_tokens=3, return_dict_in_generate=True, **asked)
        assert type(found.past_key_values.layers[0]) is not GrowingLayer


@torch.no_grad()
def test_the_decoder_of_an_encoder_decoder_grows_in_place() -> None:
    torch.manual_seed(0)
    config = ClearheadSeq2SeqConfig(**SIZES, num_hidden_layers=1, bos_token_id=1)
    model = ClearheadForConditionalGeneration(config).eval()
    ids = torch.tensor([[3, 4, 5]])
    found = model.generate(ids, max_new_tokens=5, return_dict_in_generate=True)
    assert type(found.past_key_values.self_attention_cache.layers[0]) is GrowingLayer


@torch.no_grad()
def test_a_cache_under_vmap_and_dual_numbers_holds_what_hugging_face_s_does() -> None:
    """Several tokens cannot be written into one room, nor derivatives into one without."""
    own, plain = layers()
    own.update(*tokens(1, 2))
    plain.update(*tokens(1, 2))
    keys, values = tokens(1, 3)
    several = torch.stack((keys, 2 * keys, -keys)), torch.stack((values, -values, values))

    def with_token(layer: Any) -> Any:
        return lambda k, v: copy.deepcopy(layer).update(k, v)

    for found, expected in zip(
        torch.vmap(with_token(own))(*several), torch.vmap(with_token(plain))(*several), strict=True
    ):
        assert torch.equal(found, expected)
    given = (keys, values), (torch.ones_like(keys), torch.ones_like(values))
    found, slopes = torch.func.jvp(with_token(own), *given)
    expected, true = torch.func.jvp(with_token(plain), *given)
    assert all(torch.equal(a, b) for a, b in zip((*found, *slopes), (*expected, *true), strict=True))


@torch.no_grad()
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::torch.jit.TracerWarning")
def test_a_trace_copies_as_hugging_face_s_does() -> None:
    def three(k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        layer = GrowingLayer()
        for _ in range(3):
            found = layer.update(k, v)
        return found

    traced = torch.jit.trace(three, tokens(2, 0))
    for found, expected in zip(traced(*tokens(90, 1)), three(*tokens(90, 1)), strict=True):
        assert torch.equal(found, expected)

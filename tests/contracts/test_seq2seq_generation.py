"""Decoding of encoder-decoders with a cache gives the tokens and logits of decoding without one, for every variant."""

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache, EncoderDecoderCache, StaticCache

from clearhead.models import ClearheadForConditionalGeneration
from tests.contracts.model_cases import LAYERS, tokens
from tests.contracts.seq2seq_cases import CASES, PAD, START, make_seq2seq
from tests.contracts.support import distance

NEW = 6
every_case = pytest.mark.parametrize(("name", "cross_position"), CASES)
both_caches = pytest.mark.parametrize("cache", ["dynamic", "static"])
SOME = [("differential", "nope"), ("differential_v2", "rope"), ("collinear", "rope"), ("dex", "nope")]
some_cases = pytest.mark.parametrize(("name", "cross_position"), SOME)


def source_batch(side: str) -> tuple[list[Tensor], Tensor, Tensor]:
    """Three sources of different length: each alone, and as one batch padded on one side, or two, and its mask."""
    rows = [tokens(1, length, seed=length)[0] for length in (3, 7, 5)]
    ids, mask = torch.full((3, 8), PAD), torch.zeros(3, 8, dtype=torch.long)
    for index, row in enumerate(rows):
        start = {"left": 8 - len(row), "right": 0, "both": min(index, 8 - len(row))}[side]
        ids[index, start : start + len(row)] = row
        mask[index, start : start + len(row)] = 1
    return rows, ids, mask


@torch.no_grad()
def greedy_by_hand(model: ClearheadForConditionalGeneration, source: Tensor) -> tuple[Tensor, Tensor]:
    """New tokens and their logits from one full forward pass a token: no cache, no generate, no padding."""
    row, found = torch.tensor([[START]]), []
    for _ in range(NEW):
        logits = model(source[None], decoder_input_ids=row, use_cache=False).logits[0, -1]
        found.append(logits)
        row = torch.cat((row, logits.argmax()[None, None]), dim=1)
    return row[0], torch.stack(found)


def generate(model: ClearheadForConditionalGeneration, ids: Tensor, **arguments: Any) -> Any:
    settings = {"do_sample": False, "output_logits": True, "return_dict_in_generate": True}
    return model.generate(ids, max_new_tokens=NEW, **(settings | arguments))


@both_caches
@every_case
def test_cached_greedy_decoding_of_padded_sources(name: str, cross_position: str, cache: str) -> None:
    model = make_seq2seq(name, dtype=torch.float64, cross_position=cross_position)
    for side in ("left", "right", "both"):
        rows, ids, mask = source_batch(side)
        out = generate(model, ids, attention_mask=mask, cache_implementation=cache)
        logits = torch.stack(out.logits, dim=1)
        for index, row in enumerate(rows):
            expected_tokens, expected = greedy_by_hand(model, row)
            assert torch.equal(out.sequences[index], expected_tokens)
            # What `generate` gives out is float32.
            assert distance(logits[index], expected) < 1e-6


@both_caches
@every_case
def test_float32_decodes_the_same_tokens(name: str, cross_position: str, cache: str) -> None:
    model, (_, ids, mask) = make_seq2seq(name, cross_position=cross_position), source_batch("left")
    plain = generate(model, ids, attention_mask=mask, use_cache=False)
    cached = generate(model, ids, attention_mask=mask, cache_implementation=cache)
    assert torch.equal(cached.sequences, plain.sequences)


@both_caches
@every_case
def test_beam_search_is_the_uncached_one(name: str, cross_position: str, cache: str) -> None:
    model = make_seq2seq(name, dtype=torch.float64, cross_position=cross_position)
    _, ids, mask = source_batch("both")
    arguments = {"num_beams": 3, "num_return_sequences": 2, "output_scores": True, "attention_mask": mask}
    plain = generate(model, ids, use_cache=False, **arguments)
    cached = generate(model, ids, cache_implementation=cache, **arguments)
    assert torch.equal(cached.sequences, plain.sequences)
    assert distance(cached.sequences_scores, plain.sequences_scores) < 1e-10


@both_caches
@some_cases
def test_sampling_is_the_uncached_one(name: str, cross_position: str, cache: str) -> None:
    model, (_, ids, mask) = make_seq2seq(name, cross_position=cross_position), source_batch("left")
    runs = []
    for arguments in ({"use_cache": False}, {"cache_implementation": cache}):
        torch.manual_seed(3)
        chosen = {"do_sample": True, "top_k": 10, "temperature": 1.5, "attention_mask": mask}
        runs.append(generate(model, ids, **chosen, **arguments).sequences)
    assert torch.equal(*runs)


@both_caches
@some_cases
@torch.no_grad()
def test_cross_keys_and_values_are_made_once_a_request(name: str, cross_position: str, cache: str) -> None:
    model, (_, ids, mask) = make_seq2seq(name, cross_position=cross_position), source_batch("left")
    seen: list[int] = []
    for layer in model.model.decoder.layers:
        layer.cross_attn.k_proj.register_forward_hook(lambda _, args, __: seen.append(args[0].shape[1]))
    generate(model, ids, attention_mask=mask, cache_implementation=cache)
    assert [count for count in seen if count] == [8] * LAYERS
    assert len(seen) == NEW * LAYERS


@some_cases
@torch.no_grad()
def test_targets_in_pieces_behind_a_prompt_that_is_padded(name: str, cross_position: str) -> None:
    """A decoder's prompt padded on the left, in chunks, into caches of both kinds, one wider than the source."""
    model = make_seq2seq(name, dtype=torch.float64, cross_position=cross_position)
    _, ids, mask = source_batch("both")
    target, own = tokens(3, 8, seed=9), torch.ones(3, 8, dtype=torch.long)
    own[0, :3] = 0
    expected = model(ids, attention_mask=mask, decoder_input_ids=target, decoder_attention_mask=own).logits
    text = model.config.get_text_config(decoder=True)
    stores = [
        EncoderDecoderCache(DynamicCache(config=text), DynamicCache()),
        EncoderDecoderCache(StaticCache(text, max_cache_len=11), StaticCache(text, max_cache_len=8)),
        EncoderDecoderCache(StaticCache(text, max_cache_len=11), StaticCache(text, max_cache_len=12)),
    ]
    for store in stores:
        found, start = [], 0
        encoded = model.get_encoder()(ids, attention_mask=mask)
        for size in (4, 1, 2, 1):
            step = model(
                encoder_outputs=encoded,
                attention_mask=mask,
                decoder_input_ids=target[:, start : start + size],
                decoder_attention_mask=own[:, : start + size],
                past_key_values=store,
            )
            found.append(step.logits)
            start += size
        assert distance(torch.cat(found, 1) * own[..., None], expected * own[..., None]) < 1e-10


@torch.no_grad()
def test_windows_of_the_decoder_do_not_cut_the_source() -> None:
    model = make_seq2seq("differential", dtype=torch.float64, sliding_window=3)
    rows, ids, mask = source_batch("left")
    for cache in ("dynamic", "static"):
        out = generate(model, ids, attention_mask=mask, cache_implementation=cache)
        for index, row in enumerate(rows):
            assert torch.equal(out.sequences[index], greedy_by_hand(model, row)[0])


def test_a_request_s_length_is_frozen_for_scalings_that_ask_for_it() -> None:
    dynamic = {"rope_parameters": {"rope_type": "dynamic", "factor": 4.0}, "max_position_embeddings": 4}
    model = make_seq2seq("softmax", dtype=torch.float64, **dynamic)
    _, ids, mask = source_batch("left")
    out = generate(model, ids, attention_mask=mask)
    with torch.no_grad():
        whole = model(
            ids, attention_mask=mask, decoder_input_ids=out.sequences[:, :-1], decoder_rope_length=1 + NEW
        )
    assert distance(torch.stack(out.logits, dim=1), whole.logits) < 1e-6
    with pytest.raises(ValueError, match="rope_length is 3, shorter than the request"):
        generate(model, ids, attention_mask=mask, decoder_rope_length=3)


@torch.no_grad()
def test_a_compiled_decode_step_is_one_graph_for_all_steps() -> None:
    torch._dynamo.reset()
    model, target = make_seq2seq("differential_v2"), tokens(2, 9)
    encoded = model.get_encoder()(tokens(2, 5, seed=4))
    expected = model(encoder_outputs=encoded, decoder_input_ids=target, use_cache=False).logits
    text = model.config.get_text_config(decoder=True)
    store = EncoderDecoderCache(StaticCache(text, max_cache_len=12), StaticCache(text, max_cache_len=5))
    model(encoder_outputs=encoded, decoder_input_ids=target[:, :4], past_key_values=store)
    step = torch.compile(model, fullgraph=True, backend="aot_eager")
    for index in range(4, 9):
        with torch._dynamo.config.patch(error_on_recompile=index > 5):
            found = step(
                encoder_outputs=encoded,
                decoder_input_ids=target[:, index : index + 1],
                past_key_values=store,
            )
        assert distance(found.logits[:, 0], expected[:, index]) < 1e-5


def test_what_a_cache_must_be() -> None:
    model, ids = make_seq2seq("softmax", sliding_window=3), tokens(2, 6)
    given = {"input_ids": ids, "decoder_input_ids": ids}
    with pytest.raises(ValueError, match=r"must be an EncoderDecoderCache, .* not DynamicCache"):
        model(**given, past_key_values=DynamicCache())
    text = model.config.get_text_config(decoder=True)
    cut = EncoderDecoderCache(DynamicCache(config=text), DynamicCache(config=text))
    with pytest.raises(ValueError, match="would drop tokens of the source"):
        model(**given, past_key_values=cut)
    store = EncoderDecoderCache(DynamicCache(config=text), DynamicCache())
    model(**given, past_key_values=store)
    with pytest.raises(ValueError, match="hold cross keys of 6 tokens, but the source has 4"):
        model(ids[:, :4], decoder_input_ids=ids[:, :1], past_key_values=store)
    with pytest.raises(ValueError, match="two sequences a request"):
        model.init_continuous_batching()

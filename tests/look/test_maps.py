"""Maps to look at are the maps of the model: equal to those it gives itself, stream by stream and for any block."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import (
    DiffLlamaConfig,
    DiffLlamaForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
)

import clearhead.look.maps as maps
from clearhead.look.maps import Rows, see_maps
from tests.look import small

IDS = torch.randint(1, 257, (23,), generator=torch.Generator().manual_seed(1))
FORMS: dict[str, dict[str, Any]] = {
    "softmax": {},
    "differential": {},
    "differential_v2": {},
    "collinear": {},
    "differential_collinear": {},
    "differential_v2_collinear": {},
}
THEIRS: dict[str, Any] = {
    "llama": (LlamaForCausalLM, LlamaConfig),
    "diff_llama": (DiffLlamaForCausalLM, DiffLlamaConfig),
    "gpt2": (GPT2LMHeadModel, GPT2Config),
}


def looked(model: Any, first: int = 0) -> dict[int, Rows]:
    """The rows of every layer, its blocks put together again."""
    parts: dict[int, list[Rows]] = {}
    see_maps(model, IDS, lambda rows: parts.setdefault(rows.layer, []).append(rows), first)
    whole = {}
    for layer, blocks in parts.items():
        assert [b.first for b in blocks] == sorted(b.first for b in blocks) and blocks[0].first == first
        streams = tuple(torch.cat(s, 1) for s in zip(*(b.streams for b in blocks), strict=True))
        weights = (
            None
            if blocks[0].weights is None
            else torch.cat([b.weights for b in blocks if b.weights is not None], 1)
        )
        whole[layer] = Rows(layer, first, streams, weights)
    return whole


def own_maps(model: Any) -> list[torch.Tensor]:
    before = model.config._attn_implementation
    model.set_attn_implementation("eager")
    with torch.no_grad():
        found = model(input_ids=IDS[None], output_attentions=True, use_cache=False).attentions
    model.set_attn_implementation(before)
    return [one[0] for one in found]


@pytest.mark.parametrize("groups", [4, 2, 1])
@pytest.mark.parametrize("attention", FORMS)
def test_they_are_the_models_own(attention: str, groups: int) -> None:
    # V1 halves the heads of its twin, keys as well.
    groups = max(groups, 2) if attention in ("differential", "differential_collinear") else groups
    model = small.model(attention, num_key_value_heads=groups)
    found = looked(model)
    for layer, expected in enumerate(own_maps(model)):
        torch.testing.assert_close(found[layer].effective, expected, atol=2e-6, rtol=1e-4)


@pytest.mark.parametrize("position", ["xpos", "alibi", "nope"])
def test_under_other_positions_too(position: str) -> None:
    model = small.model("differential", position=position)
    found = looked(model)
    for layer, expected in enumerate(own_maps(model)):
        torch.testing.assert_close(found[layer].effective, expected, atol=2e-6, rtol=1e-4)


@pytest.mark.parametrize("attention", ["differential", "differential_v2"])
def test_streams_come_apart(attention: str) -> None:
    """Each stream is a softmax, and with λ = 0 the effective map of one layer is the first alone."""
    model = small.model(attention, num_hidden_layers=1)
    rows = looked(model)[0]
    for stream in rows.streams:
        torch.testing.assert_close(stream.sum(-1), torch.ones(stream.shape[:2]))
        assert not stream.triu(1).any()
    variant = model.model.layers[0].self_attn.variant
    variant.gate = lambda x: torch.zeros(1, 1, 1, 1)
    torch.testing.assert_close(own_maps(model)[0], rows.streams[0], atol=2e-6, rtol=1e-4)


def test_blocks_and_a_later_first_row_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    model = small.model("differential")
    whole = looked(model)
    monkeypatch.setattr(maps, "MOST_WEIGHTS", 2 * 23 * 2 * 5)
    for layer, rows in looked(model, first=9).items():
        for one, other in zip(rows.streams, whole[layer].streams, strict=True):
            torch.testing.assert_close(one, other[:, 9:])
        assert rows.weights is not None and whole[layer].weights is not None
        torch.testing.assert_close(rows.weights, whole[layer].weights[:, 9:])


@pytest.mark.parametrize("kind", THEIRS)
def test_of_other_models_too(kind: str) -> None:
    family, configuration = THEIRS[kind]
    sizes: dict[str, Any] = {"vocab_size": 257, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
                             "num_attention_heads": 4, "num_key_value_heads": 2, "initializer_range": 0.3}  # fmt: skip
    if kind == "gpt2":
        sizes = {"vocab_size": 257, "n_embd": 32, "n_layer": 2, "n_head": 4, "initializer_range": 0.3}
    torch.manual_seed(0)
    model = family(configuration(**sizes)).eval()
    found, own = looked(model), own_maps(model)
    for layer, expected in enumerate(own):
        if kind == "diff_llama":
            assert len(found[layer].streams) == 2
            expected = expected.chunk(2)[0] - found[layer].weights[..., None] * expected.chunk(2)[1]  # type: ignore[index]
        torch.testing.assert_close(found[layer].effective, expected, atol=1e-6, rtol=1e-5)


def test_what_gives_no_maps_and_what_is_too_long_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    model = LlamaForCausalLM(LlamaConfig(vocab_size=257, hidden_size=32, intermediate_size=48, num_hidden_layers=1,
                                         num_attention_heads=4))  # fmt: skip
    monkeypatch.setattr(maps, "MOST_WEIGHTS", 23)
    with pytest.raises(ValueError, match="23 tokens are too many for the maps of LlamaForCausalLM"):
        see_maps(model, IDS, print)

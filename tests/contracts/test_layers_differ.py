"""Layers that differ in attention, position or window: each computes what it would alone, with any cache."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub.errors import StrictDataclassError
from transformers import DynamicCache, MistralConfig, MistralForCausalLM, StaticCache

from clearhead.models import ClearheadConfig, ClearheadForCausalLM
from clearhead.models.cost import forward_flops_per_token, kv_bytes, kv_bytes_per_token, mean_visible
from clearhead.runs.recipe import RecipeError
from clearhead.runs.recipe_io import load_recipe
from clearhead.train.comparison import check_models

SIZES: dict[str, Any] = {
    "vocab_size": 61,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "initializer_range": 0.3,
}
W = {"sliding_window": 5}
PATTERNS: dict[str, dict[str, Any]] = {
    "three windows to one": {"layers": [W, W, W, {}]},
    "windows everywhere": {"sliding_window": 4},
    "full first": {"layers": [{}, W]},
    "other attention above": {
        "layers": [{}, {}, {"attention": "differential", **W}, {"attention": "differential_v2"}]
    },
    "V1 with windows": {"attention": "differential", "layers": [W, {}]},
    "collinear below": {"layers": [{"attention": "collinear", "attention_options": {"mode": "slack"}}, W]},
    "two windows": {"layers": [{"sliding_window": 3}, {"sliding_window": 7}]},
    "the wider window first": {"layers": [{"sliding_window": 7}, {"sliding_window": 3}]},
    "positions": {"layers": [{"position": "alibi", **W}, {"position": "nope"}, {"position": "xpos"}, {}]},
    "compact": {"attention": "collinear", "compact_cache": True, "layers": [W, {}]},
    "one length a request": {
        "rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0},
        "max_position_embeddings": 8,
        "layers": [W, {}],
    },
}
IDS = torch.randint(1, 61, (2, 19), generator=torch.Generator().manual_seed(2))


def model(**options: Any) -> ClearheadForCausalLM:
    torch.manual_seed(4)
    made = ClearheadForCausalLM(ClearheadConfig(**SIZES | {"max_position_embeddings": 64} | options))
    return made.double().eval()


def requests(options: dict[str, Any]) -> dict[str, Any]:
    """What calls with a cache must be told where the length of a request matters."""
    return {"rope_length": 24} if "rope_parameters" in options else {}


@pytest.mark.parametrize("name", PATTERNS)
def test_any_cache_gives_what_a_whole_pass_gives(name: str) -> None:
    made, told = model(**PATTERNS[name]), requests(PATTERNS[name])
    with torch.no_grad():
        whole = made(IDS, **told).logits
        for cache in (
            DynamicCache(config=made.config),
            StaticCache(config=made.config, max_cache_len=24),
        ):
            parts, past = [], 0
            # A prompt longer than the windows, single tokens, and a chunk behind a full window.
            for size in (8, 1, 1, 1, 6, 2):
                piece = IDS[:, past : past + size]
                parts.append(made(piece, past_key_values=cache, **told).logits)
                past += size
            torch.testing.assert_close(torch.cat(parts, 1), whole, atol=1e-9, rtol=1e-9)


@pytest.mark.parametrize("name", PATTERNS)
def test_left_padding_changes_nothing(name: str) -> None:
    made, told = model(**PATTERNS[name]), requests(PATTERNS[name])
    with torch.no_grad():
        alone = made(IDS[:1, 7:], **told).logits
        mask = torch.ones(2, 19, dtype=torch.long)
        mask[0, :7] = 0
        ids = torch.cat([torch.cat([torch.zeros(1, 7, dtype=torch.long), IDS[:1, 7:]], 1), IDS[1:]])
        padded = made(ids, attention_mask=mask, **told).logits[:1, 7:]
        torch.testing.assert_close(padded, alone, atol=1e-9, rtol=1e-9)
        cache = DynamicCache(config=made.config)
        first = made(ids[:, :12], attention_mask=mask[:, :12], past_key_values=cache, **told).logits[:1, 7:]
        rest = [
            made(ids[:, t : t + 1], attention_mask=mask[:, : t + 1], past_key_values=cache, **told).logits[:1]
            for t in range(12, 19)
        ]
        torch.testing.assert_close(torch.cat([first, *rest], 1), alone, atol=1e-9, rtol=1e-9)


@pytest.mark.parametrize("name", PATTERNS)
@pytest.mark.parametrize(
    "options", [{}, {"cache_implementation": "static"}, {"num_beams": 3}, {"prompt_lookup_num_tokens": 3}]
)
def test_generation_with_a_cache_says_what_it_says_without(name: str, options: dict[str, Any]) -> None:
    made = model(**PATTERNS[name])
    mask = torch.ones(2, 12, dtype=torch.long)
    rows = 1 if "prompt_lookup_num_tokens" in options else 2
    if rows == 2:
        mask[0, :4] = 0
    given: dict[str, Any] = {
        "attention_mask": mask[:rows],
        "max_new_tokens": 9,
        "do_sample": False,
        "pad_token_id": 0,
    }
    plain = {"num_beams": options.get("num_beams", 1)}
    expected = made.generate(IDS[:rows, :12], use_cache=False, **given, **plain)
    assert torch.equal(made.generate(IDS[:rows, :12], **given, **options), expected)


def test_a_short_padded_prompt_fits_a_static_cache_of_windows_alone() -> None:
    made = model(layers=[{"sliding_window": 4}, {"sliding_window": 8}])
    mask = torch.tensor([[0, 1, 1], [1, 1, 1]])
    given: dict[str, Any] = {
        "attention_mask": mask,
        "max_new_tokens": 9,
        "do_sample": False,
        "pad_token_id": 0,
    }
    expected = made.generate(IDS[:, :3], use_cache=False, **given)
    assert torch.equal(made.generate(IDS[:, :3], cache_implementation="static", **given), expected)


def test_a_window_is_a_band_of_the_same_model() -> None:
    windowed, full = model(sliding_window=4), model()
    full.load_state_dict(windowed.state_dict())
    back = torch.arange(19)[:, None] - torch.arange(19)
    band = ((back >= 0) & (back < 4))[None, None].expand(2, 1, 19, 19)
    with torch.no_grad():
        torch.testing.assert_close(windowed(IDS).logits, full(IDS, attention_mask=band).logits)
        # A mask of four dimensions says everything.
        torch.testing.assert_close(
            windowed(IDS, attention_mask=band).logits, full(IDS, attention_mask=band).logits
        )


@pytest.mark.parametrize("implementation", ["clearhead", "eager", "sdpa", "flex_attention", "cpu"])
def test_every_backend_has_the_window(implementation: str) -> None:
    options = PATTERNS["three windows to one"]
    with torch.no_grad():
        expected = model(**options)(IDS).logits
        made = model(**options).float()
        made.set_attn_implementation(implementation)
        torch.testing.assert_close(made(IDS).logits.double(), expected, atol=2e-4, rtol=2e-4)


def test_a_windowed_softmax_model_is_mistral() -> None:
    made = model(sliding_window=4)
    theirs = MistralForCausalLM(
        MistralConfig(
            **SIZES,
            eos_token_id=None,
            sliding_window=4,
            rms_norm_eps=1e-5,
            rope_parameters={"rope_type": "default", "rope_theta": 1e4},
        )
    )
    theirs = theirs.double().eval()
    theirs.load_state_dict(made.state_dict())
    with torch.no_grad():
        # Its rotary angles are float32.
        torch.testing.assert_close(made(IDS).logits, theirs(IDS).logits, atol=1e-5, rtol=1e-5)
    given: dict[str, Any] = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
    assert torch.equal(made.generate(IDS, **given), theirs.generate(IDS, **given))


def test_each_layer_is_what_it_would_be_in_a_model_of_its_kind() -> None:
    """The hybrid's layers, moved into models of one kind, give the same states."""
    layers = [
        {"attention": "differential"},
        {"attention": "softmax", **W},
        {"attention": "differential_v2"},
        W,
    ]
    hybrid = model(layers=layers)
    with torch.no_grad():
        states = hybrid(IDS, output_hidden_states=True).hidden_states
        for index, entry in enumerate(layers):
            alone = model(attention=entry.get("attention", "softmax"), sliding_window=entry.get("sliding_window"),
                          attention_options={})  # fmt: skip
            # V1's λ_init depends on the layer's place, so it stays where it is and the others do nothing.
            for layer in alone.model.layers:
                layer.self_attn.o_proj.weight.zero_()
                layer.mlp.down_proj.weight.zero_()
            alone.model.layers[index].load_state_dict(hybrid.model.layers[index].state_dict())
            found = alone.model(inputs_embeds=states[index], output_hidden_states=True).hidden_states
            # The last of the hidden states is behind the final norm, which starts as ones in all of them.
            torch.testing.assert_close(found[index + 1], states[index + 1], atol=1e-9, rtol=1e-9)


def test_a_cache_does_not_grow_past_the_window() -> None:
    made = model(layers=[W, W, W, {}])
    cache = made(IDS, use_cache=True).past_key_values
    assert [layer.keys.shape[2] for layer in cache.layers] == [4, 4, 4, 19]
    made.generate(
        IDS, past_key_values=(cache := DynamicCache(config=made.config)), max_new_tokens=9, pad_token_id=0
    )
    assert [layer.keys.shape[2] for layer in cache.layers] == [4, 4, 4, 27]
    static = StaticCache(config=made.config, max_cache_len=32)
    made(IDS, past_key_values=static)
    assert [layer.keys.shape[2] for layer in static.layers] == [5, 5, 5, 32]


def test_packed_documents_keep_to_themselves_under_windows() -> None:
    made = model(layers=[W, {}])
    positions = torch.cat([torch.arange(8), torch.arange(11)])[None]
    with torch.no_grad():
        packed = made(IDS[:1], position_ids=positions).logits
        apart = [made(IDS[:1, :8]).logits, made(IDS[:1, 8:]).logits]
    torch.testing.assert_close(packed, torch.cat(apart, 1), atol=1e-9, rtol=1e-9)


def test_every_layer_learns_and_compiles() -> None:
    made = model(**PATTERNS["other attention above"]).float().train()
    loss = made(IDS, labels=IDS).loss
    loss.backward()
    assert all(p.grad is not None and bool(p.grad.isfinite().all()) for p in made.parameters())
    torch._dynamo.reset()
    compiled = torch.compile(made, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(IDS, labels=IDS).loss, loss)
    with torch.autocast("cpu", torch.bfloat16):
        assert abs(float(made(IDS, labels=IDS).loss - loss)) < 0.1


def test_maps_are_zero_outside_the_window() -> None:
    made = model(layers=[W, {}])
    maps = made(IDS, output_attentions=True).attentions
    back = torch.arange(19)[:, None] - torch.arange(19)
    assert not maps[0][..., back >= 5].any() and maps[1][..., back >= 5].any()


def test_they_are_saved_and_loaded_and_told_by_the_configuration(tmp_path: Path) -> None:
    made = model(**PATTERNS["other attention above"])
    made.save_pretrained(tmp_path)
    again = ClearheadForCausalLM.from_pretrained(tmp_path, dtype=torch.float64)
    assert again.config.layers == made.config.layers
    with torch.no_grad():
        # The model was made in float32 and widened, with the frequencies of its rotary angles.
        torch.testing.assert_close(again(IDS).logits, made(IDS).logits, atol=1e-4, rtol=1e-4)
    half = ClearheadForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert half.model.layers[2].self_attn.variant.lambda_q1.dtype == torch.float32
    # λ where there is one: V2's needs tokens.
    assert set(again.lambdas()) == {2} and set(again.lambdas(IDS)) == {2, 3}


def test_costs_count_what_a_window_spares() -> None:
    assert mean_visible(10, None) == 5.5 and mean_visible(10, 3) == (1 + 2 + 3 * 8) / 10
    full, spare = ClearheadConfig(**SIZES), ClearheadConfig(**SIZES, layers=[W, W, W, {}])
    assert kv_bytes_per_token(full, torch.float32) == kv_bytes_per_token(spare, torch.float32)
    a_token = kv_bytes_per_token(full, torch.float32) // 4
    assert kv_bytes(full, 100, torch.float32) == 400 * a_token
    assert kv_bytes(spare, 100, torch.float32) == (100 + 3 * 4) * a_token
    saved = 3 * 4 * 4 * 8 * (mean_visible(100, None) - mean_visible(100, 5))
    assert forward_flops_per_token(full, 100) - forward_flops_per_token(spare, 100) == pytest.approx(
        saved, abs=1
    )


def test_a_recipe_s_arms_may_differ_in_their_layers() -> None:
    recipe = load_recipe(
        Path(__file__).parents[2] / "recipes" / "demo.toml",
        ["arms.1.model.layers=[{attention='softmax', sliding_window=32}, {}]", "model.sliding_window=64"],
    )
    assert len(set(check_models(recipe).values())) > 1
    kinds = ClearheadConfig(vocab_size=61, **recipe.model_of(recipe.arms[1])).layer_kinds
    assert [(kind.attention, kind.window) for kind in kinds[:2]] == [
        ("softmax", 32),
        (recipe.arms[1].attention, 64),
    ]
    wrong = load_recipe(
        Path(__file__).parents[2] / "recipes" / "demo.toml", ["arms.1.model.layers=[{sliding_windw=3}]"]
    )
    with pytest.raises(
        RecipeError, match=r"layers\[0\] has no key 'sliding_windw': did you mean 'sliding_window'"
    ):
        check_models(wrong)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"sliding_window": 1}, "sliding_window must be an integer of at least 2"),
        ({"layers": []}, r"layers must be a list of 1 to num_hidden_layers \(4\) tables"),
        ({"layers": [{}] * 5}, r"layers must be a list of 1 to num_hidden_layers \(4\) tables"),
        ({"layers": [{"window": 3}]}, r"layers\[0\] has no key 'window': "),
        ({"layers": [{}, {"sliding_window": True}]}, r"layers\[1\].sliding_window must be an integer"),
        ({"layers": [{"attention": "differentail"}]}, "unknown variant 'differentail': did you mean 'differential'"),
        ({"layers": [{}, {"attention": "differential", "attention_options": {"mode": 1}}]},
         "layer 1: attention 'differential' has no option 'mode'"),
        ({"layers": [{"position": "nope"}], "nope_interval": 2}, "give positions in layers or nope_interval, not both"),
        ({"attention": "collinear", "layers": [{}, {"position": "nope"}]}, r"layers \(layer 1\) must give every layer"),
        ({"attention": "collinear", "compact_cache": True, "layers": [{}, {"attention": "softmax"}]},
         "compact_cache is for collinear variants"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_one_sentence(options: dict[str, Any], said: str) -> None:
    with pytest.raises((ValueError, StrictDataclassError)) as error:
        ClearheadConfig(**SIZES | options)
    reason = error.value.__cause__ or error.value
    assert re.search(said, str(reason)), str(reason)

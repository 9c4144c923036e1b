"""Every variant on every position method it admits: rope scalings, layouts, xPos, mixes of layers."""

from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub.errors import StrictDataclassError
from torch import Tensor
from transformers import AutoModelForCausalLM, DynamicCache

from clearhead import registry
from clearhead.models import ClearheadConfig, ClearheadForCausalLM
from clearhead.nn import Attention, CollinearAttention
from clearhead.positions.rope import Rope
from clearhead.positions.xpos import Xpos
from clearhead.registry import resolve
from clearhead.variants.placement import CollinearPlacement
from tests.contracts.model_cases import HEAD, VARIANTS, make_config, make_model, oracle_of, tokens
from tests.contracts.position_cases import (
    SCALINGS,
    TRAINED,
    expected_logits,
    scaled_model,
    turning_of,
)
from tests.contracts.support import distance, rand
from tests.oracles import xpos

# Hugging Face wraps what a configuration raises in an error of its own.
REFUSED = (ValueError, StrictDataclassError)
every_variant = pytest.mark.parametrize("name", VARIANTS)
every_scaling = pytest.mark.parametrize("scaling", SCALINGS)
ROTATING = [name for name in registry.POSITIONS if resolve("positions", name).rotates]
STILL = [name for name in registry.POSITIONS if name not in ROTATING]


def test_no_position_or_scaling_of_the_registry_is_left_out() -> None:
    assert set(SCALINGS) == set(registry.ROPE_SCALINGS)
    assert set(registry.POSITIONS) == {"rope", "xpos", "alibi", "nope"}


@every_scaling
def test_frequencies_are_the_formula_s(scaling: str) -> None:
    """In float64 to rounding, in float32 to a few units of it; at lengths on both sides of the trained one."""
    rope = Rope.from_parameters(HEAD, SCALINGS[scaling], TRAINED)
    for length in (1, TRAINED, TRAINED + 1, 3 * TRAINED, 1000):
        expected = turning_of(scaling, length)
        for dtype, bound in ((torch.float64, 1e-14), (torch.float32, 1e-6)):
            found = rope.scaling.frequencies(torch.tensor([length]), dtype)
            assert found.dtype == dtype
            wanted = torch.tensor(expected.theta, dtype=torch.float64)
            assert float((found.double() / wanted - 1).abs().max()) < bound
        assert rope.scaling.attention_factor(torch.tensor([length])) == pytest.approx(
            expected.factor, abs=1e-14
        )


@every_scaling
@every_variant
def test_logits_past_the_trained_length_are_the_oracle_s(name: str, scaling: str) -> None:
    model, ids = scaled_model(name, scaling, torch.float64), tokens(1, 13)
    assert distance(model(ids).logits[0], expected_logits(name, scaling, model, ids[0])) < 1e-10


@pytest.mark.parametrize("scaling", [name for name in SCALINGS if name != "default"])
def test_every_scaling_changes_something(scaling: str) -> None:
    model, ids = scaled_model("softmax", scaling, torch.float64), tokens(1, 13)
    plain = expected_logits("softmax", "default", model, ids[0])
    assert distance(model(ids).logits[0], plain) > 1e-3


def test_dynamic_changes_nothing_within_the_trained_length() -> None:
    ids = tokens(2, TRAINED)
    found, plain = (scaled_model("softmax", scaling)(ids).logits for scaling in ("dynamic", "default"))
    assert torch.equal(found, plain)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("position", ROTATING)
def test_angles_are_computed_wide_whatever_the_model_s_dtype(position: str, dtype: torch.dtype) -> None:
    """Buffers that are cast with the model, or built without memory, give the angles of a fresh module."""
    here = torch.tensor([[0, 1, 300, 4097]])
    rope = {"rope_type": "yarn", "factor": 4.0} if position == "rope" else {}
    made = resolve("positions", position).from_parameters(16, rope, 512)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    expected = made.rotation(here)
    moved = made.to(dtype).rotation(here)
    assert moved.query_cos.dtype == wide
    assert distance(moved.query_cos, expected.query_cos) < (1e-3 if wide == torch.float64 else 1e-30)
    with torch.device("meta"):
        built = resolve("positions", position).from_parameters(16, rope, 512)
    built = built.to_empty(device="cpu")
    built.reset_buffers()
    assert distance(built.rotation(here).key_sin, expected.key_sin) < 1e-30


@pytest.mark.parametrize("scaling", ["yarn", "longrope"])
def test_a_saved_model_has_its_scaling(scaling: str, tmp_path: Path) -> None:
    model, ids = scaled_model("collinear", scaling), tokens(2, 13)
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    # transformers writes the trained length down beside them.
    trained = {"original_max_position_embeddings": TRAINED}
    assert loaded.config.rope_parameters == SCALINGS[scaling] | trained
    assert torch.equal(loaded(ids).logits, model(ids).logits)


def halves_of(weight: Tensor, heads: int) -> Tensor:
    """Projection rows for pairs (2j, 2j + 1) in the order that pairs (j, j + D/2) need."""
    rows = weight.view(heads, HEAD // 2, 2, -1)
    return rows.transpose(1, 2).reshape(weight.shape)


@every_variant
def test_interleaved_is_half_with_permuted_projections(name: str) -> None:
    """Every variant ties, squares and turns the pairs of the layout: the permutation is all the difference."""
    interleaved = make_model(name, dtype=torch.float64, rope_parameters={"layout": "interleaved"})
    half, ids = make_model(name, dtype=torch.float64), tokens(2, 9)
    state = interleaved.state_dict()
    for key, value in state.items():
        if any(part in key for part in ("q_proj", "k_proj", "query_up", "key_up")):
            # DiffLoRA has rows below those of the heads, fewer than a head is wide, which nothing turns.
            heads = value.shape[0] // HEAD
            turned = halves_of(value[: heads * HEAD], heads)
            state[key] = torch.cat((turned, value[heads * HEAD :]))
    half.load_state_dict(state)
    assert distance(interleaved(ids).logits, half(ids).logits) < 1e-10
    assert distance(interleaved(ids).logits, make_model(name, dtype=torch.float64)(ids).logits) > 1e-3


@pytest.mark.parametrize("layout", ["half", "interleaved"])
def test_join_undoes_pairs(layout: Any) -> None:
    x = rand(2, 3, 4, 8)
    rotation = Rope(8, layout=layout).rotation(torch.arange(4)[None])
    first, second = rotation.pairs(x)
    assert torch.equal(rotation.join(first, second), x)
    assert torch.equal(second[..., 0], x[..., 1 if layout == "interleaved" else 4])


@pytest.mark.parametrize("kind", ["softmax", "exact", "strict", "slack"])
@pytest.mark.parametrize("far", [0, 20_000, 35_000])
def test_xpos_scores_are_the_distance_form(kind: Any, far: int) -> None:
    """The factors of queries and keys come to ζ^(distance/512), in float64 and near the reach of float32."""
    where = [far + n for n in (0, 3, 40, 600)]
    query, key = rand(1, 1, 4, 8, seed=1), rand(1, 1, 4, 8, seed=2)
    expected = xpos.scores(query[0, 0], key[0, 0], where, where, kind)
    seen = torch.ones(4, 4).tril().bool()
    for dtype, bound in ((torch.float64, 1e-10), (torch.float32, 2e-2 if far else 1e-5)):
        position = Xpos(8).to(dtype)
        rotation = position.rotation(torch.tensor([where]))
        q, k = query.to(dtype), key.to(dtype)
        if kind == "softmax":
            q, k = rotation.query(q), rotation.key(k)
        else:
            placement = CollinearPlacement(8, kind)
            q, k = placement.query(q, rotation), placement.key(k, rotation)
        assert bool(q.isfinite().all() and k.isfinite().all())
        found = (q @ k.transpose(-1, -2))[0, 0]
        assert distance(found[seen], expected[seen]) < bound


def test_xpos_says_how_far_it_reaches() -> None:
    position = Xpos(8)
    assert (position.reach(torch.float32), position.reach(torch.float16)) == (35_694, 3_966)
    assert position.reach(torch.bfloat16) == position.reach(torch.float32)
    position.rotation(torch.tensor([[0, 35_694]]))
    with pytest.raises(ValueError, match="35695 is past the reach"):
        position.rotation(torch.tensor([[0, 35_695]]))
    with pytest.raises(REFUSED, match="raise xpos_scale_base"):
        make_config("softmax", position="xpos", max_position_embeddings=40_000)
    make_config(
        "softmax",
        position="xpos",
        max_position_embeddings=40_000,
        rope_parameters={"xpos_scale_base": 1024.0},
    )


@every_variant
def test_xpos_models_decode_and_do_not_mind_where_they_begin(name: str) -> None:
    """The decay is strong here (a scale base of 4), so that it shows."""
    changes = {"position": "xpos", "rope_parameters": {"xpos_scale_base": 4.0}, "max_position_embeddings": 64}
    model, ids = make_model(name, dtype=torch.float64, **changes), tokens(2, 12)
    full = model(ids).logits
    assert distance(full, make_model(name, dtype=torch.float64)(ids).logits) > 1e-3
    store = DynamicCache()
    parts = [model(part, past_key_values=store).logits for part in ids.split([5, 1, 1, 5], dim=1)]
    assert distance(torch.cat(parts, 1), full) < 1e-10
    moved = model(ids, position_ids=torch.arange(12)[None] + 100).logits
    assert distance(moved, full) > 1e-3 if name.endswith("slack") else distance(moved, full) < 1e-8


def test_xpos_layers_are_causal() -> None:
    layer, x = Attention(32, 4, position="xpos"), torch.zeros(1, 3, 32)
    layer(x, is_causal=True)
    with pytest.raises(ValueError, match="is_causal must be True"):
        layer(x)


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"nope_interval": 4}, ["rope", "rope", "rope", "nope", "rope"]),
        ({"nope_interval": 2, "num_hidden_layers": 4}, ["rope", "nope", "rope", "nope"]),
        (
            {"layer_positions": ["nope", "rope", "nope"], "num_hidden_layers": 3},
            ["nope", "rope", "nope"],
        ),
    ],
)
@pytest.mark.parametrize("name", ["softmax", "differential", "differential_v2"])
def test_mixes_of_layers_are_the_oracle_s(name: str, changes: dict[str, Any], expected: list[str]) -> None:
    model = make_model(name, dtype=torch.float64, **{"num_hidden_layers": 5, **changes})
    assert list(model.config.positions_by_layer) == expected
    assert set(model.model.positions) == {"rope", "nope"}
    ids = tokens(2, 9)
    logits, _ = oracle_of(name, "gqa", model, ids, layer_positions=expected)
    assert distance(model(ids).logits, logits) < 1e-10
    store = DynamicCache()
    parts = [model(part, past_key_values=store).logits for part in ids.split([4, 1, 4], dim=1)]
    assert distance(torch.cat(parts, 1), logits) < 1e-10


@pytest.mark.parametrize("layers", [["rope", "alibi"], ["alibi", "nope"], ["xpos", "rope"]], ids=str)
@every_variant
def test_mixes_with_other_positions_decode(name: str, layers: list[str]) -> None:
    if resolve("variants", VARIANTS[name][0]).needs_rotation and set(layers) & set(STILL):
        with pytest.raises(REFUSED, match=r"layer_positions\[\d\]"):
            make_config(name, layer_positions=layers)
        return
    model, ids = make_model(name, dtype=torch.float64, layer_positions=layers), tokens(2, 9)
    full = model(ids).logits
    swapped = make_model(name, dtype=torch.float64, layer_positions=layers[::-1])
    assert distance(full, swapped(ids).logits) > 1e-4
    store = DynamicCache()
    parts = [model(part, past_key_values=store).logits for part in ids.split([4, 1, 4], dim=1)]
    assert distance(torch.cat(parts, 1), full) < 1e-10
    padded = torch.cat((ids.new_zeros(2, 3), ids), dim=1)
    mask = torch.ones_like(padded)
    mask[:, :3] = 0
    assert distance(model(padded, attention_mask=mask).logits[:, 3:], full) < 1e-10


def config(**changes: Any) -> ClearheadConfig:
    return make_config("softmax", **changes)


def scaled(**parameters: Any) -> ClearheadConfig:
    return config(rope_parameters=parameters, max_position_embeddings=TRAINED)


MISTAKES: list[tuple[str, Any]] = [
    ("layer_positions has 1 names; expected num_hidden_layers (2)", lambda: config(layer_positions=["rope"])),
    ("did you mean 'rope'", lambda: config(layer_positions=["rope", "ropes"])),
    ("layer_positions or nope_interval", lambda: config(layer_positions=["rope"] * 2, nope_interval=2)),
    ("nope_interval must be at least 2, not 1", lambda: config(nope_interval=1)),
    ("layer_positions[1]", lambda: make_config("collinear", layer_positions=["rope", "nope"])),
    ("nope_interval (2)", lambda: make_config("collinear", nope_interval=2)),
    ("position must give", lambda: make_config("collinear", position="nope")),
    ("position must be one that rotates", lambda: CollinearAttention(32, 4, position="nope")),
    ("unknown rope_type 'yarnn': did you mean 'yarn'", lambda: scaled(rope_type="yarnn", factor=2.0)),
    ("needs the rope_parameters key 'factor'", lambda: scaled(rope_type="linear")),
    ("'factor' must be at least 1, not 0.5", lambda: scaled(rope_type="linear", factor=0.5)),
    ("'factor' must be a finite number", lambda: scaled(rope_type="ntk", factor="4")),
    ("'factor' must be a finite number", lambda: scaled(rope_type="ntk", factor=float("nan"))),
    ("'facter': did you mean 'factor'", lambda: scaled(rope_type="ntk", facter=4.0)),
    ("no rope_parameters key 'beta_fast'", lambda: scaled(rope_type="dynamic", factor=4.0, beta_fast=32)),
    (
        "'original_max_position_embeddings' must be an integer",
        lambda: scaled(rope_type="dynamic", factor=2.0, original_max_position_embeddings=0),
    ),
    (
        "'beta_fast' (1) must not be less",
        lambda: scaled(rope_type="yarn", factor=2.0, beta_fast=1, beta_slow=2),
    ),
    ("'truncate' must be true or false", lambda: scaled(rope_type="yarn", factor=2.0, truncate=1)),
    ("rope_theta greater than 1", lambda: scaled(rope_type="yarn", factor=2.0, rope_theta=1.0)),
    (
        "'high_freq_factor' (1) must be greater",
        lambda: scaled(rope_type="llama3", factor=8.0, low_freq_factor=1, high_freq_factor=1),
    ),
    (
        "'long_factor' must be 2 positive numbers",
        lambda: scaled(rope_type="longrope", short_factor=[1.0, 1.0], long_factor=[1.0]),
    ),
    ("layout must be one of half, interleaved", lambda: scaled(layout="interleave")),
    ("'rope_theta' must be greater than 0", lambda: scaled(rope_theta=0.0)),
    ('"xpos" has no scalings', lambda: config(position="xpos", rope_parameters={"rope_type": "yarn"})),
    ("did you mean 'xpos_gamma'", lambda: config(position="xpos", rope_parameters={"xpos_gama": 0.3})),
    (
        "head_dim must be at least 4",
        lambda: config(head_dim=2, rope_parameters={"rope_type": "ntk", "factor": 2.0}),
    ),
    (
        "must know the trained length",
        lambda: Attention(32, 4, rope_parameters={"rope_type": "dynamic", "factor": 2.0}),
    ),
    (
        "rope_theta is given twice",
        lambda: Attention(32, 4, rope_theta=1e4, rope_parameters={"rope_theta": 1e4}),
    ),
    ("scaling was made for head_dim 8", lambda: Rope(4, Rope(8).scaling)),
    ("head_dim must be even", lambda: Rope(5)),
]


@pytest.mark.parametrize(("message", "action"), MISTAKES, ids=[message for message, _ in MISTAKES])
def test_mistakes_are_named(message: str, action: Any) -> None:
    with pytest.raises(REFUSED) as caught:
        action()
    assert message in str(caught.value)


@pytest.mark.parametrize("position", registry.POSITIONS)
@pytest.mark.parametrize("attention", registry.VARIANTS)
def test_every_variant_takes_every_position_that_it_admits(attention: str, position: str) -> None:
    sizes = {"vocab_size": 50, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4}
    choices: dict[str, Any] = {"attention": attention, "position": position, **sizes}
    if resolve("variants", attention).needs_rotation and position in STILL:
        with pytest.raises(REFUSED, match="defined by rotary angles"):
            ClearheadConfig(**choices)
        return
    logits = ClearheadForCausalLM(ClearheadConfig(**choices))(tokens(1, 4)).logits
    assert bool(logits.isfinite().all())

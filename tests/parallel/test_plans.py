"""What the configuration tells transformers of how a model is shared out, and what is refused."""

from typing import Any

import pytest
import torch
from torch import nn

from clearhead.core.streams import HeadShape, Widths
from clearhead.models import ClearheadConfig, ClearheadForCausalLM, plans
from clearhead.registry import VARIANTS as REGISTERED
from clearhead.variants.base import SUMMED
from clearhead.variants.differential import Differential
from clearhead.variants.softmax import Softmax
from tests.contracts.grouped_differential import GroupByGroup, GroupedDifferential
from tests.contracts.model_cases import VARIANTS, make_config, make_model

BLOCKS = {
    f"layers.*.{part}": style
    for style, parts in {
        "colwise": [
            "self_attn.q_proj",
            "self_attn.k_proj",
            "self_attn.v_proj",
            "mlp.gate_proj",
            "mlp.up_proj",
        ],
        "rowwise": ["self_attn.o_proj", "mlp.down_proj"],
    }.items()
    for part in parts
}
OWN = {
    "softmax": {},
    "differential": {"": SUMMED, ".head_norm": SUMMED},
    "differential_v2": {".lambda_proj": "colwise"},
    "collinear": {},
    "differential_collinear": {"": SUMMED, ".head_norm": SUMMED},
    "differential_v2_collinear": {".lambda_proj": "colwise"},
}


@pytest.mark.parametrize("name", [name for name, (attention, _) in VARIANTS.items() if attention in OWN])
def test_a_plan_names_every_parameter_of_a_layer_but_the_residual_norms(name: str) -> None:
    model = make_model(name)
    plan = model.config.base_model_tp_plan
    own = OWN[VARIANTS[name][0]]
    assert plan == BLOCKS | {f"layers.*.self_attn.variant{key}": style for key, style in own.items()}
    assert model.supports_tp_plan and model.supports_pp_plan
    assert model.tp_plan["lm_head"] == "colwise_gather_output"
    assert model.tp_plan["model.embed_tokens"] == "embedding_rowwise"
    left = set()
    for key, _ in model.model.named_parameters():
        place = ".".join("*" if part.isdigit() else part for part in key.split("."))
        if place not in plan and place.rpartition(".")[0] not in plan:
            left.add(place)
    norms = {"layers.*.input_layernorm.weight", "layers.*.post_attention_layernorm.weight"}
    assert left == {*norms, "norm.weight", "embed_tokens.weight"}


@pytest.mark.parametrize("name", [name for name, (attention, _) in VARIANTS.items() if attention not in OWN])
def test_who_does_not_say_how_it_is_shared_out_has_no_plan(name: str) -> None:
    assert VARIANTS[name][0] in ("dex", "diff_lora")
    assert make_config(name).base_model_tp_plan is None


def test_options_and_layers_decide_what_a_plan_names() -> None:
    plain = make_config("differential", attention_options={"head_norm": False}).base_model_tp_plan
    assert plain == BLOCKS | {"layers.*.self_attn.variant": SUMMED}
    normed = make_config("softmax", attention_options={"head_norm": True}).base_model_tp_plan
    assert normed == BLOCKS | {"layers.*.self_attn.variant.head_norm": SUMMED}
    mixed = make_config("differential_v2", layers=[{}, {"attention": "differential"}]).base_model_tp_plan
    assert mixed == BLOCKS | {
        f"layers.*.self_attn.variant{key}": style
        for key, style in (OWN["differential"] | OWN["differential_v2"]).items()
    }
    # No plan is written down: it follows from the rest.
    assert not any("plan" in key for key in make_config("differential").to_dict())


def test_fsdp_gathers_what_is_not_float32_apart_from_what_is() -> None:
    head_norm = {"layers.*.self_attn.variant.head_norm": "free_full_weight"}
    for name, more in (("softmax", {}), ("differential", head_norm), ("differential_v2", {})):
        config = make_config(name)
        assert config.base_model_fsdp_plan == super(ClearheadConfig, config).base_model_fsdp_plan | more
        assert make_model(name).fsdp_plan["lm_head"] == "keep_full_weight"
    # Softmax may have a norm on its heads, and nothing that stays in float32.
    assert make_config("softmax", attention_options={"head_norm": True}).base_model_fsdp_plan.keys() == {
        "embed_tokens",
        "layers.*",
        "norm",
    }


@pytest.mark.parametrize(
    ("name", "heads", "kv_heads", "parts", "has"),
    [
        ("softmax", 6, 6, 4, "4 does not divide 6"),
        ("softmax", 4, 1, 2, "2 does not divide 1"),
        ("differential", 8, 2, 2, "2 does not divide 1"),
        ("differential_v2", 6, 3, 2, "2 does not divide 3"),
        ("collinear", 4, 4, 3, "3 does not divide 4"),
    ],
)
def test_heads_that_do_not_divide_are_refused(
    name: str, heads: int, kv_heads: int, parts: int, has: str
) -> None:
    model = make_model(name, num_attention_heads=heads, num_key_value_heads=kv_heads)
    variants = [layer.self_attn.variant for layer in model.model.own_layers()]
    sizes = [variant.sizes for variant in variants]
    said = f"tp_size {parts} does not fit layer 0, a \\w+ layer: {has}, the number .* num_key_value_heads {kv_heads}, "
    with pytest.raises(ValueError, match=said):
        plans.share_heads(variants, 0, parts)
    assert [variant.sizes for variant in variants] == sizes


def test_a_later_layer_that_does_not_divide_leaves_all_as_they_were() -> None:
    model = make_model("softmax", num_key_value_heads=2, layers=[{}, {"attention": "differential"}])
    variants = [layer.self_attn.variant for layer in model.model.own_layers()]
    with pytest.raises(ValueError, match="layer 1, a Differential layer"):
        plans.share_heads(variants, 0, 2)
    assert [variant.parts for variant in variants] == [1, 1]


def test_a_share_is_a_layer_of_fewer_heads() -> None:
    shape, half = HeadShape(32, 8, 4, 4), HeadShape(32, 4, 2, 4)
    for kind in (Softmax, Differential):
        assert kind.widths(shape).share(2) == kind.widths(half)
    unequal = GroupedDifferential.widths(shape, 2, True, True)
    assert unequal.share(2) == GroupedDifferential.widths(half, 2, True, True)
    assert unequal.share(4).stream_heads == (2, 1)


def test_a_variant_that_does_not_say_how_has_no_plan(monkeypatch: pytest.MonkeyPatch) -> None:
    class Unsaid(GroupByGroup):
        tensor_parallel = {"": "local_params"}  # noqa: RUF012

        def __init__(self, shape: HeadShape, sizes: Widths | None = None) -> None:
            super().__init__(shape)
            self.norm = nn.LayerNorm(shape.head_dim)

    for kind in (GroupedDifferential, Unsaid):
        monkeypatch.setitem(REGISTERED, "toy", f"{__name__}:toy")
        monkeypatch.setitem(globals(), "toy", kind)
        sizes: dict[str, Any] = {"num_attention_heads": 4, "num_key_value_heads": 2, "num_hidden_layers": 1}
        config = ClearheadConfig(hidden_size=32, attention="toy", **sizes)
        assert config.base_model_tp_plan is None
        with torch.device("meta"):
            assert "model.layers.*.self_attn.q_proj" not in ClearheadForCausalLM(config).tp_plan


@pytest.mark.parametrize(
    ("changes", "shared"),
    [
        (None, True),
        ("auto", True),
        ({}, False),
        ({"lm_head": "replicate"}, True),
        ({"model.layers.*.self_attn.k_proj": "colwise"}, True),
    ],
)
def test_changes_to_a_plan(changes: Any, shared: bool) -> None:
    assert plans.check_rules(make_model("differential").tp_plan, changes) is shared


@pytest.mark.parametrize("key", ["self_attn.k_proj", "self_attn.variant"])
def test_some_rules_of_attention_cannot_change_alone(key: str) -> None:
    said = f"tp_plan: layers.\\*.{key} is 'replicate'; the rules of attention belong together"
    with pytest.raises(ValueError, match=said):
        plans.check_rules(make_model("differential").tp_plan, {f"model.layers.*.{key}": "replicate"})

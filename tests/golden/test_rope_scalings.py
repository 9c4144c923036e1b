"""Rope scalings against transformers: frequencies, factors, whole models, and configurations in both directions."""

import importlib
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import (
    CohereConfig,
    DeepseekV3Config,
    Gemma3TextConfig,
    LlamaConfig,
    LlamaForCausalLM,
    Phi3Config,
    PreTrainedConfig,
    Qwen2Config,
    SmolLM3Config,
    SmolLM3ForCausalLM,
)
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding
from transformers.models.phi3.modeling_phi3 import Phi3RotaryEmbedding

from clearhead.models import ClearheadConfig, ClearheadForCausalLM
from clearhead.positions.interchange import INTERLEAVED, from_transformers, to_transformers
from clearhead.positions.rope import Rope
from tests.golden.test_transformers import IDS, SIZES, load, randomise

LLAMA31 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
SHORT = [1.0 + 0.02 * j for j in range(48)]
LONG = [1.0 + 0.9 * j for j in range(48)]


def llama(positions: int = 2048, head_dim: int = 64, **parameters: Any) -> LlamaConfig:
    return LlamaConfig(
        hidden_size=head_dim * 4,
        num_attention_heads=4,
        head_dim=head_dim,
        max_position_embeddings=positions,
        rope_parameters={"rope_theta": 10000.0, **parameters},
    )


# Settings that published models have: PI, dynamic NTK, Qwen and DeepSeek YaRN, Llama 3.1, Phi-3.
CONFIGS: dict[str, PreTrainedConfig] = {
    "default": llama(rope_type="default", rope_theta=500000.0),
    "linear": llama(rope_type="linear", factor=4.0),
    "dynamic": llama(512, rope_type="dynamic", factor=4.0),
    "dynamic_wide": llama(2048, 128, rope_type="dynamic", factor=2.0, rope_theta=1e6),
    "yarn": llama(
        131072, 128, rope_type="yarn", factor=4.0, original_max_position_embeddings=32768, rope_theta=1e6
    ),
    "yarn_wide_ramp": llama(rope_type="yarn", factor=8.0, beta_fast=16.0, beta_slow=0.5, truncate=False),
    "yarn_given": llama(rope_type="yarn", factor=8.0, attention_factor=1.0),
    "yarn_mscale": llama(
        rope_type="yarn", factor=40.0, mscale=1.0, mscale_all_dim=0.5, original_max_position_embeddings=512
    ),
    "llama3": llama(
        131072, 128, rope_type="llama3", rope_theta=500000.0, original_max_position_embeddings=8192, **LLAMA31
    ),
    "longrope": Phi3Config(
        hidden_size=384,
        num_attention_heads=4,
        max_position_embeddings=131072,
        original_max_position_embeddings=4096,
        rope_parameters={"rope_type": "longrope", "short_factor": SHORT, "long_factor": LONG},
    ),
    "longrope_given": Phi3Config(
        hidden_size=384,
        num_attention_heads=4,
        rope_parameters={
            "rope_type": "longrope",
            "short_factor": SHORT,
            "long_factor": LONG,
            "factor": 16.0,
            "attention_factor": 1.3,
        },
    ),
    "qwen2": Qwen2Config(
        hidden_size=256,
        num_attention_heads=4,
        rope_parameters={"rope_type": "yarn", "factor": 4.0, "rope_theta": 1e6},
    ),
    "smollm3": SmolLM3Config(hidden_size=256, num_attention_heads=4),
}
LENGTHS = (8, 512, 513, 4096, 4097, 8192, 100_000)


def width(config: PreTrainedConfig) -> int:
    sizes = config.to_dict()
    return int(sizes.get("head_dim") or sizes["hidden_size"] // sizes["num_attention_heads"])


def theirs(config: PreTrainedConfig, length: int) -> tuple[Tensor, float]:
    kind = config.rope_parameters["rope_type"]
    if kind == "default":
        embedding = LlamaRotaryEmbedding(config)
        return embedding.inv_freq, embedding.attention_scaling
    frequencies, factor = ROPE_INIT_FUNCTIONS[kind](config, torch.device("cpu"), seq_len=length)
    return frequencies, float(factor)


@pytest.mark.parametrize("name", CONFIGS)
def test_frequencies_and_factors_are_transformers(name: str) -> None:
    config = CONFIGS[name]
    parameters = from_transformers(config)
    # What was imported says everything: the model's own maximum is not asked for.
    rope = Rope.from_parameters(width(config), parameters, None)
    for length in LENGTHS:
        expected, factor = theirs(config, length)
        found = rope.scaling.frequencies(torch.tensor([length]))
        assert float((found / expected - 1).abs().max()) < 1e-6
        assert rope.scaling.attention_factor(torch.tensor([length])) == pytest.approx(factor, rel=1e-6)


@pytest.mark.parametrize("name", CONFIGS)
def test_a_configuration_goes_there_and_back(name: str) -> None:
    config = CONFIGS[name]
    positions = config.to_dict()["max_position_embeddings"]
    exported = to_transformers(from_transformers(config), width(config), positions)
    made = llama(positions, width(config), **exported)
    assert from_transformers(made) == from_transformers(config)
    for length in LENGTHS:
        (found, factor), (expected, wanted) = theirs(made, length), theirs(config, length)
        assert torch.equal(found, expected)
        assert factor == wanted


@pytest.mark.parametrize(
    ("name", "embedding"),
    [("yarn", LlamaRotaryEmbedding), ("llama3", LlamaRotaryEmbedding), ("longrope", Phi3RotaryEmbedding)],
)
@pytest.mark.parametrize("tokens", [64, 5000])
def test_cos_and_sin_are_transformers(name: str, embedding: Any, tokens: int) -> None:
    config, where = CONFIGS[name], torch.arange(tokens)[None]
    cos, sin = embedding(config)(torch.zeros(1), where)
    rotation = Rope.from_parameters(width(config), from_transformers(config), None).rotation(where)
    half = width(config) // 2
    # Angles go to `tokens`, and float32 keeps 24 bits of them.
    bound = 2 * tokens * 2**-24 + 1e-6
    assert float((rotation.query_cos[:, 0] - cos[..., :half]).abs().max()) < bound
    assert float((rotation.key_sin[:, 0] - sin[..., :half]).abs().max()) < bound


@pytest.mark.parametrize("factor", [2.0, 4.0])
@pytest.mark.parametrize("trained", [512, 2048])
def test_ntk_is_transformers_default_with_another_base(trained: int, factor: float) -> None:
    parameters = {"rope_type": "ntk", "rope_theta": 10000.0, "factor": factor}
    config = llama(trained, **to_transformers(parameters, 64, trained))
    expected, _ = theirs(config, 8)
    found = Rope.from_parameters(64, parameters, trained).scaling.frequencies()
    assert float((found / expected - 1).abs().max()) < 1e-6
    plain = [10000.0 ** (-2 * j / 64) for j in range(32)]
    assert float(found[0]) == 1.0
    assert float(found[-1]) == pytest.approx(plain[-1] / factor, rel=1e-6)


@pytest.mark.parametrize(
    "scaling",
    [
        {"rope_type": "linear", "factor": 2.0},
        {"rope_type": "dynamic", "factor": 4.0},
        {"rope_type": "yarn", "factor": 8.0, "original_max_position_embeddings": 8},
        {"rope_type": "llama3", "original_max_position_embeddings": 8, **LLAMA31},
    ],
    ids=lambda scaling: scaling["rope_type"],
)
@torch.no_grad()
def test_models_are_llama_past_the_trained_length(scaling: dict[str, Any]) -> None:
    sizes = SIZES | {
        "max_position_embeddings": 8,
        "head_dim": 8,
        "num_attention_heads": 4,
        "rope_parameters": {"rope_theta": 100.0, **scaling},
    }
    other = LlamaForCausalLM(LlamaConfig(num_key_value_heads=2, **sizes)).eval()
    randomise(other)
    imported = from_transformers(other.config)
    ours = ClearheadForCausalLM(
        ClearheadConfig(num_key_value_heads=2, **(sizes | {"rope_parameters": imported}))
    )
    load(ours, other.state_dict())
    expected = other(IDS).logits
    assert float((ours(IDS).logits - expected).abs().max()) < 2e-5
    plain = ClearheadForCausalLM(
        ClearheadConfig(num_key_value_heads=2, **(sizes | {"rope_parameters": {"rope_theta": 100.0}}))
    )
    assert float((load(plain, other.state_dict())(IDS).logits - expected).abs().max()) > 1e-2


@torch.no_grad()
def test_every_fourth_layer_without_positions_is_smollm3() -> None:
    sizes = SIZES | {"num_hidden_layers": 5, "head_dim": 8, "num_attention_heads": 4}
    config = SmolLM3Config(num_key_value_heads=2, use_sliding_window=False, pad_token_id=0, **sizes)
    assert config.no_rope_layers == [1, 1, 1, 0, 1]
    other = SmolLM3ForCausalLM(config).eval()
    randomise(other)
    ours = ClearheadForCausalLM(
        ClearheadConfig(num_key_value_heads=2, nope_interval=config.no_rope_layer_interval, **sizes)
    )
    load(ours, other.state_dict())
    assert float((ours(IDS).logits - other(IDS).logits).abs().max()) < 2e-5


def interleaves(model_type: str) -> bool:
    """Whether its code turns components 0 and 1 together: the first one's image then touches component 1."""
    name = model_type.removesuffix("_text")
    module = importlib.import_module(f"transformers.models.{name}.modeling_{name}")
    if model_type == "llama4_text":
        x = torch.zeros(1, 1, 1, 8)
        x[..., 0] = 1.0
        quarter = torch.polar(torch.ones(1, 1, 4), torch.full((1, 1, 4), torch.pi / 2))
        turned, _ = module.apply_rotary_emb(x, x, quarter)
        return bool(turned[0, 0, 0, 1].abs() > 0.5)
    turned = module.rotate_half(torch.eye(8)[:1])
    return bool(turned[0, 1] != 0)


def test_model_types_that_interleave_are_known() -> None:
    assert all(interleaves(model_type) for model_type in INTERLEAVED)
    assert not any(interleaves(model_type) for model_type in ("llama", "qwen2", "smollm3", "phi3", "mistral"))
    assert from_transformers(CohereConfig())["layout"] == "interleaved"


@pytest.mark.parametrize(
    ("message", "action"),
    [
        (
            "partial_rotary_factor must be 1",
            lambda: from_transformers(llama(rope_type="default", partial_rotary_factor=0.5)),
        ),
        ("give one of them as layer_type", lambda: from_transformers(Gemma3TextConfig())),
        ("no rope_parameters by layer_type", lambda: from_transformers(llama(), "full_attention")),
        ("has no rope_parameters", lambda: from_transformers(PreTrainedConfig())),
        (
            "not one of default, linear",
            lambda: from_transformers(llama(rope_type="proportional", factor=2.0)),
        ),
        ("cannot say layout", lambda: to_transformers({"layout": "interleaved"}, 64, 512)),
        (
            "max_position_embeddings=512, not 2048",
            lambda: to_transformers(
                {"rope_type": "dynamic", "factor": 2.0, "original_max_position_embeddings": 512}, 64, 2048
            ),
        ),
    ],
)
def test_what_cannot_be_said_is_an_error(message: str, action: Any) -> None:
    with pytest.raises(ValueError) as caught:
        action()
    assert message in str(caught.value)


def test_parameters_by_kind_of_layer() -> None:
    config = Gemma3TextConfig(head_dim=64)
    found = from_transformers(config, "full_attention")
    assert found["rope_theta"] == config.rope_parameters["full_attention"]["rope_theta"]


def test_deepseek_s_magnitude_is_imported() -> None:
    """mscale equal to mscale_all_dim leaves cos and sin alone; the model scales its logits itself."""
    parameters = {
        "rope_type": "yarn",
        "rope_theta": 10000.0,
        "factor": 40.0,
        "mscale": 1.0,
        "mscale_all_dim": 1.0,
        "original_max_position_embeddings": 4096,
    }
    config = DeepseekV3Config(head_dim=64, rope_parameters=parameters, max_position_embeddings=163840)
    rope = Rope.from_parameters(64, from_transformers(config), None)
    assert rope.scaling.attention_factor() == theirs(config, 8)[1] == 1.0

"""The layouts of released research code, against the float64 oracles."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from clearhead.convert.run import convert
from tests.convert.support import state, tensors
from tests.oracles.layers import LayerSpec
from tests.oracles.models import decoder

HIDDEN, INNER, WIDTH, VOCABULARY, LAYERS = 24, 40, 4, 53, 2
IDS = torch.randint(0, VOCABULARY, (2, 9), generator=torch.Generator().manual_seed(3))
LAMBDAS = ("lambda_q1", "lambda_k1", "lambda_q2", "lambda_k2")


def random_state(shapes: dict[str, tuple[int, ...]], head: bool = True) -> dict[str, Tensor]:
    """A decoder with LLaMA's names around attention layers with tensors of these shapes."""
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int, around: float = 0.0) -> Tensor:
        return around + 0.3 * torch.randn(shape, generator=generator)

    found = {
        "model.embed_tokens.weight": random(VOCABULARY, HIDDEN),
        "model.norm.weight": random(HIDDEN, around=1),
    }
    if head:
        found["lm_head.weight"] = random(VOCABULARY, HIDDEN)
    for layer in range(LAYERS):
        prefix = f"model.layers.{layer}"
        for name, shape in shapes.items():
            found[f"{prefix}.self_attn.{name}"] = random(*shape, around=float("subln" in name))
        found[f"{prefix}.input_layernorm.weight"] = random(HIDDEN, around=1)
        found[f"{prefix}.post_attention_layernorm.weight"] = random(HIDDEN, around=1)
        found[f"{prefix}.mlp.gate_proj.weight"] = random(INNER, HIDDEN)
        found[f"{prefix}.mlp.up_proj.weight"] = random(INNER, HIDDEN)
        found[f"{prefix}.mlp.down_proj.weight"] = random(HIDDEN, INNER)
    return found


def expected(weights: dict[str, Tensor], spec: LayerSpec, names: dict[str, str], interleaved: bool) -> Tensor:
    """The oracle's logits; names are those of a layer's tensors by the oracle's."""
    wide = {name: value.double() for name, value in weights.items()}
    # The oracle pairs components (j, j + d / 2): row by row, where does each of them come from?
    order = [s + 2 * j for s in (0, 1) for j in range(WIDTH // 2)]
    blocks = []
    for layer in range(LAYERS):
        prefix = f"model.layers.{layer}"
        block = {ours: wide[f"{prefix}.self_attn.{theirs}"] for ours, theirs in names.items()}
        for part in ("q_proj", "k_proj") if interleaved else ():
            heads = block[part].shape[0] // WIDTH
            block[part] = block[part][[head * WIDTH + row for head in range(heads) for row in order]]
        block |= {
            "attention_norm": wide[f"{prefix}.input_layernorm.weight"],
            "mlp_norm": wide[f"{prefix}.post_attention_layernorm.weight"],
            "gate": wide[f"{prefix}.mlp.gate_proj.weight"],
            "up": wide[f"{prefix}.mlp.up_proj.weight"],
            "down": wide[f"{prefix}.mlp.down_proj.weight"],
        }
        blocks.append(block)
    embedding = wide["model.embed_tokens.weight"]
    head = wide.get("lm_head.weight", embedding)
    return decoder(spec, embedding, blocks, wide["model.norm.weight"], head, IDS)[0]


def logits(folder: Path) -> Tensor:
    with torch.no_grad():
        found: Tensor = AutoModelForCausalLM.from_pretrained(folder).double().eval()(IDS).logits
    return found


@pytest.mark.parametrize("kv_heads", [8, 4])
def test_microsoft_v1(kv_heads: int, tmp_path: Path) -> None:
    heads = 8
    shapes = {
        "q_proj.weight": (heads * WIDTH, HIDDEN),
        "k_proj.weight": (kv_heads * WIDTH, HIDDEN),
        "v_proj.weight": (kv_heads * WIDTH, HIDDEN),
        "out_proj.weight": (HIDDEN, heads * WIDTH),
        "subln.weight": (2 * WIDTH,),
        **dict.fromkeys(LAMBDAS, (WIDTH,)),
    }
    weights = random_state(shapes)
    agreement = convert(str(state(tmp_path / "theirs", weights)), tmp_path / "ours")
    assert agreement.difference <= 1e-10 and agreement.dtype == torch.float64
    names = {name: f"{name}.weight" for name in ("q_proj", "k_proj", "v_proj")}
    names |= {"o_proj": "out_proj.weight", "head_norm": "subln.weight", **{name: name for name in LAMBDAS}}
    oracle = expected(weights, LayerSpec("differential", heads, kv_heads, WIDTH), names, interleaved=True)
    assert float((logits(tmp_path / "ours") - oracle).abs().max()) <= 1e-10
    # On to transformers, by way of this library.
    convert(str(tmp_path / "ours"), tmp_path / "diff_llama", to="diff_llama")
    with torch.no_grad():
        theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "diff_llama").eval()(IDS).logits
    assert float((theirs - oracle).abs().max()) <= 2e-5


@pytest.mark.parametrize("kv_heads", [4, 1])
def test_microsoft_v2(kv_heads: int, tmp_path: Path) -> None:
    heads = 4
    shapes = {
        "q_proj.weight": (2 * heads * WIDTH, HIDDEN),
        "k_proj.weight": (kv_heads * WIDTH, HIDDEN),
        "v_proj.weight": (kv_heads * WIDTH, HIDDEN),
        "o_proj.weight": (HIDDEN, heads * WIDTH),
        "lambda_proj.weight": (heads, HIDDEN),
    }
    # Without an output matrix the embedding is tied; the base of the angles comes from the configuration.
    weights = random_state(shapes, head=False)
    folder = state(tmp_path / "theirs", weights, {"rope_theta": 500.0, "rms_norm_eps": 1e-3})
    assert convert(str(folder / "model.safetensors"), tmp_path / "ours").difference <= 1e-10
    names = {name: f"{name}.weight" for name in ("q_proj", "k_proj", "v_proj", "o_proj", "lambda_proj")}
    spec = LayerSpec("differential_v2", heads, kv_heads, WIDTH, base=500.0, eps=1e-3)
    oracle = expected(weights, spec, names, interleaved=True)
    assert float((logits(tmp_path / "ours") - oracle).abs().max()) <= 1e-10


@pytest.mark.parametrize("kv_heads", [6, 2])
def test_released_coca(kv_heads: int, tmp_path: Path) -> None:
    shapes = {
        "q_proj.weight": (24, HIDDEN),
        "t_proj.weight": (kv_heads * WIDTH, HIDDEN),
        "v_proj.weight": (kv_heads * WIDTH, HIDDEN),
        "o_proj.weight": (HIDDEN, 24),
    }
    weights = random_state(shapes)
    config = {
        "architectures": ["LLaMAForCausalLM"], "model_type": "llama", "hidden_act": "silu", "hidden_size": HIDDEN,
        "intermediate_size": INNER, "max_sequence_length": 64, "num_attention_heads": 6,
        "num_key_value_heads": kv_heads, "num_hidden_layers": LAYERS, "rms_norm_eps": 1e-6, "vocab_size": VOCABULARY,
        "rope_scaling": {"type": "dynamic", "factor": 4.0},
    }  # fmt: skip
    assert convert(str(state(tmp_path / "theirs", weights, config)), tmp_path / "ours").difference <= 1e-10
    names = {name: f"{name}.weight" for name in ("q_proj", "v_proj", "o_proj")} | {"k_proj": "t_proj.weight"}
    spec = LayerSpec("collinear", 6, kv_heads, WIDTH, eps=1e-6, options={"mode": "slack"})
    oracle = expected(weights, spec, names, interleaved=False)
    assert float((logits(tmp_path / "ours") - oracle).abs().max()) <= 1e-10
    made = AutoModelForCausalLM.from_pretrained(tmp_path / "ours").config
    assert made.attention_options == {"mode": "slack"} and made.max_position_embeddings == 64
    assert made.rope_parameters["original_max_position_embeddings"] == 64
    name = "model.layers.0.self_attn.k_proj.weight"
    assert torch.equal(tensors(tmp_path / "ours")[name], weights[name.replace("k_proj", "t_proj")])

"""Bad input gets one sentence that names what to change."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub.errors import StrictDataclassError
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from clearhead.functional import attention, differential_attention
from clearhead.models import ClearheadConfig, ClearheadForCausalLM
from clearhead.nn import (
    Attention,
    CollinearAttention,
    DifferentialAttention,
    DifferentialAttentionV2,
    DifferentialCollinearAttention,
    DifferentialCollinearAttentionV2,
)
from tests.contracts.model_cases import make_config, make_model, tokens


def zeros(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.zeros(shape, dtype=dtype)


Q, K, V = zeros(2, 4, 5, 8), zeros(2, 2, 5, 8), zeros(2, 2, 5, 8)

CALLS: list[tuple[str, Callable[[], Any]]] = [
    ("q must have 4 dimensions", lambda: attention(zeros(2, 4, 8), K, V)),
    ("k is empty", lambda: attention(Q, zeros(2, 2, 0, 8), V)),
    ("q must be floating point", lambda: attention(Q.long(), K, V)),
    ("v is torch.float64", lambda: attention(Q, K, V.double())),
    ("k has batch size 3", lambda: attention(Q, zeros(3, 2, 5, 8), V)),
    ("q is 8 wide and k 6", lambda: attention(Q, zeros(2, 2, 5, 6), V)),
    ("k has 5 tokens and v 6", lambda: attention(Q, K, zeros(2, 2, 6, 8))),
    ("v has 3 key-value heads", lambda: attention(Q, zeros(2, 3, 5, 8), zeros(2, 3, 5, 8))),
    ("k has 2 heads and v 4", lambda: attention(Q, K, zeros(2, 4, 5, 8))),
    ("even number of heads", lambda: differential_attention(zeros(2, 3, 5, 8), K, V, 0.5)),
    ("lam has shape", lambda: differential_attention(Q, K, V, zeros(2, 4, 5, 1))),
    ("at least as many keys as queries", lambda: attention(zeros(2, 4, 6, 8), K, V, is_causal=True)),
    ("attn_mask", lambda: attention(Q, K, V, attn_mask=torch.ones(5, 4, dtype=torch.bool))),
    ("attn_mask", lambda: attention(Q, K, V, attn_mask=torch.ones(3, 1, 5, 5, dtype=torch.bool))),
    ("attn_mask", lambda: attention(Q, K, V, attn_mask=torch.ones(2, 3, 5, 5, dtype=torch.bool))),
    ("attn_mask", lambda: attention(Q, K, V, attn_mask=torch.ones(2, 5, 5, dtype=torch.bool))),
    ("attn_mask must be bool", lambda: attention(Q, K, V, attn_mask=torch.ones(5, 5, dtype=torch.long))),
    ("key_padding_mask has shape", lambda: attention(Q, K, V, key_padding_mask=torch.ones(2, 4).bool())),
    ("key_padding_mask must be bool", lambda: attention(Q, K, V, key_padding_mask=torch.ones(2, 5))),
    ("documents has shape", lambda: attention(Q, K, V, documents=torch.ones(3, 5).long())),
    ("documents must hold integers", lambda: attention(Q, K, V, documents=torch.ones(2, 5))),
    (
        "documents with 5 queries and 3 keys",
        lambda: attention(Q, K[:, :, :3], V[:, :, :3], documents=torch.ones(2, 3).long()),
    ),
    ("window must be at least 1, not 0", lambda: attention(Q, K, V, window=0)),
    ("window must be an integer, not 2.5", lambda: attention(Q, K, V, window=2.5)),  # type: ignore[arg-type]
    ("window must be an integer, not True", lambda: attention(Q, K, V, window=True)),
    ("window with 6 queries and 5 keys", lambda: attention(zeros(2, 4, 6, 8), K, V, window=3)),
    ("window must be at least 1", lambda: Attention(32, 4)(zeros(2, 5, 32), window=-1)),
    ("did you mean 'sdpa'", lambda: attention(Q, K, V, backend="spda")),
    ("float64", lambda: attention(Q.double(), K.double(), V.double(), backend="flex")),
    ("num_kv_heads must be even", lambda: DifferentialAttention(32, 4, num_kv_heads=1)),
    ("num_heads must be even", lambda: DifferentialAttention(24, 3)),
    ("num_heads (4) must be a multiple of num_kv_heads (3)", lambda: Attention(32, 4, num_kv_heads=3)),
    ("embed_dim (30) is not a multiple of num_heads (4)", lambda: Attention(30, 4)),
    ("embed_dim", lambda: Attention(0, 4)),
    ("num_heads", lambda: Attention(32, 0)),
    ("layer_idx", lambda: DifferentialAttention(32, 4, layer_idx=-1)),
    ("head_dim must be even", lambda: CollinearAttention(12, 4)),
    ("mode must be one of", lambda: CollinearAttention(32, 4, mode="loose")),  # type: ignore[arg-type]
    ("activation must be one of", lambda: CollinearAttention(32, 4, activation="gelu")),  # type: ignore[arg-type]
    ("lambda_init", lambda: DifferentialAttention(32, 4, lambda_init=1.5)),
    ("lambda_init", lambda: DifferentialAttention(32, 4, lambda_init="dept")),  # type: ignore[arg-type]
    ("did you mean 'rope'", lambda: Attention(32, 4, position="ropes")),
    ("did you mean 'eager'", lambda: Attention(32, 4, backend="eeger")),
    ("rope_theta", lambda: Attention(32, 4, rope_theta=0.0)),
    ("x has shape", lambda: Attention(32, 4)(zeros(2, 5, 16))),
    ("x has shape", lambda: Attention(32, 4)(zeros(5, 32))),
    ("no tokens", lambda: Attention(32, 4)(zeros(2, 0, 32))),
    ("context has shape", lambda: Attention(32, 4)(zeros(2, 5, 32), zeros(2, 5, 16))),
    ("context has batch size 3", lambda: Attention(32, 4)(zeros(2, 5, 32), zeros(3, 5, 32))),
    (
        "key_padding_mask has shape",
        lambda: Attention(32, 4)(zeros(2, 5, 32), key_padding_mask=torch.ones(2, 4).bool()),
    ),
    (
        "key_padding_mask must be bool",
        lambda: Attention(32, 4)(zeros(2, 5, 32), key_padding_mask=torch.ones(2, 5)),
    ),
    ("documents has shape", lambda: Attention(32, 4)(zeros(2, 5, 32), documents=torch.ones(2, 4).long())),
    ("documents must hold integers", lambda: Attention(32, 4)(zeros(2, 5, 32), documents=torch.ones(2, 5))),
    ("positions", lambda: Attention(32, 4)(zeros(2, 5, 32), positions=torch.arange(4)[None])),
    ("positions", lambda: Attention(32, 4)(zeros(2, 5, 32), positions=torch.arange(10).view(2, 5).bool())),
    ("unknown variant", lambda: make_config("softmax", attention="softmaxx")),
    ("did you mean 'differential_v2'", lambda: make_config("softmax", attention="diferential_v2")),
    ("unknown position", lambda: make_config("softmax", position="ropes")),
    (
        "no option 'modes': did you mean 'mode'",
        lambda: make_config("collinear", attention_options={"modes": "exact"}),
    ),
    ("rotary", lambda: make_config("collinear", position="nope")),
    ("rotary", lambda: make_config("differential_collinear", position="nope")),
    ("rotary", lambda: make_config("differential_v2_collinear", position="nope")),
    (
        "mode must be one of exact, slack, strict, not 'loose'",
        lambda: make_config("differential_v2_collinear", attention_options={"mode": "loose"}),
    ),
    (
        "activation must be one of relu, softplus, not 'gelu'",
        lambda: DifferentialCollinearAttention(32, 4, activation="gelu"),  # type: ignore[arg-type]
    ),
    ("num_kv_heads must be even, not 1", lambda: DifferentialCollinearAttention(32, 4, num_kv_heads=1)),
    ("head_dim must be even, not 3", lambda: DifferentialCollinearAttentionV2(12, 4)),
    (
        "no option 'lambda_init'",
        lambda: make_config("differential_v2_collinear", attention_options={"lambda_init": 0.5}),
    ),
    ("hidden_size", lambda: make_config("softmax", head_dim=None, hidden_size=30)),
    ("num_key_value_heads", lambda: make_config("softmax", num_key_value_heads=3)),
    ("rope_type", lambda: make_config("softmax", rope_parameters={"rope_type": "yarnn"})),
    ("input_ids and inputs_embeds", lambda: make_model("softmax")()),
    ("no tokens", lambda: make_model("softmax")(tokens(2, 0))),
    ("attention_mask", lambda: make_model("softmax")(tokens(2, 4), attention_mask=torch.ones(2, 4, 4))),
    ("attention_mask", lambda: make_model("softmax")(tokens(2, 4), attention_mask=torch.ones(3, 4))),
    ("attention_mask", lambda: make_model("softmax")(tokens(2, 4), attention_mask=torch.ones(2, 5))),
    ("position_ids", lambda: make_model("softmax")(tokens(2, 4), position_ids=torch.arange(5)[None])),
]


@pytest.mark.parametrize(
    ("words", "call"), CALLS, ids=[f"{i}-{words[:30]}" for i, (words, _) in enumerate(CALLS)]
)
def test_the_message_names_what_to_change(words: str, call: Callable[[], Any]) -> None:
    # Hugging Face wraps what a configuration raises in an error of its own.
    with pytest.raises((ValueError, StrictDataclassError)) as caught:
        call()
    assert words in str(caught.value)


@pytest.mark.parametrize(
    "layer",
    [
        Attention,
        DifferentialAttention,
        DifferentialAttentionV2,
        CollinearAttention,
        DifferentialCollinearAttention,
        DifferentialCollinearAttentionV2,
    ],
)
def test_not_a_number_stays_in_its_sequence(layer: type[Attention]) -> None:
    torch.manual_seed(0)
    module, x = layer(16, 4), torch.randn(2, 6, 16)
    clean = module(x, is_causal=True)
    x[0, 4] = float("nan")
    found = module(x, is_causal=True)
    assert torch.equal(found[1], clean[1])
    assert bool(found[0, 4:].isnan().all())


def test_a_foreign_checkpoint_is_refused(tmp_path: Path) -> None:
    sizes = {"vocab_size": 41, "hidden_size": 24, "intermediate_size": 32, "num_hidden_layers": 1}
    LlamaForCausalLM(LlamaConfig(num_attention_heads=4, **sizes)).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="llama"):
        ClearheadForCausalLM.from_pretrained(tmp_path)


def test_a_checkpoint_of_another_variant_is_refused(tmp_path: Path) -> None:
    make_model("softmax").save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"attention": "differential"}))
    with pytest.raises(Exception, match=r"has no model\.layers\.0\.self_attn\.variant"):
        ClearheadForCausalLM.from_pretrained(tmp_path)


def test_a_cut_off_checkpoint_is_refused(tmp_path: Path) -> None:
    make_model("softmax").save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    with pytest.raises(Exception, match=r"(?i)safetensor|incomplete|header|buffer"):
        ClearheadForCausalLM.from_pretrained(tmp_path)


def test_a_broken_configuration_is_refused_by_name(tmp_path: Path) -> None:
    make_model("softmax").save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"attention": "sofmax"}))
    with pytest.raises(Exception, match="did you mean 'softmax'"):
        ClearheadForCausalLM.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_hidden_layers": 0}, "num_hidden_layers must be at least 1, not 0"),
        ({"intermediate_size": 0}, "intermediate_size must be at least 1"),
        ({"vocab_size": -5}, "vocab_size must be at least 1"),
        ({"rms_norm_eps": -1e-5}, "rms_norm_eps must be positive"),
    ],
)
def test_sizes_that_make_no_model_are_refused_by_name(changes: dict[str, float], message: str) -> None:
    with pytest.raises(Exception, match=message):
        ClearheadConfig(**{"hidden_size": 64, "num_attention_heads": 4, **changes})

"""The same weights give the same logits as the implementations that come with transformers."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import DiffLlamaConfig, DiffLlamaForCausalLM, LlamaConfig, LlamaForCausalLM

from clearhead.models import ClearheadConfig, ClearheadForCausalLM
from clearhead.variants.differential import depth_lambda_init

SIZES: dict[str, Any] = {
    "vocab_size": 53,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 8,
    "head_dim": 4,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-5,
    "initializer_range": 0.2,
    "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
    "tie_word_embeddings": False,
    "bos_token_id": None,
    "eos_token_id": None,
}
IDS = torch.randint(0, 53, (2, 11), generator=torch.Generator().manual_seed(0))
PADDED = torch.tensor([[0, 0, 0] + [1] * 8, [1] * 11])


def randomise(model: nn.Module) -> None:
    """Weights of some size everywhere, so that no term is hidden by its initial value."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(1 + 0.3 * noise if "norm" in name else 0.25 * noise)


def from_diff_llama(state: dict[str, Tensor], heads: int, kv_heads: int, width: int) -> dict[str, Tensor]:
    """DiffLlama's weights in this library's order.

    Of the twin's `heads` heads, DiffLlama takes head i as the signal and head i + heads / 2 as the noise of
    differential head i; here they are heads 2i and 2i + 1. Its value of head i is value heads i and i + kv_heads / 2
    side by side; here it is one block. Its head norm has no weight.
    """

    def interleaved(rows: Tensor, count: int) -> Tensor:
        halves = rows.view(2, count // 2, width, -1)
        return halves.transpose(0, 1).reshape(count * width, -1)

    found = {}
    for name, value in state.items():
        parts = name.split(".")
        if parts[-2] == "q_proj":
            value = interleaved(value, heads)
        elif parts[-2] in ("k_proj", "v_proj"):
            value = interleaved(value, kv_heads)
        elif parts[-1].startswith("lambda_"):
            name = ".".join([*parts[:-1], "variant", parts[-1]])
        found[name] = value
    layers = {name.split(".")[2] for name in state if name.startswith("model.layers.")}
    for layer in layers:
        found[f"model.layers.{layer}.self_attn.variant.head_norm.weight"] = torch.ones(2 * width)
    return found


def load(model: ClearheadForCausalLM, state: dict[str, Tensor]) -> ClearheadForCausalLM:
    model.load_state_dict(state, strict=True)
    return model.eval()


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@pytest.mark.parametrize("kv_heads", [8, 4, 2])
@torch.no_grad()
def test_differential_is_diff_llama(kv_heads: int, implementation: str) -> None:
    theirs = DiffLlamaForCausalLM(DiffLlamaConfig(num_key_value_heads=kv_heads, **SIZES)).eval()
    randomise(theirs)
    ours = ClearheadForCausalLM(
        ClearheadConfig(attention="differential", num_key_value_heads=kv_heads, **SIZES)
    )
    load(ours, from_diff_llama(theirs.state_dict(), 8, kv_heads, 4))
    for model in (theirs, ours):
        model.set_attn_implementation(implementation)
    for arguments in ({}, {"attention_mask": PADDED}):
        real = PADDED[..., None] if arguments else 1
        expected = theirs(IDS, **arguments).logits * real
        # Logits go to 6; transformers' own eager and sdpa differ by 8e-6 here.
        assert float((ours(IDS, **arguments).logits * real - expected).abs().max()) < 2e-5


@pytest.mark.parametrize("kv_heads", [8, 2, 1])
@torch.no_grad()
def test_softmax_is_llama(kv_heads: int) -> None:
    theirs = LlamaForCausalLM(LlamaConfig(num_key_value_heads=kv_heads, **SIZES)).eval()
    randomise(theirs)
    ours = ClearheadForCausalLM(ClearheadConfig(attention="softmax", num_key_value_heads=kv_heads, **SIZES))
    load(ours, theirs.state_dict())
    assert float((ours(IDS).logits - theirs(IDS).logits).abs().max()) < 1e-5
    arguments = {"max_new_tokens": 8, "do_sample": False, "attention_mask": PADDED, "pad_token_id": 0}
    assert torch.equal(ours.generate(IDS, **arguments), theirs.generate(IDS, **arguments))


def test_lambda_init_table() -> None:
    """λ_init by layer as the paper's formula gives it, layers counted from 0."""
    table = {0: 0.2000, 1: 0.3555, 2: 0.4707, 3: 0.5561, 4: 0.6193, 5: 0.6661, 6: 0.7008, 8: 0.7456}
    table |= {12: 0.7836, 16: 0.7951, 23: 0.7994, 27: 0.7998}
    for layer, value in table.items():
        assert depth_lambda_init(layer) == pytest.approx(value, abs=5.1e-5)


def test_rope_frequencies_are_llama_s() -> None:
    config = LlamaConfig(**SIZES)
    theirs = LlamaForCausalLM(config).model.rotary_emb.inv_freq
    (ours,) = ClearheadForCausalLM(ClearheadConfig(**SIZES)).model.positions["rope"].inv_freq
    assert torch.equal(ours, theirs)

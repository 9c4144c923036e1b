"""Every case can be built, and its numbers follow from its sizes."""

import pytest
import torch
from torch import nn
from transformers import DiffLlamaConfig
from transformers.models.diffllama.modeling_diffllama import DiffLlamaAttention

from clearhead.bench.cases import CASES, AttentionCase, GenerateCase, TrainCase, select
from clearhead.bench.generating import ARMS as GENERATE_ARMS
from clearhead.bench.peers import PEERS, PeerInputs, Unavailable, build, make_inputs, problem
from clearhead.bench.training import ARMS, step_flops
from clearhead.bench.training import build as build_model
from tests.bench.tiny import attention, train

ATTENTION = [case for verb in ("attention", "decode") for case in CASES[verb]]


@pytest.mark.parametrize("case", ATTENTION, ids=lambda case: case.name)
def test_attention_cases_construct(case: AttentionCase) -> None:
    made = []
    for name in case.peers:
        try:
            made.append(build(name, case))
        except Unavailable as reason:
            assert str(reason)
    assert {peer.formula for peer in made} <= {"variant", "softmax"}
    assert problem(case).keys == case.keys
    assert problem(case).key_width == case.width
    inputs = make_inputs(case.of_length(8))
    read = (inputs.k.nbytes + inputs.v.nbytes) * case.keys / 8 * case.layers
    assert read == case.key_value_bytes


def test_names_are_unique_and_peers_known() -> None:
    for cases in CASES.values():
        assert len({case.name for case in cases}) == len(cases)
        for case in cases:
            known = {TrainCase: ARMS, GenerateCase: GENERATE_ARMS}.get(type(case), PEERS)
            assert set(case.peers) <= set(known)


@pytest.mark.parametrize("case", CASES["train"], ids=lambda case: case.name)
def test_training_cases_construct(case: TrainCase) -> None:
    for name in case.peers:
        small = train(peers=case.peers)
        try:
            model = build_model(ARMS[name], small)
        except Unavailable as reason:
            assert str(reason)
        else:
            assert step_flops(ARMS[name], model, small) > 0


def test_selection() -> None:
    assert len(select("decode", ["*bfloat16"])) == 2
    assert select("train", []) == list(CASES["train"])
    with pytest.raises(
        ValueError, match=r"no attention case matches 'v1-1042-causal-both-float32'.*'v1-1024-"
    ):
        select("attention", ["v1-*", "v1-1042-causal-both-float32"])


def test_needed_flops() -> None:
    case = attention("v1-1024-full-forward-float32", heads=3, width=8, keys=10)
    # Two products of 8 for the scores and one of 16 with the value, for every pair and head; a multiply-add is two.
    assert case.flops("variant") == 2 * 3 * 100 * (8 + 8 + 16)
    # The twin's six heads: 8 for the scores, 8 with the value.
    assert case.flops("softmax") == 2 * 6 * 100 * (8 + 8)
    both = attention("v1-1024-causal-both-float32", heads=3, width=8, keys=10)
    assert both.flops("variant") == 2 * 3 * 50 * (32 + 3 * 16 + 2 * 16)
    assert both.flops("softmax") == both.flops("variant")


@pytest.mark.parametrize("groups", [4, 2])
def test_the_diff_llama_peer_is_diff_llama(groups: int) -> None:
    """Between projections and norm, and with a rotation by nothing, it is the layer of transformers."""
    heads, width, tokens = 4, 8, 12
    config = DiffLlamaConfig(
        hidden_size=64, num_attention_heads=2 * heads, num_key_value_heads=2 * groups, head_dim=width
    )
    config._attn_implementation = "sdpa"
    torch.manual_seed(0)
    layer = DiffLlamaAttention(config, layer_idx=1)
    x = torch.randn(2, tokens, 64)
    rotation = torch.ones(1, tokens, width), torch.zeros(1, tokens, width)
    expected, _ = layer(x, rotation)

    def projected(linear: nn.Module) -> torch.Tensor:
        return linear(x).view(2, tokens, -1, width).transpose(1, 2)

    gate = (layer.lambda_q1 @ layer.lambda_k1).exp() - (layer.lambda_q2 @ layer.lambda_k2).exp()
    inputs = PeerInputs(
        projected(layer.q_proj),
        projected(layer.k_proj),
        projected(layer.v_proj),
        gate + layer.lambda_init,
    )
    case = attention(
        "v1-1024-causal-both-float32", heads=heads, groups=groups, width=width, keys=tokens, batch=2
    )
    found = build("DiffLlama", case).run(inputs)
    normed = layer.groupnorm(found) * (1 - layer.lambda_init)
    torch.testing.assert_close(layer.o_proj(normed.reshape(2, tokens, -1)), expected)

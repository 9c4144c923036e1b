"""Where `block_sparse` is said, what comes of it there, and who refuses it."""

from typing import Any

import pytest
import torch
from torch import Tensor

from clearhead.functional import BlockSparse, attention, differential_attention
from clearhead.models import ClearheadConfig, ClearheadForCausalLM, QuantisedCache
from clearhead.nn import Attention

LENGTH = 320
VARIANTS = ("softmax", "differential", "differential_v2", "collinear", "differential_collinear")


def config(attention: str = "differential", **more: Any) -> ClearheadConfig:
    return ClearheadConfig(
        vocab_size=50,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        intermediate_size=64,
        attention=attention,
        **more,
    )


def model(*arguments: Any, **more: Any) -> ClearheadForCausalLM:
    torch.manual_seed(0)
    made = ClearheadForCausalLM(config(*arguments, **more)).eval()
    with torch.no_grad():
        # Queries that look for something: at its start a model attends to everything alike.
        for layer in made.model.layers:
            layer.self_attn.q_proj.weight.mul_(60.0)
    return made


def logits(made: ClearheadForCausalLM, ids: Tensor, **more: Any) -> Tensor:
    with torch.no_grad():
        return made(ids, **more).logits


IDS = torch.randint(3, 50, (2, LENGTH), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize(
    ("name", "compact"),
    (*((name, False) for name in VARIANTS), ("collinear", True), ("differential_collinear", True)),
)
def test_a_model_leaves_out_blocks_of_its_prompt(name: str, compact: bool) -> None:
    made = model(name, compact_cache=compact)
    whole = logits(made, IDS)
    made.config.block_sparse = {"left_out": 0.5, "least": 64}
    some = logits(made, IDS)
    assert not torch.equal(some, whole)
    made.config.block_sparse = {"left_out": 1e-5, "least": 64}
    torch.testing.assert_close(logits(made, IDS), whole, atol=1e-3, rtol=1e-3)
    made.config.block_sparse = {"left_out": 0.5, "least": LENGTH + 1}
    assert torch.equal(logits(made, IDS), whole)


def test_it_is_a_key_of_the_configuration_and_saved(tmp_path: Any) -> None:
    made = model(block_sparse={"left_out": 0.02, "estimate": "moments"})
    made.save_pretrained(tmp_path)
    assert ClearheadForCausalLM.from_pretrained(tmp_path).config.block_sparse == made.config.block_sparse
    off = ClearheadForCausalLM.from_pretrained(tmp_path, block_sparse=None)
    assert off.config.block_sparse is None


def test_decoding_and_chunks_behind_a_cache() -> None:
    """A prompt in two chunks, of which one is long enough, then tokens one by one."""
    made = model("differential", block_sparse={"left_out": 1e-5, "least": 128})
    with torch.no_grad():
        begun = made(IDS[:, :100], use_cache=True)
        chunk = made(IDS[:, 100:], past_key_values=begun.past_key_values)
    made.config.block_sparse = None
    torch.testing.assert_close(chunk.logits, logits(made, IDS)[:, 100:], atol=2e-3, rtol=2e-3)
    greedy = made.generate(IDS[:, :200], max_new_tokens=8, do_sample=False)
    made.config.block_sparse = {"left_out": 1e-5, "least": 128}
    assert torch.equal(made.generate(IDS[:, :200], max_new_tokens=8, do_sample=False), greedy)


@pytest.mark.parametrize("name", VARIANTS)
def test_a_layer_takes_it(name: str) -> None:
    torch.manual_seed(0)
    whole = Attention(32, 4, variant=name, num_kv_heads=2)
    some = Attention(32, 4, variant=name, num_kv_heads=2, block_sparse=BlockSparse(0.7, least=64))
    some.load_state_dict(whole.state_dict())
    x = torch.randn(1, LENGTH, 32)
    with torch.no_grad():
        a, b = whole(x, is_causal=True), some(x, is_causal=True)
    assert not torch.equal(a, b)
    assert torch.equal(whole(x[:, :60], is_causal=True), some(x[:, :60], is_causal=True))


def qkv(heads: int = 2) -> tuple[Tensor, Tensor, Tensor]:
    return torch.randn(1, heads, LENGTH, 16), torch.randn(1, 1, LENGTH, 16), torch.randn(1, 1, LENGTH, 16)


@pytest.mark.parametrize("backend", ("sdpa", "eager", "flex", "blocks"))
def test_others_refuse_it_by_name(backend: str) -> None:
    with pytest.raises(ValueError, match=r"block_sparse|quantised cache"):
        attention(*qkv(), is_causal=True, block_sparse={"left_out": 0.1, "least": 1}, backend=backend)


def test_gradients_are_refused_in_one_sentence() -> None:
    q, k, v = qkv()
    q.requires_grad_()
    with pytest.raises(ValueError, match="block_sparse has no gradient"):
        attention(q, k, v, block_sparse={"left_out": 0.1, "least": 1}, backend="cpu")
    made = model(block_sparse={"left_out": 0.1, "least": 64})
    with pytest.raises(ValueError, match="block_sparse has no gradient"):
        made(IDS, labels=IDS)


def test_maps_codes_and_servers_are_refused() -> None:
    made = model(block_sparse={"left_out": 0.1, "least": 64})
    with pytest.raises(ValueError, match="attention maps"), torch.no_grad():
        made(IDS, output_attentions=True)
    cache = QuantisedCache(made.config, bits=8)
    with torch.no_grad():
        made(IDS[:, :240], past_key_values=cache)
        with pytest.raises(ValueError, match="codes of a quantised cache"):
            made(IDS[:, 240:], past_key_values=cache)
    assert "block_sparse cannot be served" in str(made.model.reason_against_serving())


@pytest.mark.parametrize(
    ("given", "said"),
    (
        ({"left_out": 1.0}, "left_out must be a share"),
        ({"left_out": -0.1}, "left_out must be a share"),
        ({"left_out": True}, "left_out must be a share"),
        ({"left_out": float("nan")}, "left_out must be a share"),
        ({"left_out": 0.1, "estimate": "guess"}, "estimate must be 'bound' or 'moments'"),
        ({"left_out": 0.1, "least": 0}, "least must be at least 1"),
        ({"left_out": 0.1, "blocks": 3}, "no key 'blocks'"),
        ({"estimate": "bound"}, "must say left_out"),
        (0.1, "must be a mapping"),
    ),
)
def test_what_does_not_fit_is_named(given: Any, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        BlockSparse.of(given)
    with pytest.raises(ValueError, match="block_sparse"):
        differential_attention(*qkv(), 0.5, block_sparse=given)
    with pytest.raises(ValueError, match="block_sparse"):
        Attention(32, 4, block_sparse=given)
    with pytest.raises(Exception, match="block_sparse"):
        config(block_sparse=given)


def test_compiled_whole() -> None:
    q, k, v = qkv(4)

    def both(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return differential_attention(
            3 * q, k, v, 0.4, is_causal=True, block_sparse=BlockSparse(0.3, least=64), backend="cpu"
        )

    with torch.no_grad():
        compiled = torch.compile(both, fullgraph=True, backend="aot_eager")
        assert torch.equal(compiled(q, k, v), both(q, k, v))

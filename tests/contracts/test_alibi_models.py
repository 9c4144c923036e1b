"""Models with position "alibi" are models without positions and ALiBi's bias, from the oracle, as their mask."""

from typing import Any

import pytest
import torch
from huggingface_hub.errors import StrictDataclassError
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

from clearhead.models import ClearheadConfig, ClearheadForCausalLM
from clearhead.nn import Attention, DifferentialAttention, DifferentialAttentionV2
from tests.contracts.model_cases import LAYOUTS, left_padded, make_model, tokens
from tests.contracts.support import assert_within, distance, rand
from tests.oracles import alibi

NAMES = ("softmax", "differential", "differential_v2")
every_variant = pytest.mark.parametrize("name", NAMES)
# Twelve heads, of which V1 makes six: no power of two either way.
TWELVE = {"num_attention_heads": 12, "num_key_value_heads": 4}


def pair(name: str, layout: str = "gqa", **changes: Any) -> tuple[ClearheadForCausalLM, ClearheadForCausalLM]:
    """The same weights with ALiBi and without positions."""
    changes = {"dtype": torch.float64} | changes
    return (
        make_model(name, layout, position="alibi", **changes),
        make_model(name, layout, position="nope", **changes),
    )


def biased(model: ClearheadForCausalLM, ids: Tensor, seen: Tensor | None = None) -> Tensor:
    """Logits of a model without positions under ALiBi's bias, causal or as `seen` (B, L, L) says."""
    length = ids.shape[1]
    heads = model.model.layers[0].self_attn.variant.sizes.heads
    steepness = torch.tensor([alibi.slope(head, heads) for head in range(heads)]).double()
    causal = torch.ones(1, length, length, dtype=torch.bool).tril()
    hidden = ~(causal if seen is None else causal & seen)[:, None]
    mask = alibi.bias(steepness, length, length).masked_fill(hidden, float("-inf"))
    model.set_attn_implementation("eager")
    logits: Tensor = model(ids, attention_mask=mask.expand(ids.shape[0], -1, -1, -1)).logits
    return logits


@pytest.mark.parametrize("layout", LAYOUTS)
@every_variant
def test_every_layout_and_engine(name: str, layout: str) -> None:
    ours, bare = pair(name, layout)
    ids = tokens(2, 9)
    expected = biased(bare, ids)
    for implementation in ("clearhead", "eager", "sdpa"):
        ours.set_attn_implementation(implementation)
        assert distance(ours(ids).logits, expected) < 1e-10


@every_variant
def test_heads_that_are_no_power_of_two(name: str) -> None:
    ours, bare = pair(name, **TWELVE)
    ids = tokens(2, 9)
    assert distance(ours(ids).logits, biased(bare, ids)) < 1e-6
    assert distance(bare(ids).logits, biased(bare, ids)) > 1e-3


@every_variant
def test_flex(name: str) -> None:
    ours, bare = pair(name)
    ids = tokens(2, 9)
    expected = biased(bare, ids)
    plain = biased(bare.float(), ids)
    ours.float().set_attn_implementation("flex_attention")
    with torch.no_grad():
        assert_within([ours(ids).logits], [expected], [plain], torch.float32)


@every_variant
def test_padding_and_packing(name: str) -> None:
    ours, bare = pair(name)
    rows = [tokens(1, 5, seed=1)[0], tokens(1, 8, seed=2)[0]]
    ids, mask = left_padded(rows)
    found = ours(ids, attention_mask=mask).logits
    for row, logits in zip(rows, found, strict=True):
        assert distance(logits[-len(row) :], biased(bare, row[None])[0]) < 1e-10
    packed = torch.cat(rows)[None]
    position_ids = torch.cat([torch.arange(len(row)) for row in rows])[None]
    found = ours(packed, position_ids=position_ids, use_cache=False).logits
    assert distance(found, torch.cat([biased(bare, row[None]) for row in rows], dim=1)) < 1e-10


@every_variant
def test_cached_token_by_token_and_in_chunks(name: str) -> None:
    ours, bare = pair(name)
    ids = tokens(2, 9)
    expected = biased(bare, ids)
    for sizes in ([1] * 9, [4, 1, 3, 1]):
        cache, found = None, []
        for part in ids.split(sizes, dim=1):
            out = ours(part, past_key_values=cache, use_cache=True)
            cache = out.past_key_values
            found.append(out.logits)
        assert distance(torch.cat(found, dim=1), expected) < 1e-10


@pytest.mark.parametrize("cache", ["dynamic", "static"])
@every_variant
def test_generation(name: str, cache: str) -> None:
    ours, bare = pair(name)
    rows = [tokens(1, 4, seed=1)[0], tokens(1, 7, seed=2)[0]]
    ids, mask = left_padded(rows)
    found = ours.generate(
        ids, attention_mask=mask, max_new_tokens=6, do_sample=False, cache_implementation=cache
    )
    for row, written in zip(rows, found, strict=True):
        alone = row[None]
        for _ in range(6):
            alone = torch.cat((alone, biased(bare, alone)[:, -1].argmax(-1, keepdim=True)), dim=1)
        assert torch.equal(written[-len(row) - 6 :], alone[0])


@every_variant
def test_bfloat16_keeps_the_slopes(name: str) -> None:
    ours, bare = pair(name)
    ids = tokens(1, 300)
    ours, bare = ours.bfloat16(), bare.bfloat16()
    expected = biased(make_copy(bare), ids)
    # The bias in float32 under eager attention: all that bfloat16 weights allow.
    assert_within([ours(ids).logits], [expected], [biased(bare, ids)], torch.bfloat16)


def make_copy(model: ClearheadForCausalLM) -> ClearheadForCausalLM:
    """The same rounded weights, computing in float64."""
    copy = ClearheadForCausalLM(model.config).eval()
    copy.load_state_dict(model.state_dict())
    return copy.double()


@every_variant
def test_it_trains_compiled(name: str) -> None:
    torch._dynamo.reset()
    ours, bare = pair(name)
    ids = tokens(2, 9)
    compiled = torch.compile(ours, fullgraph=True, backend="aot_eager")
    found, expected = compiled(ids).logits, biased(bare, ids)
    assert distance(found, expected) < 1e-10
    for logits in (found, expected):
        torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten()).backward()
    wanted = dict(bare.named_parameters())
    for key, parameter in ours.named_parameters():
        assert parameter.grad is not None
        assert distance(parameter.grad, wanted[key].grad) < 1e-9, key


def test_layers_may_mix_positions() -> None:
    ids = tokens(2, 9)
    mixed = make_model("softmax", dtype=torch.float64, layer_positions=["rope", "alibi"])
    lone = [make_model("softmax", dtype=torch.float64, position=p)(ids).logits for p in ("rope", "alibi")]
    found = mixed(ids).logits
    assert all(distance(found, other) > 1e-3 for other in lone)
    cache, steps = None, []
    for part in ids.split([4, 1, 4], dim=1):
        out = mixed(part, past_key_values=cache, use_cache=True)
        cache = out.past_key_values
        steps.append(out.logits)
    assert distance(torch.cat(steps, dim=1), found) < 1e-10


def test_it_is_saved_and_loaded(tmp_path: Any) -> None:
    model, ids = make_model("differential", position="alibi"), tokens(1, 6)
    model.save_pretrained(tmp_path)
    assert AutoConfig.from_pretrained(tmp_path).position == "alibi"
    again = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert torch.equal(again(ids).logits, model(ids).logits)


def test_collinear_attention_needs_angles() -> None:
    with pytest.raises(StrictDataclassError, match="rotary"):
        ClearheadConfig(attention="collinear", position="alibi")


@pytest.mark.parametrize("kind", [Attention, DifferentialAttention, DifferentialAttentionV2])
def test_layers(kind: type[Attention]) -> None:
    torch.manual_seed(0)
    ours = kind(24, 8, num_kv_heads=4, position="alibi").double()
    bare = kind(24, 8, num_kv_heads=4, position="nope").double()
    bare.load_state_dict(ours.state_dict())
    x, heads = rand(2, 7, 24), ours.variant.sizes.heads
    steepness = torch.tensor([alibi.slope(head, heads) for head in range(heads)]).double()
    bias = alibi.bias(steepness, 7, 7)
    assert distance(ours(x), bare(x, attn_mask=bias)) < 1e-10
    causal = bias.masked_fill(torch.ones(7, 7, dtype=torch.bool).triu(1), float("-inf"))
    assert distance(ours(x, is_causal=True), bare(x, attn_mask=causal)) < 1e-10

"""`attn_implementation="clearhead"`, the models' default: each forward pass takes the first backend that can run it."""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, DynamicCache, StaticCache

from clearhead import registry
from clearhead.core import dispatch
from clearhead.core.attend import attend, difference, prepare, problem_of, single
from clearhead.core.dispatch import AttentionProblem, Kernel
from clearhead.core.masks import MaskSpec
from clearhead.core.streams import Streams
from clearhead.engines.eager import Eager
from clearhead.models import ClearheadConfig, ClearheadForCausalLM
from tests.contracts.model_cases import LAYERS, left_padded, make_config, make_model, tokens
from tests.contracts.support import distance

NEW = 4


class Picky(Kernel):
    """Does plain causal attention with all keys in place and nothing else, as a fused kernel may."""

    name = "picky"

    def __init__(self) -> None:
        self.runs = 0

    def refusal(self, problem: AttentionProblem) -> str | None:
        plain = problem.mask <= {"causal"} and problem.ends_aligned and not problem.needs_maps
        return None if plain else "it is picky"

    def run(self, heads: Streams, mask: MaskSpec, scale: float) -> Tensor:
        self.runs += 1
        mix = single if heads.gate is None else difference
        prepared = prepare((Eager(),), problem_of(heads, mask, mix.__name__), mask, automatic=False)
        return attend(heads, prepared, scale, mix)[0]


@pytest.fixture
def picky(monkeypatch: pytest.MonkeyPatch) -> Iterator[Picky]:
    """The kernel as the first automatic choice."""
    kernel = Picky()
    monkeypatch.setitem(dispatch._loaded, "picky", kernel)
    monkeypatch.setitem(registry._TABLES, "kernels", {"picky": "nowhere:Picky"})
    yield kernel


def on(model: ClearheadForCausalLM, implementation: str) -> ClearheadForCausalLM:
    model.set_attn_implementation(implementation)
    return model


def test_it_is_the_default_and_every_way_to_name_it_works(tmp_path: Path) -> None:
    model = make_model("differential")
    assert model.config._attn_implementation == "clearhead"
    model.save_pretrained(tmp_path)
    assert "clearhead" not in [
        value for key, value in json.loads((tmp_path / "config.json").read_text()).items() if "attn" in key
    ]
    named = {"attn_implementation": "clearhead"}
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    others = [
        again,
        AutoModelForCausalLM.from_pretrained(tmp_path, **named),
        ClearheadForCausalLM.from_pretrained(tmp_path, **named),
        AutoModelForCausalLM.from_config(model.config, **named),
        ClearheadForCausalLM(make_config("differential", **named)),
        on(AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation="eager"), "clearhead"),
    ]
    assert [other.config._attn_implementation for other in others] == ["clearhead"] * len(others)
    explicit = AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation="sdpa")
    assert explicit.config._attn_implementation == "sdpa"
    ids = tokens(2, 6)
    assert torch.equal(again.eval()(ids).logits, model(ids).logits)


@pytest.mark.parametrize("name", ["softmax", "differential", "differential_v2"])
@torch.no_grad()
def test_each_forward_pass_takes_the_first_that_can(name: str, picky: Picky) -> None:
    model, ids = make_model(name, dtype=torch.float64), tokens(2, 6)
    plain = on(make_model(name, dtype=torch.float64), "eager")
    padding = torch.tensor([[0, 0, 1, 1, 1, 1], [1] * 6])
    four = torch.ones(6, 6, dtype=torch.bool).tril(1)[None, None].expand(2, 1, 6, 6)
    packed = torch.tensor([[0, 1, 2, 0, 1, 2]] * 2)
    ways = {
        "plain": ({}, True),
        "full mask": ({"attention_mask": torch.ones(2, 6)}, True),
        "padding": ({"attention_mask": padding}, False),
        "four dimensions": ({"attention_mask": four}, False),
        "packed": ({"position_ids": packed, "use_cache": False}, False),
        "maps": ({"output_attentions": True}, False),
    }
    for way, (arguments, taken) in ways.items():
        before = picky.runs
        found, expected = model(ids, **arguments), plain(ids, **arguments)
        assert distance(found.logits, expected.logits) < 1e-10, way
        assert picky.runs - before == (LAYERS if taken else 0), way
    found, expected = (m(ids, output_attentions=True).attentions for m in (model, plain))
    assert max(distance(a, b) for a, b in zip(found, expected, strict=True)) < 1e-10


@pytest.mark.parametrize("cache", ["dynamic", "static"])
@torch.no_grad()
def test_generation_changes_backends_as_it_goes(cache: str, picky: Picky) -> None:
    """A prompt without padding and its decoding may be the kernel's; caches of fixed size and padding are not."""
    model = make_model("differential")
    eager = on(make_model("differential"), "eager")
    rows = [tokens(1, length, seed=length)[0] for length in (3, 7)]
    ids, mask = left_padded(rows)
    options = {"max_new_tokens": NEW, "do_sample": False, "cache_implementation": cache}
    padded = model.generate(ids, attention_mask=mask, **options)
    assert picky.runs == 0
    assert torch.equal(padded, eager.generate(ids, attention_mask=mask, **options))
    alone = model.generate(rows[1][None], **options)
    assert picky.runs == (LAYERS * NEW if cache == "dynamic" else 0)
    assert torch.equal(alone, eager.generate(rows[1][None], **options))


@pytest.mark.parametrize("cache", ["dynamic", "static"])
@torch.no_grad()
def test_it_compiles_as_one_graph(cache: str) -> None:
    """A padded prompt, then a decoding step from each kind of cache."""
    torch._dynamo.reset()
    model = make_model("differential_v2", num_hidden_layers=1)
    ids, mask = left_padded([tokens(1, 4)[0], tokens(1, 7)[0]])
    expected = model(ids, attention_mask=mask, use_cache=False).logits
    step = torch.compile(model, fullgraph=True, backend="aot_eager")
    store = StaticCache(config=model.config, max_cache_len=9) if cache == "static" else DynamicCache()
    first = step(input_ids=ids[:, :6], attention_mask=mask[:, :6], past_key_values=store).logits
    last = step(input_ids=ids[:, 6:], attention_mask=mask, past_key_values=store).logits
    assert distance(torch.cat((first, last), 1) * mask[..., None], expected * mask[..., None]) < 1e-5


def test_maps_may_be_asked_for_in_the_configuration() -> None:
    ids = tokens(2, 5)
    model = make_model("differential", output_attentions=True)
    assert len(model(ids).attentions) == LAYERS
    model.config.output_attentions = False
    assert model(ids).attentions is None
    model.config.output_attentions = True
    maps = model.generate(
        ids, max_new_tokens=2, return_dict_in_generate=True, output_attentions=True
    ).attentions
    assert [len(step) for step in maps] == [LAYERS, LAYERS]
    explicit = ClearheadConfig(hidden_size=16, num_attention_heads=2, attn_implementation="sdpa")
    with pytest.raises(ValueError, match="eager"):
        explicit.output_attentions = True
    assert not explicit.output_attentions


def test_a_gradient_for_the_input_alone_is_a_gradient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Frozen weights and embeddings that learn, as in prompt tuning: a backend without a backward pass will not do."""
    model = make_model("softmax").requires_grad_(False)
    needed = []
    original = Eager.refusal
    monkeypatch.setattr(
        Eager, "refusal", lambda self, problem: needed.append(problem.needs_grad) or original(self, problem)
    )
    on(model, "eager")
    embedded = torch.randn(1, 4, model.config.hidden_size, requires_grad=True)
    model(inputs_embeds=embedded).logits.sum().backward()
    assert needed == [True] and embedded.grad is not None
    model(inputs_embeds=embedded.detach())
    assert needed == [True, False]


def test_nothing_that_can_run_it_is_said_with_every_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("clearhead.models.pretrained.automatic_backends", lambda: (Picky(),))
    with pytest.raises(ValueError, match=r"no backend can run this attention.*it is picky"):
        make_model("softmax")(tokens(1, 4), output_attentions=True)

"""Differential attention in a plain checkpoint: the same function at step 0, and a gradient to all that is new."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from clearhead.convert.choosing import chosen_layers, highest, relative_entropy
from clearhead.convert.inits import INITS, Init
from clearhead.convert.retrofit import RetrofitPlan, layer_numbers, new_numbers, retrofit
from clearhead.convert.run import convert
from clearhead.convert.weights import ConversionError
from clearhead.models import ClearheadForCausalLM
from clearhead.nn import ProjectedAttention
from clearhead.variants.schedule import advance
from tests.convert.support import IDS, SIZES, nothing_left, ours, save, tensors
from tests.oracles.differential import differential_attention
from tests.oracles.softmax import attention

DEPTH = 4
OPTIONS: dict[str, dict[str, Any]] = {"diff_lora": {"rank": 3, "alpha": 6.0}}
EXACT = [init for init in INITS if init.same_function]


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """LLaMA with grouped and with one key-value head, and a model of this library with a window in some layers."""
    folder = tmp_path_factory.mktemp("models")
    sizes = {**SIZES, "num_hidden_layers": DEPTH}
    made = {
        name: save(folder / name, LlamaForCausalLM(LlamaConfig(**sizes, num_key_value_heads=groups)))
        for name, groups in (("gqa", 4), ("mqa", 1))
    }
    windows = {"layers": [{"sliding_window": 5}, {}]}
    return {**made, "windows": ours(folder / "windows", num_hidden_layers=DEPTH, **windows)}


@pytest.fixture(scope="module")
def made(
    plain: dict[str, Path], tmp_path_factory: pytest.TempPathFactory
) -> Callable[[type[Init], str], Path]:
    """A source with one way to begin in all its layers, made once; with one key-value head in the upper half."""
    folder = tmp_path_factory.mktemp("retrofits")

    def make(init: type[Init], source: str = "gqa") -> Path:
        out = folder / f"{source}-{init.attention}-{init.name}"
        if not out.exists():
            layers = "all" if source == "gqa" else "upper"
            assert retrofit(str(plain[source]), out, plan_of(init, layers=layers)).holds == init.same_function
        return out

    return make


def logits(folder: Path, ids: Tensor = IDS) -> Tensor:
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    with torch.no_grad():
        found: Tensor = model(ids).logits
    return found


@lru_cache
def greedy(folder: Path) -> list[int]:
    model, ids = AutoModelForCausalLM.from_pretrained(folder).eval(), IDS[:1]
    options: dict[str, Any] = {"do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    found: list[int] = model.generate(ids, max_new_tokens=100, **options)[0].tolist()
    return found


def plan_of(init: Any, **changes: Any) -> RetrofitPlan:
    settings: dict[str, Any] = {
        "attention": init.attention,
        "init": init.name,
        "options": OPTIONS.get(init.attention, {}),
    }
    return RetrofitPlan(**{**settings, **changes})


@pytest.mark.parametrize("source", ["gqa", "mqa"])
@pytest.mark.parametrize("init", EXACT, ids=lambda init: f"{init.attention}-{init.name}")
def test_the_function_is_unchanged_at_step_0(
    init: type[Init], source: str, plain: dict[str, Path], made: Callable[..., Path]
) -> None:
    out = made(init, source)
    assert float((logits(out) - logits(plain[source])).abs().max()) <= 1e-4
    if source == "gqa":
        assert greedy(out) == greedy(plain[source])


@pytest.mark.parametrize("init", INITS, ids=lambda init: f"{init.attention}-{init.name}")
def test_a_gradient_reaches_all_that_is_new_at_step_1(init: type[Init], made: Callable[..., Path]) -> None:
    model = ClearheadForCausalLM.from_pretrained(made(init))
    assert advance(model, 1) == (init.attention != "differential_v2" and init.name != "published")
    model(IDS, labels=IDS).loss.backward()
    reached = 0
    for layer in model.model.layers:
        variant = layer.self_attn.variant
        for name, parameter in variant.named_parameters():
            assert parameter.grad is not None and bool((parameter.grad != 0).any()), name
            reached += parameter.numel()
        for name, rows in variant.new_rows().items():
            gradient = getattr(layer.self_attn, name).weight.grad
            assert bool((gradient[rows] != 0).any(dim=1).all()), name
            reached += gradient[rows].numel()
    assert reached == new_numbers(model) > 0


def test_it_would_notice_a_function_that_changed(plain: dict[str, Path], tmp_path: Path) -> None:
    """The published start of DiffLoRA has λ at once; it says so, and its logits are others."""
    init = next(init for init in INITS if not init.same_function)
    said: list[str] = []
    retrofit(str(plain["gqa"]), tmp_path / "out", plan_of(init), say=said.append)
    assert any("not the same function" in line for line in said)
    assert float((logits(tmp_path / "out") - logits(plain["gqa"])).abs().max()) > 1e-2
    assert not json.loads((tmp_path / "out" / "conversion.json").read_text())["same_function"]


@pytest.mark.parametrize("layers", ["all", "upper", "alternate", (0, 3)])
def test_chosen_layers_alone_are_changed(layers: Any, plain: dict[str, Path], tmp_path: Path) -> None:
    """Windows of the source stay where they were."""
    init = next(init for init in INITS if init.name == "closed")
    retrofit(str(plain["windows"]), tmp_path / "out", plan_of(init, layers=layers))
    model = ClearheadForCausalLM.from_pretrained(tmp_path / "out")
    chosen = {"all": [0, 1, 2, 3], "upper": [2, 3], "alternate": [1, 3]}.get(str(layers), [0, 3])
    kinds = model.config.layer_kinds
    assert [index for index, kind in enumerate(kinds) if kind.attention == "differential_v2"] == chosen
    assert [kind.window for kind in kinds] == [5, None, 5, None]
    assert float((logits(tmp_path / "out") - logits(plain["windows"])).abs().max()) <= 1e-4
    before, after = tensors(plain["windows"]), tensors(tmp_path / "out")
    untouched = [name for name in before if not any(f"layers.{index}.self_attn" in name for index in chosen)]
    assert all(torch.equal(before[name], after[name]) for name in untouched)


def test_mirror_is_exact_algebra() -> None:
    """(softmax − σ softmax) / (1 − σ) = softmax for any σ, by the oracles."""
    q, k, v = (torch.randn(1, 2, 5, 4, dtype=torch.float64) for _ in range(3))
    twice = torch.stack((q, q), 2).flatten(1, 2)
    for bias in (0.0, -5.0, 1.5):
        sigma = 1 / (1 + math.exp(-bias))
        found = differential_attention(twice, k, v, sigma, causal=True) / (1 - sigma)
        torch.testing.assert_close(found, attention(q, k, v, causal=True), rtol=1e-12, atol=1e-12)


def test_heads_of_dex_are_those_with_the_highest_entropy(plain: dict[str, Path], tmp_path: Path) -> None:
    init = next(init for init in INITS if init.attention == "dex")
    retrofit(str(plain["gqa"]), tmp_path / "out", plan_of(init, heads=0.25))
    record = json.loads((tmp_path / "out" / "conversion.json").read_text())["retrofit"]
    model = ClearheadForCausalLM.from_pretrained(tmp_path / "out")
    source = AutoModelForCausalLM.from_pretrained(plain["gqa"], attn_implementation="eager").eval()
    from clearhead.convert.check import token_ids

    ids = torch.tensor([token_ids(None, SIZES["vocab_size"])])
    with torch.no_grad():
        maps = source(ids, output_attentions=True).attentions
    for index, layer in enumerate(maps):
        rows = layer[0].double()
        entropy = -(rows * rows.clamp(min=1e-300).log()).sum(-1)
        relative = (entropy[:, 1:] / torch.arange(2, ids.shape[1] + 1).log()).mean(1)
        best = sorted(relative.argsort(descending=True)[:2].tolist())
        assert record["heads"]["chosen"][str(index)] == best
        assert list(model.model.layers[index].self_attn.variant.dex.heads) == best
    assert "entropy" in record["heads"]["rule"]


def test_entropy_by_hand() -> None:
    even = torch.tensor([[1.0, 0, 0], [0.5, 0.5, 0], [1 / 3, 1 / 3, 1 / 3]])
    sharp = torch.eye(3)
    found = relative_entropy(torch.stack((even, sharp))[None])
    torch.testing.assert_close(found, torch.tensor([1.0, 0.0], dtype=torch.float64), rtol=0, atol=1e-6)
    assert highest([0.1, 0.9, 0.5, 0.9], 0.5) == [1, 3]
    assert highest([0.1, 0.9, 0.5], 0.01) == [1]
    assert chosen_layers("alternate", 5) == (0, 2, 4) and chosen_layers("upper", 5) == (2, 3, 4)
    assert layer_numbers("0, 3,1") == (0, 3, 1) and layer_numbers("upper") == "upper"


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"attention": "collinear"}, "'collinear' cannot be put into a plain model with its function unchanged"),
        ({"init": "mirrored"}, "'mirrored' is no way to begin with 'differential_v2'; did you mean 'mirror'"),
        ({"layers": "lower"}, "'lower' is neither numbers such as 0,3,5 nor one of all, upper, alternate"),
        ({"layers": (0, 4)}, "--layers must name layers from 0 to 3"),
        ({"options": {"lambda_bais": -3.0}}, "no option 'lambda_bais': did you mean 'lambda_bias'"),
        ({"attention": "differential", "options": {"values": "paired"}}, "has values = 'own'; leave the option out"),
        ({"heads": 0.0}, "--heads must be a share"),
    ],
)  # fmt: skip
def test_what_cannot_be_is_one_sentence(
    changes: dict[str, Any], words: str, plain: dict[str, Path], tmp_path: Path
) -> None:
    with pytest.raises(ValueError) as error:
        retrofit(
            str(plain["gqa"]), tmp_path / "out", RetrofitPlan(**{"attention": "differential_v2", **changes})
        )
    assert words in str(error.value) and nothing_left(tmp_path / "out")


def test_a_model_that_is_differential_already_is_refused(tmp_path: Path) -> None:
    source = ours(tmp_path / "v1", attention="differential")
    with pytest.raises(ConversionError, match="a retrofit begins with a plain softmax model"):
        retrofit(str(source), tmp_path / "out", RetrofitPlan("differential_v2"))
    assert nothing_left(tmp_path / "out")


def test_half_precision_is_kept_but_for_what_would_be_rounded(tmp_path: Path) -> None:
    source = ours(tmp_path / "half", torch.bfloat16)
    for init, dtype in (("mirror", torch.bfloat16), ("closed", torch.float32)):
        retrofit(str(source), tmp_path / init, RetrofitPlan("differential_v2", init))
        found = tensors(tmp_path / init)
        assert found["model.layers.0.self_attn.o_proj.weight"].dtype == dtype
        assert found["model.layers.0.self_attn.q_proj.weight"].dtype == torch.bfloat16


@pytest.mark.parametrize(
    "init",
    [init for init in INITS if init.attention != "dex"],
    ids=lambda init: f"{init.attention}-{init.name}",
)
def test_without_the_new_rows_the_projections_are_the_source_s(
    init: type[Init], plain: dict[str, Path], made: Callable[..., Path]
) -> None:
    before, model = tensors(plain["gqa"]), ClearheadForCausalLM.from_pretrained(made(init))
    for index, layer in enumerate(model.model.layers):
        attention_layer: ProjectedAttention = layer.self_attn
        for name, rows in attention_layer.variant.new_rows().items():
            old = before[f"model.layers.{index}.self_attn.{name}.weight"]
            assert torch.equal(getattr(attention_layer, name).weight[~rows], old)


def test_a_retrofitted_model_is_converted_with_its_schedule(plain: dict[str, Path], tmp_path: Path) -> None:
    """Buffers, biases and nested parameters of variants travel like weights, and the check computes with them."""
    for init in (init for init in INITS if init.name in ("closed", "annealed", "warmup")):
        out, again = tmp_path / init.attention, tmp_path / f"{init.attention}-again"
        retrofit(str(plain["gqa"]), out, plan_of(init))
        model = ClearheadForCausalLM.from_pretrained(out)
        advance(model, 400)
        model.save_pretrained(out)
        assert convert(str(out), again).holds
        assert torch.equal(logits(again), logits(out))
        assert (init.name == "closed") == torch.allclose(logits(again), logits(plain["gqa"]), atol=1e-4)

"""Attention for models that exist already: each against its float64 oracle, in whatever layer, engine and kernel."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from clearhead.core.attend import problem_of
from clearhead.core.dispatch import load_backend
from clearhead.core.lowering import Lowering
from clearhead.core.masks import MaskSpec
from clearhead.core.streams import HeadShape
from clearhead.kernels.cpu import library
from clearhead.models import ClearheadConfig, ClearheadForCausalLM
from clearhead.nn import Attention
from clearhead.registry import resolve
from clearhead.testing import check_variant
from clearhead.testing.variants import HEADS, PROGRESS, WIDTH
from clearhead.variants.schedule import TrainingProgress, advance
from tests.contracts.support import rand
from tests.oracles.layers import LayerSpec, layer
from tests.oracles.retrofits import dex_lambda, risen

FORMS: dict[str, tuple[str, dict[str, Any]]] = {
    "own width": ("differential", {"values": "own", "head_norm": False, "lambda_warmup": 8}),
    "own width, norm": ("differential", {"values": "own", "lambda_init": 0.4}),
    "V2 with a bias": ("differential_v2", {"lambda_bias": -5.0}),
    "DEX": ("dex", {"heads": [1, 2], "anneal": 8}),
    "DEX of all heads": ("dex", {"anneal": 8}),
    "DiffLoRA": ("diff_lora", {"rank": 3, "alpha": 6.0, "lambda_warmup": 8}),
    "DiffLoRA of both": ("diff_lora", {"rank": 2, "alpha": 3.0, "both": True, "lambda_init": 0.25}),
    "DiffLoRA, fixed": ("diff_lora", {"rank": 2, "alpha": 3.0, "lambda_learned": False, "lambda_init": 0.25}),
}


@pytest.mark.parametrize("form", FORMS)
def test_the_contract_of_variants(form: str) -> None:
    """MHA, GQA and MQA, engines, gradients, caches, chunks, padding, packed documents and bfloat16."""
    name, options = FORMS[form]
    # Options of one variant need no layout of their own.
    for groups in (4, 2, 1) if form in ("own width", "DEX", "DiffLoRA") else (2,):
        scheduled = name == "dex" or "lambda_warmup" in options
        told = {**options, "progress": PROGRESS if scheduled else 1.0}
        spec = LayerSpec(name, HEADS, groups, WIDTH, layer=1, options=told)

        def oracle(x: Tensor, weights: dict[str, Tensor], see: Tensor, spec: LayerSpec = spec) -> Tensor:
            return layer(spec, weights, x, allowed=see)[0]

        check_variant(resolve("variants", name), options=options, kv_heads=(groups,), oracle=oracle)


@pytest.mark.parametrize("form", ["own width", "DiffLoRA"])
def test_every_engine_has_a_lowering_for_two_keys_and_narrow_values(form: str) -> None:
    name, options = FORMS[form]
    module = Attention(32, 4, num_kv_heads=2, variant=name, **options)
    x = rand(2, 5, 32).float()
    heads = module.project(x, x, module.position(torch.arange(5)[None], None, None, x.dtype))
    assert (len(heads.q), len(heads.k), heads.v.shape[-1]) == (2, 2, 8)
    problem = problem_of(heads, MaskSpec(is_causal=True), "difference")
    for engine in ("eager", "sdpa", "flex"):
        found = load_backend(engine).lowering(problem)  # type: ignore[attr-defined]
        assert isinstance(found, Lowering) and (found.name, found.calls) == ("FlashDiffAttn_1", 2)
    assert load_backend("cpu").refusal(problem) is None or library.missing() is not None


@pytest.mark.skipif(library.missing() is not None, reason=str(library.missing()))
@pytest.mark.parametrize("form", ["own width", "DiffLoRA of both", "V2 with a bias", "DEX"])
@pytest.mark.parametrize("groups", [4, 1])
def test_the_cpu_kernel_gives_the_same_layer(form: str, groups: int) -> None:
    name, options = FORMS[form]
    found = []
    for backend in ("eager", "cpu"):
        torch.manual_seed(0)
        module = Attention(32, 4, num_kv_heads=groups, variant=name, backend=backend, **options)
        advance(module, 3)
        x = rand(2, 33, 32).float().requires_grad_()
        module(x, is_causal=True).square().sum().backward()
        found.append([x.grad, *(p.grad for p in module.parameters())])
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=2e-4, atol=2e-5)


def test_progress_is_a_share_and_is_saved() -> None:
    module = Attention(16, 4, variant="differential", values="own", lambda_warmup=4)
    whole = float(module.variant.lambda_full().detach())  # type: ignore[operator]
    seen = []
    for step in range(7):
        assert advance(module, step)
        seen.append(module.variant.mean_lambda())
    assert seen == pytest.approx([float(risen(whole, step / 4)) for step in range(7)])
    again = Attention(16, 4, variant="differential", values="own", lambda_warmup=4)
    advance(module, 3)
    again.load_state_dict(module.state_dict())
    assert again.variant.mean_lambda() == module.variant.mean_lambda() != pytest.approx(whole)
    assert not advance(nn.Linear(2, 2), 3)
    with pytest.raises(ValueError, match="step must be at least 0"):
        advance(module, -1)


def test_dex_lambda_goes_from_nothing_by_a_hump_to_what_is_learned() -> None:
    variant = resolve("variants", "dex")(HeadShape(16, 4, 4, 4, layer_idx=2), anneal=10)
    with torch.no_grad():
        variant.dex.factor.lambda_learn.fill_(0.25)
    initial = 0.8 - 0.6 * math.exp(-0.6)
    for step in (0, 1, 5, 9, 10, 25):
        advance(variant, step)
        expected = float(dex_lambda(step / 10, initial, torch.tensor([0.25])))
        if step > 10:
            expected = 0.25
        assert variant.mean_lambda() == pytest.approx(expected, abs=1e-6)
    advance(variant, 0)
    o = rand(1, 4, 3, 4).float()
    assert torch.equal(variant.finish(o), o)


def test_a_saved_model_keeps_its_schedule_in_any_precision(tmp_path: Any) -> None:
    config = ClearheadConfig(
        vocab_size=11,
        hidden_size=16,
        num_attention_heads=4,
        num_hidden_layers=2,
        attention="dex",
        attention_options={"anneal": 8},
    )
    model = ClearheadForCausalLM(config)
    advance(model, 6)
    model.save_pretrained(tmp_path)
    for dtype in (torch.float32, torch.bfloat16):
        loaded = ClearheadForCausalLM.from_pretrained(tmp_path, dtype=dtype)
        shares = [part.progress.item() for part in loaded.modules() if isinstance(part, TrainingProgress)]
        assert shares == [0.75, 0.75]


WRONG: list[tuple[str, dict[str, Any], str]] = [
    ("differential", {"values": "wide"}, "values must be one of paired, own, not 'wide'"),
    ("differential", {"lambda_warmup": -1}, "lambda_warmup must be at least 0"),
    ("differential_v2", {"lambda_bias": "low"}, "lambda_bias must be a number or None, not 'low'"),
    ("dex", {"heads": []}, "heads must name at least one head"),
    ("dex", {"heads": [1, 1]}, "none twice"),
    ("dex", {"heads": [4]}, "heads names 4, but the layer has the heads 0 to 3"),
    ("dex", {"anneal": 0}, "anneal must be at least 1"),
    ("dex", {"weight_std": -1.0}, "weight_std must be at least 0"),
    ("diff_lora", {"rank": 0}, "rank must be at least 1"),
    ("diff_lora", {"alpha": 0.0}, "alpha must be above 0"),
    ("diff_lora", {"lambda_init": 1.5}, "lambda_init must be at least 0 and below 1"),
]


@pytest.mark.parametrize(("name", "options", "sentence"), WRONG)
def test_options_that_cannot_be(name: str, options: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        Attention(16, 4, variant=name, **options)

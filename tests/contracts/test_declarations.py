"""What a variant says of itself: float32 parameters, diagnostics and FLOPs, with the values known before."""

from pathlib import Path
from typing import Any

import pytest
import torch

import clearhead.train.diagnostics as log
from clearhead.core.streams import HeadShape
from clearhead.models import ClearheadConfig, ClearheadForCausalLM
from clearhead.registry import VARIANTS, resolve
from clearhead.report.training import diagnostics as sections
from clearhead.runs.results import ArmResults, RunResults, SeedResults
from clearhead.variants.dex import Dex
from clearhead.variants.learned_lambda import LearnedLambda

VECTORS = ["lambda_k1", "lambda_k2", "lambda_q1", "lambda_q2"]
FLOAT32 = {
    name: VECTORS if name in ("differential", "differential_collinear", "diff_lora") else []
    for name in VARIANTS
}
FLOAT32["dex"] = ["dex.factor.lambda_learn"]


def make(name: str) -> ClearheadForCausalLM:
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"hidden_size": 16, "num_attention_heads": 4, "num_hidden_layers": 2}
    return ClearheadForCausalLM(ClearheadConfig(vocab_size=9, attention=name, **sizes)).eval()


@pytest.mark.parametrize("name", VARIANTS)
def test_float32_parameters(name: str, tmp_path: Path) -> None:
    make(name).save_pretrained(tmp_path)
    model = ClearheadForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    kept = {n.rpartition("variant.")[2] for n, p in model.named_parameters() if p.dtype == torch.float32}
    assert sorted(kept) == FLOAT32[name]
    assert sorted(resolve("variants", name).float32_parameters) == FLOAT32[name]


@pytest.mark.parametrize("name", VARIANTS)
@torch.no_grad()
def test_diagnostics(name: str) -> None:
    model, ids = make(name), torch.arange(1, 8)[None]
    found, without = model.diagnostics(ids), model.diagnostics()
    if name in ("softmax", "collinear"):
        assert found == without == {}
        return
    assert list(found) == ["lambda"] and sorted(found["lambda"]) == [0, 1]
    states = model.model(ids, output_hidden_states=True, use_cache=False).hidden_states
    for index, layer in enumerate(model.model.layers):
        variant = layer.self_attn.variant
        if isinstance(variant, Dex):
            expected = 0.0
            assert without == found
        elif isinstance(variant, LearnedLambda):
            q1, k1, q2, k2 = (getattr(variant, f"lambda_{n}").double() for n in ("q1", "k1", "q2", "k2"))
            expected = torch.exp(q1 @ k1) - torch.exp(q2 @ k2) + variant.lambda_init
            assert without == found
        else:
            seen = layer.input_layernorm(states[index])
            expected = torch.sigmoid((seen @ variant.lambda_proj.weight.T).double()).mean()
            assert without == {}
        assert found["lambda"][index] == pytest.approx(float(expected), abs=1e-6)
    assert model.lambdas(ids) == found["lambda"]


@pytest.mark.parametrize("name", VARIANTS)
def test_flops_of_its_own(name: str) -> None:
    """Two for each weight of V2's λ projection, of W_D for each head, of both B; nothing for the others."""
    variant = resolve("variants", name)(HeadShape(16, 4, 4, 4))
    own = {"dex": 2 * 4 * (4 * 4), "diff_lora": 2 * 64 * (16 + 16)}
    assert variant.flops_per_token(50.5) == own.get(name, 2 * 16 * 4 if "v2" in name else 0)


def run_with(records: list[dict[str, Any]]) -> RunResults:
    return RunResults({}, {}, [ArmResults("A", "a", "toy", {0: SeedResults(records)})])


def test_another_diagnostic_has_a_section_of_the_report() -> None:
    records = [{"step": 1, "diagnostics": {"spread": {"0": 0.5}}}]
    records += [{"step": 2, "lambda": {}, "diagnostics": {"spread": {"0": 0.25, "1": 0.75}}}]
    (section,) = sections(run_with(records))
    assert section.question == "What became of spread?"
    assert section.answer == "Mean by layer, from the first layer on: A 0.25, 0.75."
    assert sections(run_with([{"step": 1, "lambda": {"0": 0.1}}])) == []


def test_a_log_keeps_lambda_where_it_was() -> None:
    """`metrics.jsonl` of earlier runs has "lambda" at the top, and "lambda/layer_0" is a curve of TensorBoard."""
    lam, spread = {"0": 0.2, "1": 0.3}, {"1": 0.5}
    assert log.as_record({"lambda": lam}) == {"lambda": lam}
    assert log.as_record({}) == {"lambda": {}}
    assert log.as_record({"spread": spread, "lambda": lam}) == {
        "lambda": lam,
        "diagnostics": {"spread": spread},
    }
    assert log.as_scalars({"lambda": lam}) == {"lambda/layer_0": 0.2, "lambda/layer_1": 0.3}
    model = make("differential")
    expected = {str(layer): round(value, 6) for layer, value in model.lambdas().items()}
    assert log.measure(model, torch.arange(4)[None]) == {"lambda": expected}

"""The same weights under other rotary scalings, and what the factors do to a model."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from clearhead.evals.composed.scaling_factors import ScalingFactors, ScalingFactorsConfig
from clearhead.evals.probing.rescaling import rescaled
from clearhead.evals.text.perplexity.evaluation import Perplexity, PerplexityConfig
from tests.evals import tiny
from tests.evals.test_passkey import run_of as _run_of

IDS = torch.from_numpy(np.random.default_rng(0).integers(3, 320, (1, 48)))
SCALINGS: list[dict[str, Any]] = [
    {"rope_type": "linear", "factor": 3.0},
    {"rope_type": "ntk", "factor": 4.0},
    {"rope_type": "dynamic", "factor": 4.0},
    {"rope_type": "yarn", "factor": 4.0},
]


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=IDS, use_cache=False).logits


def frequencies(scaling: dict[str, Any], length: int, trained: int = 16) -> torch.Tensor:
    """θ' of a head of width 8, base 1e4, from the formulas (YaRN's are not written out here)."""
    s, base = scaling["factor"], 1e4
    if scaling["rope_type"] == "ntk":
        base *= s ** (8 / 6)
    if scaling["rope_type"] == "dynamic":
        base *= (s * length / trained - (s - 1)) ** (8 / 6)
    plain = base ** (-torch.arange(0, 8, 2, dtype=torch.float64) / 8)
    return plain / s if scaling["rope_type"] == "linear" else plain


@pytest.mark.parametrize("scaling", SCALINGS[:3], ids=lambda s: s["rope_type"])
def test_frequencies_are_the_formulas_on_both_kinds_of_model(scaling: dict[str, Any]) -> None:
    truth = frequencies(scaling, 48)
    theirs = tiny.llama()
    with rescaled(theirs, scaling, trained=16, length=48):
        torch.testing.assert_close(theirs.model.rotary_emb.inv_freq.double(), truth, rtol=1e-5, atol=0)
    mine = tiny.ours()
    with rescaled(mine, scaling, trained=16, length=48):
        position = mine.model.position_methods()["rope"]
        found = position.scaling.frequencies(torch.tensor([48]), torch.float64)  # type: ignore[attr-defined, union-attr]
        torch.testing.assert_close(found.flatten(), truth, rtol=1e-9, atol=0)


@pytest.mark.parametrize("scaling", SCALINGS, ids=lambda s: s["rope_type"])
@pytest.mark.parametrize("make", [tiny.llama, tiny.ours])
def test_a_rescaled_model_is_one_built_that_way_and_comes_back(make: Any, scaling: dict[str, Any]) -> None:
    model = make().double()
    before = logits(model)
    if make is tiny.ours:
        built = make(rope_parameters={"rope_theta": 1e4, **scaling}).double()
    elif scaling["rope_type"] == "ntk":
        built = make(rope_parameters={"rope_type": "default", "rope_theta": 1e4 * 4 ** (8 / 6)}).double()
    else:
        extra = {"original_max_position_embeddings": 16} if scaling["rope_type"] == "yarn" else {}
        built = make(rope_parameters={"rope_theta": 1e4, **extra, **scaling}).double()
    with rescaled(model, scaling, trained=16, length=48):
        inside = logits(model)
    # Hugging Face turns in float32 whatever the model's dtype.
    torch.testing.assert_close(inside, logits(built), rtol=0, atol=2e-5)
    assert (inside - before).abs().max() > 1e-3, "the scaling does something"
    assert torch.equal(logits(model), before)


def test_what_cannot_be_rescaled_says_why() -> None:
    dynamic = {"rope_type": "dynamic", "factor": 4.0}
    for model, message in (
        (tiny.gpt2(), "GPT2LMHeadModel has no rotary position embedding"),
        (tiny.ours(position="nope"), "has no rotary positions but 'nope'"),
    ):
        with pytest.raises(ValueError, match=message), rescaled(model, dynamic, trained=16):
            pass
    for make in (tiny.llama, tiny.ours):
        for wrong, message in (
            ({"rope_type": "dynmaic", "factor": 2.0}, "did you mean 'dynamic'"),
            ({"rope_type": "dynamic", "fctor": 2.0}, "did you mean 'factor'"),
            ({"rope_type": "dynamic", "factor": 0.5}, "at least 1"),
        ):
            model = make()
            with pytest.raises(ValueError, match=message), rescaled(model, wrong, trained=16):
                pass
            assert torch.isfinite(logits(model)).all()


def test_perplexity_and_passkey_are_those_under_each_factor() -> None:
    documents = tiny.store([64] * 4)
    subject = tiny.subject(tiny.llama(), documents, external=True)
    plain = {"lengths": [32, 64], "segment": 0}
    config = ScalingFactorsConfig(
        factors=[1, 2, 8],
        perplexity=PerplexityConfig(**plain),
        passkey={"forms": ["coca"], "lengths": [200], "samples": 2, "max_new_tokens": 3},  # type: ignore[arg-type]
    )
    values = ScalingFactors().run(subject, config)
    assert list(values["factors"]) == ["1", "2", "8"]
    for factor, scaling in (("1", None), ("8", {"rope_type": "dynamic", "factor": 8.0})):
        alone = Perplexity().run(subject, PerplexityConfig(rope_parameters=scaling, **plain))
        assert values["factors"][factor]["perplexity"]["cells"] == alone["cells"]
        assert values["factors"][factor]["passkey"]["n"] == 2
    run = _run_of({"A": values, "B": values})
    for arm in run.arms:
        arm.seeds[0].results["scaling_factors"] = arm.seeds[0].results.pop("passkey")
    section = ScalingFactors().section(run)
    assert "No difference from A detected for B" in section.answer
    swing = section.headlines[0].estimate
    cells = [values["factors"][factor]["perplexity"]["cells"][-1] for factor in ("2", "8")]
    losses = [np.array(cell["nats"]) / np.array(cell["tokens"]) for cell in cells]
    assert swing is not None and swing.value == pytest.approx(np.abs(losses[0] - losses[1]).mean())
    assert [len(table.rows) for table in section.tables] == [6, 3, 6]


def test_an_arm_without_rotation_is_left_out_and_named() -> None:
    documents = tiny.store([64] * 4)
    config = ScalingFactorsConfig(
        factors=[1, 2, 8], perplexity=PerplexityConfig(lengths=[32, 64], segment=0), passkey=None
    )
    rope, nope = (
        ScalingFactors().run(tiny.subject(tiny.ours(position=position), documents), config)
        for position in ("rope", "nope")
    )
    run = _run_of({"RoPE": rope, "RoPE again": rope, "NoPE": nope})
    for arm in run.arms:
        arm.seeds[0].results["scaling_factors"] = arm.seeds[0].results.pop("passkey")
    section = ScalingFactors().section(run)
    assert "No difference from RoPE detected for RoPE again" in section.answer
    assert [headline.arm for headline in section.headlines] == ["RoPE", "RoPE again"]
    reasons = [note for note in section.notes if "no rotary" in note]
    assert reasons == [
        "NoPE: perplexity, factor 2; perplexity, factor 8: "
        + nope["skipped_cells"]["perplexity, factor 2"]
        + "."
    ]


def test_a_model_without_rotation_has_no_factors() -> None:
    subject = tiny.subject(tiny.ours(position="nope"), tiny.store([64] * 4))
    values = ScalingFactors().run(
        subject, ScalingFactorsConfig(factors=[2], perplexity=PerplexityConfig(lengths=[32]), passkey=None)
    )
    assert "no rotary" in values["skipped"]

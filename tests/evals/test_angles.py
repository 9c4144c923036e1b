"""Initial angles on models whose angles are known: made collinear by their weights, random, or by construction."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch

from clearhead.evals.internals.initial_angles import InitialAngles, InitialAnglesConfig
from tests.evals import tiny
from tests.evals.test_passkey import run_of

CONFIG = InitialAnglesConfig(length=16, documents=3, positions=16)


def measure(model: Any) -> list[dict[str, Any]]:
    values = InitialAngles().run(tiny.subject(model, tiny.store([20] * 3)), CONFIG)
    return values["layers"]


def by_hand(model: Any, ids: list[int], heads: int, groups: int) -> tuple[float, float, np.ndarray]:
    """(collinearity, anomaly, histogram) of the first layer's projections, pair by pair."""
    layer = model.model.layers[0]
    with torch.no_grad():
        x = layer.input_layernorm(model.model.embed_tokens(torch.tensor(ids)))
        q = layer.self_attn.q_proj(x).double().numpy().reshape(len(ids), heads, -1)
        k = layer.self_attn.k_proj(x).double().numpy().reshape(len(ids), groups, -1)
    cosine = anomaly = total = 0.0
    histogram = np.zeros(36)
    for n in range(len(ids)):
        for h in range(heads):
            g = h // (heads // groups)
            half = q.shape[-1] // 2
            for j in range(half):
                a = complex(q[n, h, j], q[n, h, j + half])
                b = complex(k[n, g, j], k[n, g, j + half])
                weight = abs(a) * abs(b)
                angle = np.angle(a / b) % (2 * math.pi)
                cosine += weight * math.cos(angle)
                anomaly += weight * (angle > math.pi)
                histogram[min(35, int(angle / (2 * math.pi) * 36))] += weight
                total += weight
    return cosine / total, anomaly / total, histogram / total


@pytest.mark.parametrize(("make", "groups"), [(tiny.llama, 2), (tiny.ours, 4)])
def test_angles_of_plain_attention_are_those_by_hand(make: Any, groups: int) -> None:
    model, documents = make(), tiny.store([20] * 3)
    found = measure(model)[0]
    assert found["kind"] == "Θ"
    histograms = []
    for i in range(3):
        truth = by_hand(model, [1, *documents.document(i).tolist()[:15]], 4, groups)
        assert found["cosine"][i] == pytest.approx(truth[0], abs=1e-4)
        assert found["anomaly"][i] == pytest.approx(truth[1], abs=1e-4)
        histograms.append(truth[2])
    assert sum(found["histogram"]) == pytest.approx(1.0, abs=1e-4)
    # The documents weigh what their vectors weigh, so the mean over documents is near, not equal.
    np.testing.assert_allclose(found["histogram"], np.mean(histograms, axis=0), atol=0.01)


def test_the_direction_is_from_key_to_query() -> None:
    model = tiny.llama(num_key_value_heads=4)
    attention = model.model.layers[0].self_attn
    # The query is its key turned by 90 degrees in every pair: (a, b) -> (−b, a).
    k = attention.k_proj.weight.data.view(4, 2, 4, -1)
    attention.q_proj.weight.data = torch.stack((-k[:, 1], k[:, 0]), dim=1).reshape(32, -1)
    found = measure(model)[0]
    quarter = found["histogram"][8] + found["histogram"][9]
    assert quarter == pytest.approx(1.0, abs=1e-3) and found["anomaly"] == [0.0] * 3


def test_collinear_models() -> None:
    options = {"attention": "collinear"}
    for mode in ("exact", "strict"):
        found = measure(tiny.ours(**options, attention_options={"mode": mode}))[0]
        assert found["kind"] == "0" and found["cosine"] == [1.0] * 3 and found["histogram"][0] == 1.0
    slack = tiny.ours(**options, attention_options={"mode": "slack"})
    random = measure(slack)[0]
    assert random["kind"] == "2φ" and all(abs(c) < 0.6 for c in random["cosine"])
    # Random keys: half of the pairs have a mean below 0.
    assert all(0.3 < share < 0.7 for share in random["zeros"])
    # q_j tied inside its pairs, of either sign: φ = 0 or π, and the slack form is the exact one.
    weight = slack.model.layers[0].self_attn.q_proj.weight.data.view(4, 2, 4, -1)
    weight[:, 1] = weight[:, 0]
    tied = measure(slack)[0]
    assert tied["cosine"] == pytest.approx([1.0] * 3, abs=1e-5)
    # q_0 = −q_1: φ = ±π/2, a full reversal.
    weight[:, 1] = -weight[:, 0]
    assert measure(slack)[0]["cosine"] == pytest.approx([-1.0] * 3, abs=1e-5)


def test_dead_keys_are_counted_and_softplus_has_none() -> None:
    options = {"attention": "collinear"}
    model = tiny.ours(**options, attention_options={"mode": "exact"})
    model.model.layers[0].self_attn.k_proj.weight.data.zero_()
    found = measure(model)
    assert found[0]["zeros"] == found[0]["dead"] == [1.0] * 3 and max(found[1]["dead"]) < 1.0
    soft = measure(tiny.ours(**options, attention_options={"mode": "exact", "activation": "softplus"}))
    assert soft[0]["zeros"] == [0.0] * 3
    assert measure(tiny.ours())[0]["zeros"] == []


def test_both_streams_of_differential_collinear_count() -> None:
    for attention in ("differential_collinear", "differential_v2_collinear"):
        found = measure(tiny.ours(attention=attention, attention_options={"mode": "slack"}))
        assert [one["kind"] for one in found] == ["2φ", "2φ"] and len(found[0]["zeros"]) == 3


def test_models_without_pairs_are_left_out() -> None:
    for model in (tiny.gpt2(), tiny.ours(position="nope")):
        values = InitialAngles().run(tiny.subject(model, tiny.store([20] * 3)), CONFIG)
        assert "no initial angle" in values["skipped"]
    short = InitialAngles().run(tiny.subject(tiny.llama(), tiny.store([5])), CONFIG)
    assert "no document has 16 tokens" in short["skipped"]


def test_the_report_says_what_is_random() -> None:
    values = {
        name: InitialAngles().run(tiny.subject(model, tiny.store([20] * 3)), CONFIG)
        for name, model in (("rope", tiny.ours()), ("exact", tiny.ours(attention="collinear")))
    }
    run = run_of(values)
    for arm in run.arms:
        arm.seeds[0].results["initial_angles"] = arm.seeds[0].results.pop("passkey")
    section = InitialAngles().section(run)
    assert "exact 1.00" in section.answer and "exact is closer to collinear than rope" in section.answer
    assert "better" not in section.answer and section.headlines[1].verdict.startswith("closer by")
    assert [series.name for series in section.charts[0].series] == ["rope"]  # type: ignore[union-attr]
    assert section.tables[0].rows[2][1] == "0" and section.tables[0].rows[0][4] is None

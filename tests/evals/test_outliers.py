"""Attention logits by distance, against logits computed from the projections in float64 with loops."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch

from clearhead.evals.internals.logit_outliers import LogitOutliers, LogitOutliersConfig
from clearhead.evals.probing.recorder import Recorded, recorded
from tests.evals import tiny
from tests.evals.test_passkey import run_of

T, N, R = 16, 64, 6


def rotated(x: np.ndarray, position: int) -> np.ndarray:
    """One head (D,) turned in pairs (j, j + D/2)."""
    half = len(x) // 2
    angles = position * 10000.0 ** (-np.arange(half) / half)
    cos, sin = np.cos(angles), np.sin(angles)
    return np.concatenate([x[:half] * cos - x[half:] * sin, x[half:] * cos + x[:half] * sin])


def first_layer_logits(model: Any, ids: list[int], heads: int, groups: int) -> np.ndarray:
    """(H, R, N) scaled logits of the first layer's last queries, NaN where a query does not see."""
    layer = model.model.layers[0]
    with torch.no_grad():
        x = layer.input_layernorm(model.model.embed_tokens(torch.tensor(ids)))
        q = layer.self_attn.q_proj(x).double().numpy().reshape(len(ids), heads, -1)
        k = layer.self_attn.k_proj(x).double().numpy().reshape(len(ids), groups, -1)
    out = np.full((heads, R, len(ids)), np.nan)
    for h in range(heads):
        for r in range(R):
            m = len(ids) - R + r
            for n in range(m + 1):
                key = rotated(k[n, h // (heads // groups)], n)
                out[h, r, n] = rotated(q[m, h], m) @ key / math.sqrt(q.shape[-1])
    return out


@pytest.mark.parametrize(("make", "groups"), [(tiny.llama, 2), (tiny.ours, 4)])
def test_numbers_are_those_by_hand(make: Any, groups: int) -> None:
    model = make()
    documents = tiny.store([N, N])
    config = LogitOutliersConfig(length=N, queries=R, layers=[0], documents=2, scalings=[])
    values = LogitOutliers().run(tiny.subject(model, documents), config)
    assert values["n"] == 2
    (found,) = values["scalings"][0]["layers"]
    sums: dict[int, list[float]] = {}
    for i in range(2):
        logits = first_layer_logits(model, [1, *documents.document(i).tolist()[: N - 1]], 4, groups)
        distance = (N - R + np.arange(R))[:, None] - np.arange(N)[None]
        seen = np.broadcast_to(distance >= 0, logits.shape)
        far = np.broadcast_to(distance >= T, logits.shape)
        near = seen & np.broadcast_to(distance < 16, logits.shape)
        rest = seen & ~near
        size = np.abs(logits)
        assert found["max_beyond"][i] == pytest.approx(size[far].max(), rel=1e-4)
        assert found["mean_within"][i] == pytest.approx(size[seen & ~far].mean(), rel=1e-4)
        assert found["outlier"][i] == pytest.approx(size[far].max() / size[seen & ~far].mean(), rel=1e-4)
        gap = (logits[near].mean() - logits[rest].mean()) / logits[rest].std()
        assert found["near"][i] == pytest.approx(gap, abs=1e-4)
        for d in range(N):
            at = np.broadcast_to(distance == d, logits.shape)
            sums.setdefault(d, []).extend(logits[at].tolist())
    start = 0
    for end, mean, largest in zip(found["distance"], found["mean"], found["largest"], strict=True):
        inside = [value for d in range(start, end) for value in sums.get(d, [])]
        assert mean == pytest.approx(np.mean(inside), abs=1e-5)
        assert largest == pytest.approx(np.abs(inside).max(), rel=1e-4)
        start = end
    assert start >= N - R + 1


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"attention": "differential"},
        {"attention": "differential_v2"},
        {"attention": "collinear", "attention_options": {"mode": "slack"}},
        {"position": "alibi"},
        {"position": "nope"},
    ],
    ids=str,
)
def test_listening_changes_nothing_and_streams_are_what_the_softmax_takes(settings: dict[str, Any]) -> None:
    model = tiny.ours(**settings).double()
    ids = torch.from_numpy(np.random.default_rng(0).integers(3, 320, (1, 24)))
    heard: list[Recorded] = []
    with torch.no_grad():
        before = model(input_ids=ids, use_cache=False).logits
        with recorded(model, heard.append):
            during = model(input_ids=ids, use_cache=False).logits
        model(input_ids=ids, use_cache=False)
        maps = model(input_ids=ids, use_cache=False, output_attentions=True).attentions
    assert torch.equal(before, during)
    assert [streams.layer for streams in heard] == [0, 1], "and nothing is heard afterwards"
    visible = torch.ones(24, 24).tril().bool()
    distance = (torch.arange(24)[:, None] - torch.arange(24)).double()
    for streams, truth in zip(heard, maps, strict=True):
        made = []
        for q, k in zip(streams.q, streams.k, strict=True):
            keys = k.repeat_interleave(q.shape[1] // k.shape[1], dim=1)
            logits = q @ keys.transpose(-1, -2) * streams.scale
            if streams.slopes is not None:
                logits = logits - streams.slopes.double()[:, None, None] * distance
            made.append(logits.masked_fill(~visible, -math.inf).softmax(-1))
        gate = streams.before.gate if streams.before is not None else None
        whole = made[0] if len(made) == 1 else made[0] - gate * made[1]  # type: ignore[operator]
        torch.testing.assert_close(whole, truth, rtol=0, atol=1e-6)


def test_a_hugging_face_model_is_itself_again() -> None:
    model = tiny.llama()
    before = model.config._attn_implementation
    heard: list[Recorded] = []
    ids = torch.ones(1, 8, dtype=torch.long)
    with torch.no_grad(), recorded(model, heard.append):
        model(input_ids=ids)
    with torch.no_grad():
        model(input_ids=ids)
    assert len(heard) == 2 and model.config._attn_implementation == before


def test_scalings_that_a_model_cannot_take_are_left_out() -> None:
    documents = tiny.store([N, N, N])
    config = LogitOutliersConfig(length=N, queries=R, documents=3)
    alibi = LogitOutliers().run(tiny.subject(tiny.ours(position="alibi"), documents), config)
    rope = LogitOutliers().run(tiny.subject(tiny.ours(), documents), config)
    assert [one["scaling"] for one in alibi["scalings"]] == ["as trained"]
    assert "no rotary positions" in alibi["skipped_cells"]["dynamic, factor 4"]
    assert [one["scaling"] for one in rope["scalings"]] == ["as trained", "dynamic, factor 4"]
    assert rope["scalings"][0]["layers"] != rope["scalings"][1]["layers"]
    run = run_of({"rope": rope, "alibi": alibi})
    for arm in run.arms:
        arm.seeds[0].results["logit_outliers"] = arm.seeds[0].results.pop("passkey")
    section = LogitOutliers().section(run)
    assert "alibi" in section.answer and len(section.charts) == 4
    assert len(section.charts[2].series) == 1, "an arm without NTK has no line there"  # type: ignore[union-attr]


def test_bad_input_is_named() -> None:
    subject = tiny.subject(tiny.llama(), tiny.store([N, N]))
    short = LogitOutliers().run(subject, LogitOutliersConfig(length=32, queries=20))
    assert "do not lie beyond the training length 16" in short["skipped"]
    long = LogitOutliers().run(subject, LogitOutliersConfig(length=128))
    assert "no document has 128 tokens" in long["skipped"]
    with pytest.raises(ValueError, match="layers 0 to 1, not 7"):
        LogitOutliers().run(subject, LogitOutliersConfig(length=N, queries=R, layers=[7]))
    table = LogitOutliers().run(tiny.subject(tiny.gpt2()), LogitOutliersConfig(length=N, queries=R))
    assert "more than the model takes" in table["skipped"]

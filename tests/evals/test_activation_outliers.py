"""Exact order statistics of streams, and activations against those computed by hand from projections in numpy."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from transformers import DiffLlamaConfig, DiffLlamaForCausalLM, MistralConfig, MistralForCausalLM

from clearhead.evals.internals import activation_outliers
from clearhead.evals.internals.activation_outliers import TOPS, ActivationOutliers, ActivationOutliersConfig
from clearhead.evals.probing.magnitudes import Magnitudes
from clearhead.runs.results import ArmResults, RunResults, SeedResults
from tests.evals import tiny

N = 24


def run_of(values: dict[str, dict[str, Any]], evaluation: str) -> RunResults:
    """A run of one seed an arm."""
    arms = [
        ArmResults(name, name, "softmax", {0: SeedResults(results={evaluation: {"config": {}, "values": v}})})
        for name, v in values.items()
    ]
    return RunResults({"name": "run"}, {}, arms)


@pytest.mark.parametrize("count", [1, 2, 7, 1000, 4099])
@pytest.mark.parametrize("kind", ["normal", "wide", "few values", "zeros"])
def test_order_statistics_are_exact(count: int, kind: str) -> None:
    rng = np.random.default_rng(count)
    x = {
        "normal": rng.normal(size=count),
        "wide": rng.normal(size=count) * 10.0 ** rng.integers(-44, 30, count),
        "few values": rng.integers(-2, 3, count),
        "zeros": np.zeros(count),
    }[kind].astype(np.float32)
    found = Magnitudes(100)
    pieces = np.array_split(x, 5) if count > 5 else [x]
    most = [found.add(torch.from_numpy(piece)) for piece in pieces]
    for piece in reversed(pieces):
        found.add_again(torch.from_numpy(piece))
    sizes = np.sort(np.abs(x))[::-1]
    assert found.count == count and max(most) == sizes[0]
    assert found.median() == float(np.median(sizes.astype(np.float64)))
    for k in (1, 2, 3, 10, 100):
        assert found.top(k) == (sizes[k - 1] if k <= count else None)


def test_pooled_parts_are_as_one() -> None:
    parts = [Magnitudes(5) for _ in range(3)]
    x = [torch.randn(n, generator=torch.Generator().manual_seed(n)) for n in (4, 9, 30)]
    for part, some in zip(parts, x, strict=True):
        part.add(some)
    whole = Magnitudes.pooled(parts)
    for some in x:
        whole.add_again(some)
    both = np.abs(torch.cat(x).numpy())
    assert whole.median() == np.median(both) and whole.top(5) == np.sort(both)[-5] and whole.top(6) is None


def test_numbers_that_are_none_and_readings_that_differ_are_refused() -> None:
    for bad in (math.nan, math.inf):
        with pytest.raises(ValueError, match="infinite or not numbers"):
            Magnitudes().add(torch.tensor([1.0, bad]))
    found = Magnitudes()
    found.add(torch.tensor([1.0, 2.0, 3.0]))
    found.add_again(torch.tensor([1.0, 5.0, 3.0]))
    with pytest.raises(ValueError, match="a second time"):
        found.median()
    with pytest.raises(ValueError, match="no numbers"):
        Magnitudes().median()


def rotated(x: np.ndarray) -> np.ndarray:
    """(N, D) at positions 0, 1, …, turned in pairs (j, j + D/2)."""
    half = x.shape[1] // 2
    angles = np.arange(len(x))[:, None] * 10000.0 ** (-np.arange(half) / half)
    cos, sin = np.cos(angles), np.sin(angles)
    return np.concatenate(
        [x[:, :half] * cos - x[:, half:] * sin, x[:, half:] * cos + x[:, :half] * sin], axis=1
    )


def by_hand(
    model: Any, ids: list[int], windows: tuple[int | None, ...] = (None, None)
) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """Visible |logits| of each layer, and hidden states: the embeddings and what each layer puts out."""
    decoder = model.model
    with torch.no_grad():
        norm, decoder.norm = decoder.norm, nn.Identity()
        states = model(input_ids=torch.tensor([ids]), output_hidden_states=True).hidden_states
        decoder.norm = norm
        logits = []
        for layer, x, window in zip(decoder.layers, states[:-1], windows, strict=True):
            inside = layer.input_layernorm(x[0])
            q = layer.self_attn.q_proj(inside).numpy().reshape(len(ids), -1, 8)
            k = layer.self_attn.k_proj(inside).numpy().reshape(len(ids), -1, 8)
            some = []
            for h in range(q.shape[1]):
                # Query heads in order share key heads in order; of V1 both are the streams' (2i + s), of V2 queries.
                key = rotated(k[:, h * k.shape[1] // q.shape[1]])
                full = rotated(q[:, h]) @ key.T / math.sqrt(8)
                seen = window or len(ids)
                some += [abs(full[m, n]) for m in range(len(ids)) for n in range(max(0, m + 1 - seen), m + 1)]
            logits.append(np.array(some))
    return logits, [np.abs(x[0].numpy()).ravel() for x in states]


def mistral() -> MistralForCausalLM:
    torch.manual_seed(0)
    sizes = {**tiny.SIZES, "num_key_value_heads": 2, "initializer_range": 0.2, "head_dim": 8}
    return MistralForCausalLM(MistralConfig(vocab_size=320, sliding_window=8, **sizes)).eval()


@pytest.mark.parametrize(
    ("make", "windows"),
    [
        (tiny.llama, (None, None)),
        (tiny.ours, (None, None)),
        (lambda: tiny.ours(attention="differential"), (None, None)),
        (lambda: tiny.ours(attention="differential_v2", num_key_value_heads=2), (None, None)),
        (lambda: tiny.ours(attention="differential", layers=[{"sliding_window": 3}, {}]), (3, None)),
        (mistral, (8, 8)),
    ],
    ids=["llama", "softmax", "v1", "v2", "v1 with a window", "mistral"],
)
def test_numbers_are_those_by_hand(
    make: Any, windows: tuple[int | None, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = make().double()
    documents = tiny.store([N, 9, N, N])
    config = ActivationOutliersConfig(length=N, tokens=2 * N + 1)
    values = ActivationOutliers().run(tiny.subject(model, documents), config)
    assert values["n"] == 3 and values["tokens"] == 3 * N
    texts = [[1, *documents.document(i).tolist()[: N - 1]] for i in (0, 2, 3)]
    found = [by_hand(model, ids, windows) for ids in texts]
    for kind, index in (("logits", 0), ("hidden", 1)):
        layers = [np.concatenate([one[index][i] for one in found]) for i in range(len(found[0][index]))]
        first = 1 if kind == "hidden" else 0
        pools = [np.concatenate(layers[first:]), *layers]
        for numbers, truth in zip([values[kind], *values[kind]["by_layer"]], pools, strict=True):
            ordered = np.sort(truth)[::-1]
            assert numbers["count"] == len(truth)
            assert numbers["median"] == pytest.approx(np.median(truth), rel=1e-6)
            for k in TOPS:
                assert numbers["top"][str(k)] == pytest.approx(ordered[k - 1], rel=1e-6)
        largest = [max(layer.max() for layer in one[index][first:]) for one in found]
        assert values[kind]["by_text"] == pytest.approx(largest, rel=1e-6, abs=1e-6)
    monkeypatch.setattr(activation_outliers, "AT_ONCE", 7 * N)
    again = ActivationOutliers().run(tiny.subject(model, documents), config)
    assert again["logits"]["count"] == values["logits"]["count"], (
        "some queries at a time are all of them in the end"
    )
    assert again["logits"]["median"] == pytest.approx(values["logits"]["median"], rel=1e-6)


def test_a_map_that_is_asked_for_twice_counts_once() -> None:
    config = DiffLlamaConfig(vocab_size=320, num_key_value_heads=2, head_dim=8, **tiny.SIZES)
    subject = tiny.subject(DiffLlamaForCausalLM(config).eval(), tiny.store([N]))
    values = ActivationOutliers().run(subject, ActivationOutliersConfig(length=N, tokens=1))
    assert values["logits"]["count"] == 2 * 4 * N * (N + 1) // 2


def test_the_report_compares_text_by_text() -> None:
    documents = tiny.store([N] * 6)
    config = ActivationOutliersConfig(length=N, tokens=6 * N)
    plain = ActivationOutliers().run(tiny.subject(tiny.llama(), documents), config)
    model = tiny.llama()
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.q_proj.weight.mul_(3)
    larger = ActivationOutliers().run(tiny.subject(model, documents), config)
    section = ActivationOutliers().section(run_of({"plain": plain, "larger": larger}, "activation_outliers"))
    assert "larger is worse than plain" in section.answer
    assert section.tables[0].rows[0][0] == "plain, attention logits" and len(section.tables[0].rows) == 4
    assert section.tables[1].rows[1][1] == "38.8"
    same = ActivationOutliers().section(run_of({"a": plain, "b": plain}, "activation_outliers"))
    assert "No difference from a detected for b" in same.answer


def test_what_cannot_be_measured_is_skipped_with_the_reason() -> None:
    config = ActivationOutliersConfig(length=N)
    short = ActivationOutliers().run(tiny.subject(tiny.llama(), tiny.store([9])), config)
    assert f"no document has {N} tokens" in short["skipped"]
    table = ActivationOutliers().run(tiny.subject(tiny.gpt2()), ActivationOutliersConfig(length=64))
    assert "more than the model takes" in table["skipped"]
    broken = tiny.llama()
    with torch.no_grad():
        broken.model.layers[1].mlp.down_proj.weight.fill_(math.inf)
    found = ActivationOutliers().run(tiny.subject(broken, tiny.store([N])), config)
    assert "infinite or not numbers" in found["skipped"]
    silent = tiny.CopyModel(tiny.CopyConfig()).eval()
    assert (
        "no list of 1 layers"
        in ActivationOutliers().run(tiny.subject(silent, tiny.store([N])), config)["skipped"]
    )

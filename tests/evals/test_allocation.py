"""Attention shares on maps that are known exactly, and maps of real models against their own projections."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from transformers import DiffLlamaConfig, DiffLlamaForCausalLM

from clearhead.data.needles import NeedleSample, NeedleSpec
from clearhead.data.prepare import PreparedData
from clearhead.evals.asking.needle_documents import documents
from clearhead.evals.asking.running import inference
from clearhead.evals.internals.allocation import PARTS, Allocation, AllocationConfig, split_row
from clearhead.evals.probing.attention_rows import _cut_to, query_rows
from tests.evals import tiny
from tests.evals.conftest import Subjects
from tests.evals.fakes import FakeModel, uniform, uniform_maps
from tests.evals.test_activation_outliers import run_of

V = 512


def sizes(sample: NeedleSample) -> dict[str, float]:
    """Keys of each part, as shares of all keys of the query: what uniform attention gives."""
    query = sample.answers[0].start - 1
    answer = sample.needle_spans[0].stop - sample.needle_spans[0].start
    question = sample.question_spans[0].stop - sample.question_spans[0].start
    keys = query + 1
    return {
        "answer": answer / keys,
        "question": question / keys,
        "first token": 1 / keys,
        "noise": (keys - answer - question - 1) / keys,
    }


@pytest.mark.parametrize("normalisation", ["absolute", "net", "positive", "row", "signed"])
def test_uniform_attention_gives_the_exact_shares(subject: Subjects, normalisation: str) -> None:
    one = subject(FakeModel(uniform(V), uniform_maps()))
    config = AllocationConfig(length=96, samples=3, depths=[0.0, 0.5], normalisation=normalisation)
    values = Allocation().run(one, config)
    expected = sizes(documents(one, NeedleSpec(length=96, needles=4), 0.0, 1, config.seed)[0])
    for part in PARTS:
        assert np.mean(values["parts"][part]) == pytest.approx(expected[part], abs=1e-6)
        assert values["by_layer"][part] == pytest.approx([expected[part]] * 2, abs=1e-6)
        assert values["by_depth"][part] == pytest.approx([expected[part]] * 2, abs=1e-6)
        assert values["uniform"][part] == pytest.approx(expected[part], abs=1e-6)
    assert sum(np.mean(values["parts"][part]) for part in PARTS) == pytest.approx(1.0, abs=1e-5)
    assert values["negative"] == 0.0 and values["n"] == 6
    assert np.shape(values["answer_by_head"]) == (2, 3)


def test_the_model_is_measured_eagerly_and_left_as_it_was(subject: Subjects) -> None:
    model = FakeModel(uniform(V), uniform_maps()).train()
    Allocation().run(subject(model), AllocationConfig(length=96, samples=1, depths=[0.5]))
    assert model.implementations == ["eager", "sdpa"] and model.training


def test_a_difference_of_maps_by_hand(subject: Subjects, data: PreparedData) -> None:
    """A1 looks at the answer only, A2 everywhere alike: row = A1 - 0.5 A2, over n keys."""
    one = subject(FakeModel(uniform(V)))
    sample = documents(one, NeedleSpec(length=96, needles=4), 0.5, 1, 0)[0]
    query = sample.answers[0].start - 1
    n, span = query + 1, sample.needle_spans[0]
    width = span.stop - span.start
    row = torch.full((1, n), -0.5 / n, dtype=torch.float64)
    row[0, span] += 1 / width

    answer = 1 - 0.5 * width / n
    rest = 0.5 * (n - width) / n
    shares, negative = split_row(row, sample, "absolute")
    assert shares[0, 0] == pytest.approx(answer / (answer + rest))
    assert shares.sum() == pytest.approx(1.0)
    assert negative[0] == pytest.approx(rest / (answer + rest))

    signed, _ = split_row(row, sample, "signed")
    assert signed.sum() == pytest.approx(0.5), "a differential row sums to 1 - lambda"
    assert signed[0, 0] == pytest.approx(answer)
    per_row, _ = split_row(row, sample, "row")
    assert per_row[0] == pytest.approx(signed[0] / 0.5)
    assert per_row[0, 2] == pytest.approx(-1 / n), "the first token's weight is negative and shown so"


def test_attention_to_one_place_counts_there(subject: Subjects) -> None:
    one = subject(FakeModel(uniform(V)))
    sample = documents(one, NeedleSpec(length=96, needles=4), 1.0, 1, 0)[0]
    query = sample.answers[0].start - 1
    places = {
        "answer": sample.needle_spans[0].start,
        "question": query,
        "first token": 0,
        "noise": 1,
    }
    for index, part in enumerate(PARTS):
        row = torch.zeros(2, query + 1)
        row[:, places[part]] = 1.0
        shares, _ = split_row(row, sample)
        assert shares[:, index].tolist() == [1.0, 1.0], part


def test_no_room_is_skipped_with_the_reason(subject: Subjects) -> None:
    values = Allocation().run(
        subject(FakeModel(uniform(V), uniform_maps())), AllocationConfig(length=24, needles=8)
    )
    assert "8 needles need at least" in values["skipped"]


def rotated(x: np.ndarray) -> np.ndarray:
    """(N, D) at positions 0, 1, …, turned in pairs (j, j + D/2)."""
    half = x.shape[1] // 2
    angles = np.arange(len(x))[:, None] * 10000.0 ** (-np.arange(half) / half)
    cos, sin = np.cos(angles), np.sin(angles)
    first, second = x[:, :half], x[:, half:]
    return np.concatenate([first * cos - second * sin, second * cos + first * sin], axis=1)


def softmax_row(q: np.ndarray, k: np.ndarray, query: int) -> np.ndarray:
    """Weights of one query over all keys, 0 where it does not see."""
    logits = (rotated(k) @ rotated(q)[query] / math.sqrt(q.shape[1]))[: query + 1]
    weights = np.exp(logits - logits.max())
    return np.concatenate([weights / weights.sum(), np.zeros(len(k) - query - 1)])


def first_layer_rows(model: Any, ids: list[int], query: int) -> np.ndarray:
    """(H, L) effective weights of the first layer, from its projections."""
    layer = model.model.layers[0]
    with torch.no_grad():
        x = layer.input_layernorm(model.model.embed_tokens(torch.tensor(ids)))
        q = layer.self_attn.q_proj(x).numpy().reshape(len(ids), 4, 8)
        k = layer.self_attn.k_proj(x).numpy().reshape(len(ids), -1, 8)
    repeats = 4 // k.shape[1]
    if model.config.model_type == "llama":
        return np.stack([softmax_row(q[:, h], k[:, h // repeats], query) for h in range(4)])
    ours = model.config.model_type == "clearhead"
    source = layer.self_attn.variant if ours else layer.self_attn
    vectors = {n: getattr(source, f"lambda_{n}").detach().double().numpy() for n in ("q1", "k1", "q2", "k2")}
    lam = math.exp(vectors["q1"] @ vectors["k1"]) - math.exp(vectors["q2"] @ vectors["k2"]) + 0.2
    # Ours: stream s of head i is head 2i + s; Hugging Face's: head s · H + i. Keys pair up alike.
    pairs = [(2 * i, 2 * i + 1) if ours else (i, 2 + i) for i in range(2)]
    signal, noise = (
        np.stack([softmax_row(q[:, p[s]], k[:, p[s] // repeats], query) for p in pairs]) for s in (0, 1)
    )
    return signal - lam * noise


def diffllama() -> DiffLlamaForCausalLM:
    torch.manual_seed(0)
    config = DiffLlamaConfig(
        vocab_size=320, num_key_value_heads=2, head_dim=8, initializer_range=0.2, **tiny.SIZES
    )
    return DiffLlamaForCausalLM(config).eval()


@pytest.mark.parametrize(
    "make", [tiny.llama, diffllama, lambda: tiny.ours(attention="differential")], ids=["llama", "hf", "v1"]
)
def test_rows_are_those_of_the_projections_and_of_no_other_query(make: Any) -> None:
    model = make().double()
    ids = torch.from_numpy(np.random.default_rng(0).integers(3, 320, (2, 20)))
    queries = [11, 17]
    hooks = [len(module._forward_hooks) for module in model.modules()]
    with inference(model, "eager"):
        rows = query_rows(model, ids, torch.tensor(queries))
        held: list[torch.Size] = []
        with _cut_to(model, torch.tensor(queries)):
            output = model(input_ids=ids, use_cache=False, output_attentions=True)
            held = [layer.shape for layer in output.attentions]
    assert len(rows) == 2 and all(shape[-2] == 1 for shape in held), "no whole map outlives its layer"
    for index, query in enumerate(queries):
        truth = first_layer_rows(model, ids[index].tolist(), query)
        # λ is computed in float32.
        np.testing.assert_allclose(rows[0][index].numpy(), truth, atol=2e-7)
    # Hugging Face installs hooks of its own with the first maps that it is asked for; ours are gone.
    left = [module._forward_hooks for module in model.modules()]
    assert not any("_cut_to" in hook.__qualname__ for found in left for hook in found.values())
    assert len(hooks) == len(left)


@pytest.mark.parametrize("make", [tiny.llama, tiny.ours, lambda: tiny.ours(attention="differential_v2")])
def test_any_model_is_measured_and_batches_change_nothing(make: Any) -> None:
    model = make()
    before = model.config._attn_implementation
    one = tiny.subject(model, tiny.store([200] * 3), external=True)
    config = AllocationConfig(length=64, samples=3, depths=[0.0, 1.0], needles=2)
    values = Allocation().run(one, config)
    assert model.config._attn_implementation == before
    assert np.shape(values["by_depth_and_layer"]["answer"]) == (2, 2)
    assert np.mean(values["by_depth_and_layer"]["noise"]) == pytest.approx(
        np.mean(values["by_layer"]["noise"]), abs=1e-6
    )
    assert sum(np.mean(values["parts"][part]) for part in PARTS) == pytest.approx(1.0, abs=1e-5)
    single = Allocation().run(one, config.model_copy(update={"batch_tokens": 1}))
    for part in PARTS:
        np.testing.assert_allclose(single["parts"][part], values["parts"][part], atol=2e-6)
    section = Allocation().section(run_of({"a": values, "b": values}, "allocation"))
    assert "No difference from a detected for b" in section.answer
    assert [chart.slug for chart in section.charts][-1] == "allocation-noise-by-depth-and-layer"
    assert section.tables[1].rows[0] == ["0%", "0.03", "0.27", "0.51", "0.01"]


def test_net_and_positive_shares_by_hand(subject: Subjects) -> None:
    sample = documents(subject(FakeModel(uniform(V))), NeedleSpec(length=96, needles=4), 0.5, 1, 0)[0]
    query = sample.answers[0].start - 1
    row = torch.zeros(1, query + 1)
    row[0, 0], row[0, sample.needle_spans[0].start], row[0, query] = 0.5, -0.25, 0.25
    net, negative = split_row(row, sample, "net")
    assert net[0].tolist() == [-0.25, 0.25, 0.5, 0.0] and negative[0] == 0.25
    positive, _ = split_row(row, sample, "positive")
    np.testing.assert_allclose(positive[0], [0.0, 1 / 3, 2 / 3, 0.0], atol=1e-12)


def test_what_cannot_be_asked_is_skipped_with_the_reason() -> None:
    small = AllocationConfig(length=64, samples=1, needles=1)
    assert (
        "5 tokens in all" in Allocation().run(tiny.subject(tiny.llama(), tiny.store([5])), small)["skipped"]
    )
    nothing = tiny.tokenizer()
    nothing.bos_token = None
    found = Allocation().run(tiny.subject(tiny.llama(), tiny.store([99]), tokenizer=nothing), small)
    assert "no bos token" in found["skipped"]
    found = Allocation().run(tiny.subject(tiny.gpt2(), tiny.store([99])), small)
    assert "more than the model takes" in found["skipped"]
    silent = FakeModel(uniform(320), lambda length: [])
    found = Allocation().run(tiny.subject(silent, tiny.store([99])), small)
    assert "gives no attention maps" in found["skipped"]

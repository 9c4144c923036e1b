"""Attention shares on maps that are known exactly."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from clearhead.data.needles import NeedleSample, NeedleSpec
from clearhead.data.packing import PreparedData
from clearhead.evals.allocation import PARTS, Allocation, AllocationConfig, split_row
from clearhead.evals.needles import documents
from tests.evals.conftest import Subjects
from tests.evals.fakes import FakeModel, uniform, uniform_maps

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


@pytest.mark.parametrize("normalisation", ["absolute", "row", "signed"])
def test_uniform_attention_gives_the_exact_shares(subject: Subjects, normalisation: str) -> None:
    one = subject(FakeModel(uniform(V), uniform_maps()))
    config = AllocationConfig(length=96, samples=3, depths=[0.0, 0.5], normalisation=normalisation)
    values = Allocation().run(one, config)
    expected = sizes(documents(one, NeedleSpec(length=96, needles=4), 0.0, 1, config.seed)[0])
    for part in PARTS:
        assert np.mean(values["parts"][part]) == pytest.approx(expected[part], abs=1e-6)
        assert values["by_layer"][part] == pytest.approx([expected[part]] * 2, abs=1e-6)
        assert values["by_depth"][part] == pytest.approx([expected[part]] * 2, abs=1e-6)
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

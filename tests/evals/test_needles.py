"""Needle retrieval on models that copy, that cannot, and that see only so far."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from clearhead.data.needles import NeedleSpec, needle_document
from clearhead.data.prepare import PreparedData
from clearhead.evals.asking.needle_documents import documents, exact_match, needle_probe
from clearhead.evals.retrieval.needles import Needles, NeedlesConfig, headline_cell
from tests.evals.conftest import Subjects
from tests.evals.fakes import FakeModel, constant, copier, uniform

V = 512
SMALL = {"lengths": [96], "depths": [0.0, 1.0], "samples": 6, "untrained_samples": 2}


def test_a_perfect_copier_gets_everything(subject: Subjects) -> None:
    values = Needles().run(
        subject(FakeModel(copier(V)), FakeModel(uniform(V))), NeedlesConfig(needles=[1, 4], **SMALL)
    )
    assert [cell["hits"] for cell in values["cells"]] == [6, 6, 6, 6]
    assert {cell["correct"] for cell in values["cells"]} == {"111111"}
    assert [cell["untrained_hits"] for cell in values["cells"]] == [0, 0, 0, 0]
    assert values["n"] == 24 and 0 < values["chance"] < 1e-2


def test_a_constant_model_gets_nothing(subject: Subjects) -> None:
    values = Needles().run(subject(FakeModel(constant(V, 300))), NeedlesConfig(needles=[1], **SMALL))
    assert [cell["hits"] for cell in values["cells"]] == [0, 0]


def test_depth_is_where_it_says(subject: Subjects) -> None:
    # A model that sees 40 tokens back finds the fact right before the question and not the one at the start.
    values = Needles().run(subject(FakeModel(copier(V, window=40))), NeedlesConfig(needles=[1], **SMALL))
    assert {cell["depth"]: cell["hits"] for cell in values["cells"]} == {0.0: 0, 1.0: 6}


def test_every_token_of_the_value_has_to_be_right(data: PreparedData) -> None:
    sample = _sample(data)
    answer = sample.answers[0]

    def nearly(ids: torch.Tensor) -> torch.Tensor:
        out = copier(V)(ids)
        out[:, answer.stop - 2] = 0.0
        return out

    device = torch.device("cpu")
    assert exact_match(FakeModel(copier(V)), [sample], device) == [True]  # type: ignore[arg-type]
    assert exact_match(FakeModel(nearly), [sample], device) == [False]  # type: ignore[arg-type]


def test_exact_match_is_greedy_decoding(data: PreparedData) -> None:
    sample = _sample(data)
    ids = torch.from_numpy(sample.input_ids[: sample.answers[0].start])[None]
    for _ in range(2):
        ids = torch.cat([ids, copier(V)(ids)[:, -1:].argmax(-1)], dim=1)
    assert ids[0, -2:].tolist() == sample.input_ids[sample.answers[0]].tolist()


def test_all_arms_get_the_same_documents(subject: Subjects, data: PreparedData) -> None:
    spec = NeedleSpec(length=96, needles=2)
    first = documents(subject(FakeModel(uniform(V))), spec, 0.5, 3, 7)
    again = documents(subject(FakeModel(copier(V))), spec, 0.5, 3, 7)
    other = documents(subject(FakeModel(copier(V))), spec, 0.25, 3, 7)
    assert all((a.input_ids == b.input_ids).all() for a, b in zip(first, again, strict=True))
    assert not (first[0].input_ids == other[0].input_ids).all()


def test_lengths_without_room_are_skipped_with_their_reason(subject: Subjects) -> None:
    config = NeedlesConfig(
        needles=[1, 8], lengths=[48, 96, 8192], depths=[0.5], samples=2, untrained_samples=0
    )
    values = Needles().run(subject(FakeModel(copier(V))), config)
    assert {(cell["needles"], cell["length"]) for cell in values["cells"]} == {(1, 48), (1, 96), (8, 96)}
    assert "more than the model takes" in values["skipped_cells"]["1 x 8192"]
    assert "at least" in values["skipped_cells"]["8 x 48"]
    nothing = Needles().run(subject(FakeModel(copier(V), limit=8)), config)
    assert "more than the model takes" in nothing["skipped"]


def test_a_batch_of_rows_scores_like_one_by_one(data: PreparedData) -> None:
    samples = [_sample(data, index) for index in range(5)]
    model = FakeModel(copier(V, window=60))
    device = torch.device("cpu")
    together = exact_match(model, samples, device)  # type: ignore[arg-type]
    alone = [exact_match(model, [sample], device, 1)[0] for sample in samples]  # type: ignore[arg-type]
    assert together == alone


def test_the_probe_is_the_same_measure(data: PreparedData) -> None:
    spec = NeedleSpec(length=96, needles=3, questions=2)
    model = FakeModel(copier(V)).train()
    accuracy = needle_probe(model, data.validation, data.tokenizer, spec, samples=4)  # type: ignore[arg-type]
    assert accuracy == 1.0
    assert model.training, "the probe leaves the model as it was"
    assert needle_probe(FakeModel(uniform(V)), data.validation, data.tokenizer, spec, samples=4) == 0.0  # type: ignore[arg-type]


def test_the_headline_is_the_longest_trained_length() -> None:
    assert headline_cell([(1, 64), (1, 128), (1, 256), (4, 64)], 128) == (1, 128)
    assert headline_cell([(2, 512), (2, 256)], 128) == (2, 256)
    assert headline_cell([(1, 64), (1, 128)], None) == (1, 128)


@pytest.mark.parametrize("bad", [{"lengths": []}, {"samples": 0}, {"length": [3]}])
def test_options_are_checked(bad: dict[str, object]) -> None:
    with pytest.raises(ValueError):
        NeedlesConfig.model_validate(bad)


def _sample(data: PreparedData, index: int = 0):  # type: ignore[no-untyped-def]
    spec = NeedleSpec(length=96, needles=2)
    sample = needle_document(
        spec, seed=1, index=index, haystack=data.validation, split="validation", tokenizer=data.tokenizer
    )
    assert isinstance(sample.input_ids, np.ndarray)
    return sample

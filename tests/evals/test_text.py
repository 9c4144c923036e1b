"""Bits per byte and loss by position on models whose losses are known exactly."""

from __future__ import annotations

import itertools
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from clearhead.analysis.by_length import bucket_edges
from clearhead.data.prepare import PreparedData
from clearhead.evals.asking.texts import choose
from clearhead.evals.text.language_modelling import LanguageModelling, LanguageModellingConfig, cut
from clearhead.evals.text.loss_by_position import LossByPosition, LossByPositionConfig
from tests.evals import tiny
from tests.evals.conftest import Subjects
from tests.evals.fakes import FakeModel, copier, costing, uniform

V = 512


@pytest.mark.parametrize("stride", [None, 1, 63, 100])
def test_a_model_that_knows_nothing_pays_log2_v_for_every_token(
    subject: Subjects, data: PreparedData, stride: int | None
) -> None:
    config = LanguageModellingConfig(length=128, stride=stride, max_tokens=300, max_documents=5)
    values = LanguageModelling().run(subject(FakeModel(uniform(V))), config)
    assert values["n"] == 5
    assert values["bits_per_byte"] == pytest.approx(
        values["tokens"] * math.log2(V) / sum(values["bytes"]), rel=1e-5
    )
    assert values["perplexity"] == pytest.approx(V, rel=1e-5)


def test_a_whole_document_counts_its_own_bytes_and_a_cut_one_those_of_its_tokens(
    subject: Subjects, data: PreparedData
) -> None:
    model = FakeModel(uniform(V))
    whole = LanguageModelling().run(subject(model), LanguageModellingConfig(max_tokens=10**6))
    assert whole["bytes"] == data.validation.utf8_bytes.tolist()
    part = LanguageModelling().run(subject(model), LanguageModellingConfig(max_tokens=50))
    text = data.tokenizer.decode(data.validation.document(0)[:50].tolist())
    assert part["bytes"][0] == len(text.encode())


def test_context_helps_a_model_that_uses_it(subject: Subjects) -> None:
    model = FakeModel(copier(V))
    config = {"length": 64, "max_tokens": 192, "max_documents": 3}
    far = LanguageModelling().run(subject(model), LanguageModellingConfig(stride=63, **config))
    near = LanguageModelling().run(subject(model), LanguageModellingConfig(stride=8, **config))
    assert near["bits_per_byte"] < far["bits_per_byte"]


def test_windows_count_every_token_once() -> None:
    for total in (2, 7, 8, 9, 31):
        tokens = np.arange(total)
        counted = [row[first:] for row, first in cut(tokens, 8, 3)]
        assert np.concatenate(counted).tolist() == list(range(1, total))
        assert all(len(row) <= 8 for row, _ in cut(tokens, 8, 3))


def test_documents_are_drawn_once_and_the_same_every_time() -> None:
    assert choose(5, 9, 0) == [0, 1, 2, 3, 4]
    drawn = choose(1000, 50, 3)
    assert drawn == choose(1000, 50, 3) == sorted(set(drawn)) and drawn != choose(1000, 50, 4)


def test_too_long_for_the_model_is_skipped_with_the_reason(subject: Subjects) -> None:
    values = LanguageModelling().run(
        subject(FakeModel(uniform(V), limit=64)), LanguageModellingConfig(length=128)
    )
    assert values == {"skipped": "128 tokens is more than the model takes (max_position_embeddings = 64)"}


def test_loss_by_position_gives_back_the_known_curve(subject: Subjects) -> None:
    def nats(position: int) -> float:
        return 2.0 + 1.0 / position if position < 128 else 5.0

    config = LossByPositionConfig(length=256, buckets=12, max_documents=6)
    values = LossByPosition().run(subject(FakeModel(costing(V, nats))), config)
    edges = [0, *values["positions"]]
    truth = [nats(p) for p in range(1, 256)]
    for index, (start, end) in enumerate(itertools.pairwise(edges)):
        assert values["loss"]["mean"][index] == pytest.approx(np.mean(truth[start:end]), abs=1e-4)
        assert values["cumulative"]["mean"][index] == pytest.approx(np.mean(truth[:end]), abs=1e-4)
    assert values["n"] == 6
    assert np.mean(values["within"]) == pytest.approx(np.mean(truth[:127]), abs=1e-4)
    assert np.mean(values["beyond"]) == pytest.approx(5.0, abs=1e-4)


def test_loss_by_position_needs_long_documents(subject: Subjects) -> None:
    values = LossByPosition().run(
        subject(FakeModel(uniform(V), limit=10**6)), LossByPositionConfig(length=10**6)
    )
    assert values["skipped"].startswith("only 0 documents have 1000000 tokens")


def test_buckets_cover_every_position_once() -> None:
    for positions, buckets in ((255, 32), (7, 32), (1, 2), (511, 2)):
        edges = bucket_edges(positions, buckets)
        assert edges[0] == 0 and edges[-1] == positions and edges == sorted(set(edges))


@pytest.mark.parametrize("bos", ["document", "none"])
@pytest.mark.parametrize("make", [tiny.llama, tiny.ours])
def test_loss_by_position_of_any_model_is_that_of_its_logits(make: Any, bos: str) -> None:
    model, words = make().double(), tiny.tokenizer()
    documents = tiny.store([40, 45, 50, 30, 41])
    config = LossByPositionConfig(length=40, bos=bos, buckets=6, batch_tokens=80)
    values = LossByPosition().run(tiny.subject(model, documents), config)
    assert values["n"] == 4 and values["documents"] == ["0", "1", "2", "4"], "the short one is left out"
    nats, sizes = [], []
    for i in (0, 1, 2, 4):
        text = documents.document(i).tolist()
        ids = [1, *text][:40] if bos == "document" else text[:40]
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([ids])).logits[0].numpy()
        shifted = logits - logits.max(-1, keepdims=True)
        table = np.log(np.exp(shifted).sum(-1, keepdims=True)) - shifted
        nats.append([table[p - 1, ids[p]] for p in range(1, 40)])
        sizes.append([len(words.decode(ids[1:p]).encode()) for p in range(2, 41)])
    truth, size = np.array(nats), np.array(sizes)
    start = 0
    for index, end in enumerate(values["positions"]):
        assert values["loss"]["mean"][index] == pytest.approx(truth[:, start:end].mean(), abs=2e-5)
        assert values["cumulative"]["mean"][index] == pytest.approx(truth[:, :end].mean(), abs=2e-5)
        whole = truth[:, :end].sum() / math.log(2) / size[:, end - 1].sum()
        assert values["bits_per_byte"]["mean"][index] == pytest.approx(whole, abs=2e-5)
        start = end
    again = LossByPosition().run(
        tiny.subject(model, documents), config.model_copy(update={"batch_tokens": 1})
    )
    assert again == values, "batches do not change a loss"


def test_loss_by_position_reads_named_texts_and_keeps_within_the_model(tmp_path: Path) -> None:
    for number in range(4):
        (tmp_path / f"{number}.txt").write_text("The grass is green and the sky is blue. " * 8)
    subject = tiny.subject(tiny.llama(), tiny.store([8]), external=True)
    values = LossByPosition().run(subject, LossByPositionConfig(texts=[str(tmp_path)]))
    assert values["n"] == 4 and values["length"] == 32
    table = LossByPosition().run(tiny.subject(tiny.gpt2()), LossByPositionConfig(length=40))
    assert "more than the model takes" in table["skipped"]

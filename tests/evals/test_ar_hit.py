"""Recall slices by hand and on models whose losses are known."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from clearhead.data.store import TokenStore
from clearhead.evals.text.ar_hit import ArHit, ArHitConfig, seen_before
from tests.evals import tiny
from tests.evals.fakes import FakeModel, copier, costing
from tests.evals.test_activation_outliers import run_of

N = 24


def repeating(documents: int, size: int, words: int = 6) -> TokenStore:
    """Few different tokens, so that bigrams come back."""
    rng = np.random.default_rng(0)
    texts = [rng.integers(3, 3 + words, size).tolist() for _ in range(documents)]
    return TokenStore.from_documents(texts, bos_token_id=1)


def test_hits_by_hand() -> None:
    tokens = np.array([5, 6, 7, 5, 6, 5, 6, 7, 7, 7])
    # Bigrams: 56 67 75 56* 65 56* 67* 77 77*
    assert seen_before(tokens, 2).astype(int).tolist() == [0, 0, 0, 0, 1, 0, 1, 1, 0, 1]
    # Trigrams: 567 675 756 565 656 567* 677 777
    assert seen_before(tokens, 3).astype(int).tolist() == [0, 0, 0, 0, 0, 0, 0, 1, 0, 0]
    assert seen_before(tokens, 1).astype(int).tolist() == [0, 0, 0, 1, 1, 1, 1, 1, 1, 1]
    assert not seen_before(tokens, 11).any()


@pytest.mark.parametrize("n", [1, 2, 4])
def test_hits_by_exhaustion(n: int) -> None:
    tokens = np.random.default_rng(n).integers(0, 3, 40)
    for p, hit in enumerate(seen_before(tokens, n)):
        gram = tokens[max(0, p - n + 1) : p + 1].tolist()
        before = [tokens[e - n + 1 : e + 1].tolist() for e in range(n - 1, p)]
        assert hit == (p >= n - 1 and gram in before)


@pytest.mark.parametrize("bos", [True, False])
def test_slices_of_known_losses(bos: bool) -> None:
    documents, words = repeating(5, N), tiny.tokenizer()
    if not bos:
        words.bos_token = None

    def nats(position: int) -> float:
        return 0.5 + position / 10

    subject = tiny.subject(FakeModel(costing(320, nats)), documents, tokenizer=words)
    values = ArHit().run(subject, ArHitConfig(length=N))
    assert values["n"] == 5 and values["n_gram"] == 2
    for n in (2, 3, 4):
        found = values["slices"][str(n)]
        for i in range(5):
            text = documents.document(i).tolist()[: N - bos]
            hits = [
                any(text[e - n + 1 : e + 1] == text[p - n + 1 : p + 1] for e in range(n - 1, p))
                for p in range(len(text))
            ]
            # The token at index p of the text stands at p + 1 behind a bos; without one the first is not predicted.
            pairs = [(hits[p], nats(p + bos)) for p in range(0 if bos else 1, len(text))]
            assert found["hit_tokens"][i] == sum(hit for hit, _ in pairs)
            assert found["hit_nats"][i] == pytest.approx(sum(v for hit, v in pairs if hit), abs=1e-3)
            assert found["others_nats"][i] == pytest.approx(sum(v for hit, v in pairs if not hit), abs=1e-3)
            assert found["hit_tokens"][i] + found["others_tokens"][i] == N - 1


@pytest.mark.parametrize("make", [tiny.llama, lambda: tiny.ours(attention="differential")], ids=["hf", "v1"])
def test_any_model_gives_the_losses_of_its_logits_in_any_batch(make: Any) -> None:
    model, documents = make().double(), repeating(5, N)
    values = ArHit().run(tiny.subject(model, documents), ArHitConfig(length=N))
    found = values["slices"]["2"]
    for i in range(5):
        ids = [1, *documents.document(i).tolist()[: N - 1]]
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([ids])).logits[0].numpy()
        total = np.log(np.exp(logits).sum(-1))
        nats = np.array([total[p - 1] - logits[p - 1, ids[p]] for p in range(1, N)])
        hits = seen_before(np.array(ids[1:]), 2)
        assert found["hit_nats"][i] == pytest.approx(nats[hits].sum(), abs=1e-3)
        assert found["others_nats"][i] == pytest.approx(nats[~hits].sum(), abs=1e-3)
    single = ArHit().run(tiny.subject(model, documents), ArHitConfig(length=N, batch_tokens=1))
    assert single == values


def test_a_model_that_looks_back_gains_where_there_is_something_to_find() -> None:
    rng = np.random.default_rng(0)
    texts = [2 * (3 + rng.permutation(300)[:30]).tolist() for _ in range(16)]
    documents = TokenStore.from_documents(texts, bos_token_id=1)
    config = ArHitConfig(length=60)
    looks = ArHit().run(tiny.subject(FakeModel(copier(320)), documents), config)
    blind = ArHit().run(tiny.subject(FakeModel(lambda ids: torch.zeros(*ids.shape, 320)), documents), config)
    section = ArHit().section(run_of({"blind": blind, "looks": looks}, "ar_hit"))
    recall, rest = section.answer.split("On all other tokens:")
    assert "tokens that end a bigram seen before" in recall and "looks is better than blind" in recall
    assert "looks is worse than blind" in rest
    assert section.tables[0].rows[0][0] == "blind, a bigram" and section.tables[1].rows[3][2] == "0.880"
    same = ArHit().section(run_of({"a": blind, "b": blind}, "ar_hit"))
    assert same.answer.count("No difference from a detected for b") == 2


def test_what_cannot_be_sliced_is_skipped_with_the_reason() -> None:
    config = ArHitConfig(length=N)
    never = TokenStore.from_documents([list(range(3, 60))] * 8, bos_token_id=1)
    found = ArHit().run(tiny.subject(tiny.llama(), never), config)
    assert "only 0 documents have 24 tokens, of which some repeat an n-gram of 2" in found["skipped"]
    short = ArHit().run(tiny.subject(tiny.llama(), repeating(9, 10)), config)
    assert "only 0 documents" in short["skipped"]
    table = ArHit().run(tiny.subject(tiny.gpt2()), ArHitConfig(length=64))
    assert "more than the model takes" in table["skipped"]

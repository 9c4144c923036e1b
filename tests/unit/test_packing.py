"""Stores, packing and evaluation windows, as properties over random documents."""

from __future__ import annotations

import itertools
import json
import os
import pickle
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from clearhead.data.packing import TokenStore, pack_text, validation_windows
from clearhead.data.readers import CorpusError
from clearhead.data.store import DamagedStore, TokenWriter

BOS = 1


def numbered(lengths: list[int]) -> TokenStore:
    """Documents whose tokens are all different, so that a token says where it came from."""
    borders = np.concatenate([[0], np.cumsum(lengths)]) + 10
    return TokenStore.from_documents(
        [list(range(a, b)) for a, b in itertools.pairwise(borders)], bos_token_id=BOS
    )


# -- packing -----------------------------------------------------------------------------------------------------------

lengths_of_documents = st.lists(st.integers(0, 40), min_size=1, max_size=12)


@settings(max_examples=150, deadline=None)
@given(
    lengths=lengths_of_documents, length=st.integers(2, 17), seed=st.integers(0, 5), epoch=st.integers(0, 3)
)
def test_an_epoch_is_the_shuffled_documents_cut_into_rows(
    lengths: list[int], length: int, seed: int, epoch: int
) -> None:
    store = numbered(lengths)
    total = sum(lengths) + len(lengths)
    if total < length:
        with pytest.raises(CorpusError, match="less than one row"):
            pack_text(store, length, seed, document_masks=True)
        return
    rows = pack_text(store, length, seed, document_masks=True)
    assert len(rows) == total // length
    flat = [rows[epoch * len(rows) + i] for i in range(len(rows))]
    ids = np.concatenate([row["input_ids"] for row in flat])
    assert all(row[key].shape == (length,) and row[key].dtype == np.int64 for row in flat for key in row)

    counts = Counter(ids[ids != BOS].tolist())
    assert set(counts.values()) <= {1}, "a token was used twice"
    assert total - len(ids) < length, "more than a tail was dropped"

    # Walk the stream: a document is bos and its tokens in order, and it starts only where the last one ended.
    firsts = {int(store.tokens[store.offsets[i]]): i for i in range(len(store)) if lengths[i]}
    for row in flat:
        position = -1
        for at in range(length):
            token = int(row["input_ids"][at])
            restart = at == 0 or token == BOS
            position = 0 if restart else position + 1
            assert row["position_ids"][at] == position
            assert row["labels"][at] == (-100 if restart else token)
    for before, token in itertools.pairwise(ids):
        if token != BOS:
            assert token in firsts if before == BOS else token == before + 1
            assert (before == BOS) == (token in firsts)


@settings(max_examples=50, deadline=None)
@given(lengths=lengths_of_documents, length=st.integers(2, 9), seed=st.integers(0, 5))
def test_without_document_masks_only_the_positions_differ(lengths: list[int], length: int, seed: int) -> None:
    store = numbered([*lengths, 20])
    masked = pack_text(store, length, seed, document_masks=True)
    plain = pack_text(store, length, seed, document_masks=False)
    for i in range(2 * len(masked)):
        assert np.array_equal(masked[i]["input_ids"], plain[i]["input_ids"])
        assert np.array_equal(masked[i]["labels"], plain[i]["labels"])
        assert np.array_equal(plain[i]["position_ids"], np.arange(length))


def test_epochs_and_seeds_shuffle_differently() -> None:
    store = numbered([5] * 30)

    def epoch(seed: int, number: int) -> list[int]:
        rows = pack_text(store, 6, seed, document_masks=True)
        return [int(rows[number * len(rows) + i]["input_ids"][1]) for i in range(len(rows))]

    orders = [tuple(epoch(seed, number)) for seed in (0, 1) for number in (0, 1, 2)]
    assert len(set(orders)) == 6
    assert len({frozenset(order) for order in orders}) == 1


def test_a_row_depends_on_nothing_but_seed_and_index_not_even_the_process(tmp_path: Path) -> None:
    with TokenWriter(tmp_path / "s", vocab_size=2000, bos_token_id=BOS) as writer:
        for index in range(40):
            writer.add(str(index), list(range(20 * index + 10, 20 * index + 25 + index % 13)), 1)
    rows = pack_text(TokenStore.load(tmp_path / "s"), 32, 7, document_masks=True)
    wanted = [3 * len(rows) + 2, 0, len(rows), 1]
    here = [rows[i]["input_ids"].tolist() for i in wanted]
    script = (
        "import json, sys; from pathlib import Path; from clearhead.data.packing import TokenStore, pack_text;"
        "rows = pack_text(TokenStore.load(Path(sys.argv[1])), 32, 7, document_masks=True);"
        "print(json.dumps([rows[i]['input_ids'].tolist() for i in json.loads(sys.argv[2])]))"
    )
    there = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path / "s"), json.dumps(wanted[::-1])],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(["src", *sys.path])},
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    assert json.loads(there)[::-1] == here


def test_rows_are_counted_from_zero_and_iterated_once() -> None:
    rows = pack_text(numbered([30, 30]), 8, 0, document_masks=True)
    with pytest.raises(IndexError):
        rows[-1]
    assert len(list(rows)) == len(rows) == 7
    with pytest.raises(CorpusError, match="length is 1"):
        pack_text(numbered([30]), 1, 0, document_masks=True)


def test_a_million_short_documents_are_packed_without_touching_all_of_them() -> None:
    documents = 1_000_000
    store = TokenStore(
        tokens=np.arange(3 * documents, dtype=np.uint32),
        offsets=np.arange(documents + 1, dtype=np.int64) * 3,
        utf8_bytes=np.full(documents, 3, dtype=np.int64),
        ids=[],
        bos_token_id=BOS,
    )
    rows = pack_text(store, 64, 0, document_masks=True)
    assert len(rows) == 4 * documents // 64
    assert np.array_equal(rows[len(rows) - 1]["position_ids"], np.tile(np.arange(4), 16))


# -- windows -----------------------------------------------------------------------------------------------------------


@settings(max_examples=100, deadline=None)
@given(lengths=st.lists(st.integers(0, 30), min_size=1, max_size=6), length=st.integers(2, 12))
def test_windows_predict_each_token_of_a_document_once(lengths: list[int], length: int) -> None:
    store = numbered(lengths)
    predicted: dict[int, list[int]] = {i: [] for i in range(len(store))}
    for document, ids, start in validation_windows(store, length):
        assert 2 <= len(ids) <= length and ids.dtype == np.int64
        tokens = store.document(document)
        assert ids[0] == (BOS if start == 0 else tokens[start - 1])
        assert start == len(predicted[document])
        predicted[document] += ids[1:].tolist()
    for document, tokens in predicted.items():
        assert tokens == store.document(document).tolist()


def test_windows_of_the_first_documents() -> None:
    store = numbered([5, 5, 5])
    assert {document for document, _, _ in validation_windows(store, 4, max_documents=2)} == {0, 1}
    assert {document for document, _, _ in validation_windows(store, 4, max_documents=9)} == {0, 1, 2}
    with pytest.raises(CorpusError, match="at least 2"):
        next(validation_windows(store, 1))


# -- stores ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("vocab_size", "dtype"), [(300, np.uint16), (65535, np.uint16), (65536, np.uint32)])
def test_a_store_on_disk_is_mapped_and_pickles_as_its_path(
    tmp_path: Path, vocab_size: int, dtype: type
) -> None:
    with TokenWriter(tmp_path / "s", vocab_size=vocab_size, bos_token_id=BOS) as writer:
        writer.add("a", [3, vocab_size - 1], 5)
        writer.add("b", [4], 1)
    store = TokenStore.load(tmp_path / "s")
    assert isinstance(store.tokens, np.memmap) and store.tokens.dtype == dtype
    assert (len(store), store.num_tokens, store.ids, store.utf8_bytes.tolist()) == (2, 3, ["a", "b"], [5, 1])
    assert store.document(0).tolist() == [3, vocab_size - 1] and store.document(1).tolist() == [4]
    pickled = pickle.dumps(store)
    assert len(pickled) < 500
    assert pickle.loads(pickled).document(0).tolist() == [3, vocab_size - 1]
    for index in (2, -1):
        with pytest.raises(IndexError):
            store.document(index)
    in_memory = pickle.loads(pickle.dumps(TokenStore.from_documents([[5], [6, 7]], bos_token_id=BOS)))
    assert in_memory.document(1).tolist() == [6, 7]
    (tmp_path / "s" / "tokens.bin").write_bytes(b"\0\0\0\0")
    with pytest.raises(DamagedStore):
        TokenStore.load(tmp_path / "s")

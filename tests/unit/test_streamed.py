"""Rows streamed from shards: every token once an epoch, any row by its number, sources by weight."""

from __future__ import annotations

import json
import pickle
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from clearhead.data.readers import CorpusError, Place
from clearhead.data.shards import (
    FORMAT,
    MANIFEST,
    ShardContent,
    TokenizedSource,
    read_shard,
    token_type,
    write_shard,
)
from clearhead.data.store import IGNORED
from clearhead.data.streamed import Interleaving, MixedRows, SourceRows, StreamedText
from clearhead.data.weights import WHOLE, whole_shares

BOS = 1
LENGTH = 16


def written(
    folder: Path, sizes: list[list[int]], first: int = 2, vocabulary: int = 60_000
) -> TokenizedSource:
    """A source of shards whose documents have those numbers of tokens; every token of the source is another one."""
    folder.mkdir(parents=True)
    dtype = token_type(vocabulary)
    shards = []
    for number, documents in enumerate(sizes):
        content = ShardContent()
        for size in documents:
            content.trained.append(np.arange(first, first + size, dtype=dtype))
            content.text_bytes += 3 * size
            first += size
        shards.append(
            asdict(write_shard(folder, number, content, Place(number + 1), bos=BOS, seed=0, dtype=dtype))
        )
    about = {"format": FORMAT, "dtype": dtype.str, "bos_token_id": BOS, "shards": shards}
    (folder / MANIFEST).write_text(json.dumps(about))
    return TokenizedSource(folder, folder.name, resident=3)


SIZES = [[5, 40, 1, 17], [33, 2], [0, 64, 9, 9, 9], [3], [90, 11], [20, 21, 22]]


def rows_of(source: TokenizedSource, seed: int = 0, **options: Any) -> SourceRows:
    return SourceRows(source, 0, LENGTH, seed, **{"document_masks": True, "block": 3, **options})


def test_an_epoch_has_every_token_once_but_for_the_rest_of_each_shard(tmp_path: Path) -> None:
    source = written(tmp_path / "s", SIZES)
    rows = rows_of(source)
    totals = [sum(documents) + len(documents) for documents in SIZES]
    assert rows.rows == sum(total // LENGTH for total in totals)
    for epoch in range(3):
        ids = np.concatenate([rows[epoch * rows.rows + i]["input_ids"] for i in range(rows.rows)])
        ordinary = ids[ids != BOS]
        assert len(np.unique(ordinary)) == len(ordinary)
        # What is left out is less than a row of a shard, and a shard that is no row.
        left = sum(total % LENGTH for total in totals)
        assert len(ids) == sum(totals) - left


def test_labels_and_positions_restart_where_a_document_does(tmp_path: Path) -> None:
    rows = rows_of(written(tmp_path / "s", SIZES))
    crossed = 0
    for i in range(3 * rows.rows):
        row = rows[i]
        heads = np.flatnonzero((row["input_ids"] == BOS) | (np.arange(LENGTH) == 0))
        expected = row["input_ids"].copy()
        expected[heads] = IGNORED
        assert row["labels"].tolist() == expected.tolist()
        last = np.maximum.accumulate(np.where(np.isin(np.arange(LENGTH), heads), np.arange(LENGTH), 0))
        assert row["position_ids"].tolist() == (np.arange(LENGTH) - last).tolist()
        # Inside a document tokens follow each other as they were written.
        steps = np.diff(row["input_ids"])[np.diff(row["position_ids"]) == 1]
        inside = steps[(row["input_ids"][:-1][np.diff(row["position_ids"]) == 1]) != BOS]
        assert (inside == 1).all()
        crossed += len(heads) > 1
    assert crossed
    plain = rows_of(rows.source, document_masks=False)[0]
    assert plain["position_ids"].tolist() == list(range(LENGTH))


def test_a_row_depends_on_seed_and_number_alone(tmp_path: Path) -> None:
    source = written(tmp_path / "s", SIZES)
    first = rows_of(source)
    listed = [first[i]["input_ids"].tolist() for i in range(4 * first.rows)]
    rng = np.random.default_rng(0)
    for i in rng.permutation(len(listed)).tolist():
        assert rows_of(TokenizedSource(tmp_path / "s", "s"))[i]["input_ids"].tolist() == listed[i]
    epochs = [sorted(listed[k * first.rows : (k + 1) * first.rows]) for k in range(4)]
    assert all(epochs[0] != epoch for epoch in epochs[1:])
    assert [rows_of(source, seed=1)[i]["input_ids"].tolist() for i in range(first.rows)] != listed[
        : first.rows
    ]
    other = SourceRows(source, 1, LENGTH, 0, document_masks=True, block=3)
    assert [other[i]["input_ids"].tolist() for i in range(first.rows)] != listed[: first.rows]


def test_few_shards_are_open_at_once(tmp_path: Path) -> None:
    rows = rows_of(written(tmp_path / "s", [[50, 50]] * 12))
    for i in range(2 * rows.rows):
        rows[i]
        assert len(rows.source._open) <= 3
    copy = pickle.loads(pickle.dumps(rows))
    assert not copy.source._open
    assert copy[5]["input_ids"].tolist() == rows[5]["input_ids"].tolist()


def test_ids_above_two_bytes_are_kept(tmp_path: Path) -> None:
    source = written(tmp_path / "s", [[40]], first=70_000, vocabulary=100_000)
    ids = rows_of(source)[0]["input_ids"]
    assert ids.max() > 70_000
    assert (token_type(2**16), token_type(2**16 + 1)) == (np.dtype("<u2"), np.dtype("<u4"))


def test_a_text_shorter_than_a_row_is_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(CorpusError, match=r"'short' has 8 tokens, less than one row of 16"):
        rows_of(written(tmp_path / "short", [[3], [3]]))


@pytest.mark.parametrize("weights", [(0.7, 0.3), (1, 1, 1), (5, 0.01, 3, 1), (1,), (0.1,) * 7])
def test_every_beginning_has_each_source_by_its_weight(weights: tuple[float, ...]) -> None:
    shares = whole_shares(weights)
    assert sum(shares) == WHOLE
    parts = Interleaving(shares)
    made = [0] * len(shares)
    for index in range(2 * parts.period + 37 if parts.period < 500 else 3000):
        assert parts.before(index) == made
        source, number = parts.at(index)
        assert number == made[source]
        made[source] += 1
        for share, count in zip(shares, made, strict=True):
            assert abs(count - (index + 1) * share / WHOLE) < (1 if len(shares) < 3 else 2)


def test_weights_are_whole_shares_of_their_sum() -> None:
    assert whole_shares([2, 1, 1]) == [5000, 2500, 2500]
    assert whole_shares([1, 1, 1]) == [3334, 3333, 3333]
    with pytest.raises(ValueError, match=r"a weight of 1e-05 is less than 1/10000"):
        whole_shares([1, 1e-5])


def mixture(folder: Path, length: int = LENGTH) -> tuple[StreamedText, MixedRows]:
    first = written(folder / "a", SIZES)
    second = written(folder / "b", [[60, 60], [30]], first=30_000)
    text = StreamedText((first, second), (7000, 3000))
    return text, text.rows(length, 0, document_masks=True)


def test_a_mixture_takes_each_source_s_rows_in_their_order(tmp_path: Path) -> None:
    text, rows = mixture(tmp_path)
    own = [SourceRows(s, n, LENGTH, 0, document_masks=True, block=8) for n, s in enumerate(text.sources)]
    taken = [0, 0]
    for i in range(200):
        source, number = rows.interleaving.at(i)
        assert number == taken[source]
        assert rows[i]["input_ids"].tolist() == own[source][number]["input_ids"].tolist()
        taken[source] += 1
    assert taken == [140, 60]
    found = rows.position(200)
    assert [one["rows"] for one in found.values()] == taken
    for one, source_rows in zip(found.values(), own, strict=True):
        assert one["epoch"] * source_rows.rows + one["row"] == one["rows"]
    assert rows.epochs(200) == pytest.approx({"a": 140 / own[0].rows, "b": 60 / own[1].rows})
    with pytest.raises(IndexError):
        rows[-1]


def test_what_tokens_of_a_mixture_stand_for(tmp_path: Path) -> None:
    text, _ = mixture(tmp_path)
    assert text.bytes_per_token == pytest.approx(3.0)
    assert text.num_tokens == sum(map(sum, SIZES)) + 150
    assert len(text) == sum(map(len, SIZES)) + 3
    # The text around retrieval documents has no bos, and is the heavier source's.
    assert BOS not in text.tokens and text.tokens.max() < 30_000


def test_a_damaged_shard_is_refused_by_name(tmp_path: Path) -> None:
    source = written(tmp_path / "s", SIZES)
    path = tmp_path / "s" / "00002.bin"
    raw = bytearray(path.read_bytes())
    raw[7] ^= 1
    path.write_bytes(raw)
    assert read_shard(tmp_path / "s", 2) is not None
    assert read_shard(tmp_path / "s", 2, verify=True) is None
    rows = rows_of(source)
    with pytest.raises(
        CorpusError, match=r"00002\.bin', tokens of 's', is not what was written.*clearhead tokenize"
    ):
        for i in range(rows.rows):
            rows[i]
    path.write_bytes(raw[:-2])
    assert read_shard(tmp_path / "s", 2) is None

"""Preparation, packing and evaluation windows, as properties over random documents."""

from __future__ import annotations

import itertools
import json
import math
import os
import pickle
import subprocess
import sys
import threading
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerFast

from clearhead.data import prepare as prepare_module
from clearhead.data.packing import (
    DataSpec,
    PackedText,
    PreparedData,
    TokenStore,
    pack_text,
    prepare,
    validation_windows,
)
from clearhead.data.readers import CorpusError
from clearhead.data.store import DamagedStore, TokenWriter
from clearhead.data.tokenizer import train_bpe

BOS = 1


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("CLEARHEAD_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def numbered(lengths: list[int]) -> TokenStore:
    """Documents whose tokens are all different, so that a token says where it came from."""
    borders = np.concatenate([[0], np.cumsum(lengths)]) + 10
    return TokenStore.from_documents(
        [list(range(a, b)) for a, b in itertools.pairwise(borders)], bos_token_id=BOS
    )


def records(folder: Path, texts: list[str]) -> str:
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "corpus.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return str(path)


def words(count: int) -> list[str]:
    return [
        f"document {i}: " + " ".join(f"word{(i * 31 + j * 7) % 97}" for j in range(20 + i % 13))
        for i in range(count)
    ]


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
    prepared = prepare(DataSpec(source=records(tmp_path, words(40)), vocab_size=300, seed=3))
    rows = pack_text(prepared.train, 32, 7, document_masks=True)
    wanted = [3 * len(rows) + 2, 0, len(rows), 1]
    here = [rows[i]["input_ids"].tolist() for i in wanted]
    script = (
        "import json, sys; from pathlib import Path; from clearhead.data.packing import TokenStore, pack_text;"
        "rows = pack_text(TokenStore.load(Path(sys.argv[1])), 32, 7, document_masks=True);"
        "print(json.dumps([rows[i]['input_ids'].tolist() for i in json.loads(sys.argv[2])]))"
    )
    there = subprocess.run(
        [sys.executable, "-c", script, str(prepared.train.folder), json.dumps(wanted[::-1])],
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


# -- preparation -------------------------------------------------------------------------------------------------------


def texts_of(prepared: PreparedData, store: TokenStore) -> list[str]:
    return [prepared.tokenizer.decode(store.document(i)) for i in range(len(store))]


def test_preparation_keeps_every_text_and_counts_its_bytes(tmp_path: Path) -> None:
    texts = [*words(60), "naïve 日本 🙂 <|bos|> text"]
    prepared = prepare(DataSpec(source=records(tmp_path, texts), validation_fraction=0.3, vocab_size=320))
    train, validation = texts_of(prepared, prepared.train), texts_of(prepared, prepared.validation)
    assert sorted(train + validation) == sorted(texts)
    assert 5 < len(validation) < 35
    for store, read in ((prepared.train, train), (prepared.validation, validation)):
        assert store.utf8_bytes.tolist() == [len(text.encode()) for text in read]
        assert store.ids == [f"corpus.jsonl:{texts.index(text) + 1}" for text in read]
        assert store.bos_token_id == prepared.tokenizer.bos_token_id == BOS
    assert json.loads(json.dumps(prepared.identity)) == prepared.identity
    assert prepared.identity["train"]["tokens"] == prepared.train.num_tokens
    assert prepared.identity["validation"]["documents"] == len(validation)


def test_the_split_depends_on_the_text_alone(tmp_path: Path) -> None:
    def sides(texts: list[str], seed: int, where: str) -> tuple[set[str], set[str]]:
        spec = DataSpec(
            source=records(tmp_path / where, texts), validation_fraction=0.3, vocab_size=300, seed=seed
        )
        prepared = prepare(spec)
        return set(texts_of(prepared, prepared.train)), set(texts_of(prepared, prepared.validation))

    texts = words(60)
    train, validation = sides(texts, 0, "a")
    assert sides(texts[::-1], 0, "b") == (train, validation)
    fewer = sides(texts[:30], 0, "c")
    assert fewer[0] <= train and fewer[1] <= validation
    assert sides(texts, 1, "d")[1] != validation


def test_equal_texts_stay_on_one_side(tmp_path: Path) -> None:
    texts = words(40) * 3
    prepared = prepare(DataSpec(source=records(tmp_path, texts), validation_fraction=0.4, vocab_size=300))
    train, validation = texts_of(prepared, prepared.train), texts_of(prepared, prepared.validation)
    assert not set(train) & set(validation)
    assert len(train) + len(validation) == 120
    assert prepared.identity["duplicates"] == 80


@pytest.mark.parametrize("fraction", [1e-9, 1 - 1e-9])
def test_neither_side_is_ever_empty(tmp_path: Path, fraction: float) -> None:
    texts = [*words(3), *words(3)]
    prepared = prepare(
        DataSpec(source=records(tmp_path, texts), validation_fraction=fraction, vocab_size=300)
    )
    assert sorted([len(prepared.train), len(prepared.validation)]) == [2, 4]


def test_one_document_cannot_be_split(tmp_path: Path, cache: Path) -> None:
    with pytest.raises(CorpusError, match=r"has 1 different document.*at least one each"):
        prepare(DataSpec(source=records(tmp_path, ["same", "same"])))
    assert not [path for path in (cache / "prepared").iterdir() if path.suffix != ".lock"]


def test_the_tokenizer_never_sees_validation_text(tmp_path: Path) -> None:
    texts = [f"{name} " * 400 for name in ("quokka", "zyzzyva", "axolotl", "wombat", "numbat", "ibex")]
    prepared = prepare(DataSpec(source=records(tmp_path, texts), validation_fraction=0.4, vocab_size=330))
    merged = {token.removeprefix("Ġ") for token in prepared.tokenizer.get_vocab()}
    train = {text.split()[0] for text in texts_of(prepared, prepared.train)}
    validation = {text.split()[0] for text in texts_of(prepared, prepared.validation)}
    assert train <= merged and validation and not validation & merged


def test_a_sample_is_enough_to_train_the_tokenizer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[str] = []

    def get_tokenizer(source: str, *, vocab_size: int, texts: Any, cache_key: str) -> PreTrainedTokenizerFast:
        seen.extend(texts)
        return original(source, vocab_size=vocab_size, texts=seen, cache_key=cache_key)

    original = prepare_module.get_tokenizer
    monkeypatch.setattr(prepare_module, "get_tokenizer", get_tokenizer)
    monkeypatch.setattr(prepare_module, "TOKENIZER_BYTES", 1500)
    monkeypatch.setattr(prepare_module, "BATCH_BYTES", 1000)
    texts = words(60)
    prepared = prepare(DataSpec(source=records(tmp_path, texts), vocab_size=300))
    assert 1500 <= sum(len(text) for text in seen) < 2000
    train = texts_of(prepared, prepared.train)
    assert set(seen) <= set(train) and seen != train[: len(seen)]


def test_a_second_call_opens_what_the_first_stored(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    spec = DataSpec(source=records(tmp_path, words(30)), vocab_size=300)
    messages: list[str] = []
    first = prepare(spec, progress=messages.append)
    assert messages[1:3] == ["training the tokenizer", "tokenizing train: 100%"]
    with monkeypatch.context() as patch:
        patch.setattr(prepare_module, "build", lambda *arguments: pytest.fail("prepared again"))
        second = prepare(spec)
    assert second.identity == first.identity
    assert np.array_equal(second.train.tokens, first.train.tokens)
    assert second.tokenizer.get_vocab() == first.tokenizer.get_vocab()
    records(tmp_path, words(31))
    assert len(prepare(spec).train.ids) + len(prepare(spec).validation.ids) == 31


@pytest.mark.parametrize(
    "damage",
    [
        "train/tokens.bin",
        "train/offsets.npy",
        "validation/ids.json",
        "identity.json",
        "tokenizer/tokenizer.json",
    ],
)
@pytest.mark.parametrize("how", ["cut", "flipped", "gone"])
def test_damaged_data_is_made_again(tmp_path: Path, damage: str, how: str) -> None:
    spec = DataSpec(source=records(tmp_path, words(30)), vocab_size=300)
    first = prepare(spec)
    assert first.train.folder is not None
    tokens = np.array(first.train.tokens)
    path = first.train.folder.parent / damage
    content = path.read_bytes()
    if how == "gone":
        path.unlink()
    else:
        broken = content[: len(content) // 2] if how == "cut" else bytes([content[0] ^ 1]) + content[1:]
        path.write_bytes(broken)
    again = prepare(spec)
    assert path.read_bytes() == content
    assert np.array_equal(again.train.tokens, tokens)


def test_what_a_killed_process_left_is_swept_away(tmp_path: Path, cache: Path) -> None:
    spec = DataSpec(source=records(tmp_path, words(30)), vocab_size=300)
    script = (
        "import os, signal, sys; from clearhead.data import prepare as p;"
        "p.tokenize = lambda *arguments: os.kill(os.getpid(), signal.SIGKILL);"
        "p.prepare(p.DataSpec(source=sys.argv[1], vocab_size=300))"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(["src", *sys.path])}
    killed = subprocess.run([sys.executable, "-c", script, spec.source], env=environment, check=False)
    assert killed.returncode == -9
    assert [path.suffix for path in (cache / "prepared").iterdir() if path.is_dir()] == [".part"]
    prepared = prepare(spec)
    assert len(prepared.train) + len(prepared.validation) == 30
    assert [path.suffix for path in (cache / "prepared").iterdir() if path.is_dir()] == [""]


def test_two_at_once_prepare_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    spec = DataSpec(source=records(tmp_path, words(30)), vocab_size=300)
    built: list[Path] = []
    started = threading.Event()
    original = prepare_module.build

    def build(corpus: Any, spec: DataSpec, made_from: Any, folder: Path, say: Any) -> None:
        built.append(folder)
        started.set()
        waiting.wait(10)
        original(corpus, spec, made_from, folder, say)

    waiting = threading.Event()
    monkeypatch.setattr(prepare_module, "build", build)
    results: list[PreparedData] = []
    first = threading.Thread(target=lambda: results.append(prepare(spec)))
    first.start()
    assert started.wait(10)

    def heard(message: str) -> None:
        if message.startswith("waiting"):
            waiting.set()

    results.append(prepare(spec, progress=heard))
    first.join()
    assert len(built) == 1 and waiting.is_set()
    assert np.array_equal(results[0].train.tokens, results[1].train.tokens)


def test_an_own_tokenizer_is_loaded_first_kept_and_told_from_a_changed_one(tmp_path: Path) -> None:
    source = records(tmp_path, words(30))
    spec = DataSpec(source=source, tokenizer=str(tmp_path / "tokenizer"))
    with pytest.raises(CorpusError, match="cannot be loaded"):
        prepare(spec)
    sizes = []
    for size in (270, 290):
        tokenizer = PreTrainedTokenizerFast(tokenizer_object=train_bpe(words(9), size), eos_token="<|eos|>")
        tokenizer.save_pretrained(tmp_path / "tokenizer")
        prepared = prepare(spec)
        assert prepared.train.bos_token_id == prepared.tokenizer.bos_token_id == 2
        assert prepared.tokenizer.pad_token_id == 2
        sizes.append(prepared.identity["vocab_size"])
    assert sizes == [270, 290]


def test_faults_are_told_before_anything_is_written(tmp_path: Path, cache: Path) -> None:
    with pytest.raises(CorpusError, match="validation_fraction is 1"):
        DataSpec(validation_fraction=1)
    with pytest.raises(CorpusError, match="vocab_size is 100"):
        DataSpec(vocab_size=100)
    with pytest.raises(CorpusError, match="no file or directory"):
        prepare(DataSpec(source=str(tmp_path / "gone.txt")))
    assert not cache.exists()


def test_a_cache_that_cannot_be_written_is_named(
    tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = DataSpec(source=records(tmp_path, words(30)), vocab_size=300)
    cache.write_text("a file where the directory should be")
    with pytest.raises(CorpusError, match=r"cannot be written under .*CLEARHEAD_CACHE"):
        prepare(spec)
    cache.unlink()

    def full(writer: TokenWriter, name: str, tokens: list[int], utf8_bytes: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(TokenWriter, "add", full)
    with pytest.raises(CorpusError, match=r"No space left on device.*free space"):
        prepare(spec)
    assert not [path for path in (cache / "prepared").iterdir() if path.is_dir()]


def test_prepared_stores_pack(tmp_path: Path) -> None:
    prepared = prepare(DataSpec(source=records(tmp_path, words(30)), vocab_size=300))
    rows = pack_text(prepared.train, 64, 0, document_masks=True)
    assert isinstance(rows, PackedText)
    total = prepared.train.num_tokens + len(prepared.train)
    assert len(rows) == total // 64
    counted = sum(len(ids) - 1 for _, ids, _ in validation_windows(prepared.validation, 16))
    assert counted == prepared.validation.num_tokens
    assert math.isfinite(prepared.validation.utf8_bytes.sum() / counted)

"""Preparation: from texts to two stores of tokens on disk, once, whatever happens on the way."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from transformers import PreTrainedTokenizerFast

from clearhead.data import prepare as prepare_module
from clearhead.data.packing import DataSpec, PackedText, TokenStore, pack_text, validation_windows
from clearhead.data.prepare import PreparedData, prepare
from clearhead.data.readers import CorpusError
from clearhead.data.store import TokenWriter
from clearhead.data.tokenizer import train_bpe

BOS = 1


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("CLEARHEAD_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


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

    def get_tokenizer(
        source: str, *, vocab_size: int, texts: Any, cache_key: str, mask: bool
    ) -> PreTrainedTokenizerFast:
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
    assert messages[1].startswith("reading 1 file (1 .jsonl)")
    assert messages[2:4] == ["training the tokenizer", "tokenizing train: 100%"]
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

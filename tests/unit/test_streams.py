"""Preparation of several texts: shards that are made once, whatever happens on the way, and held to what they were."""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tests.unit.stream_text import sentences, small_shards, spec_in, write_texts

from clearhead.data import stamps, streams, tokenizing
from clearhead.data.corpora import START, open_corpus
from clearhead.data.packing import pack_text
from clearhead.data.prepare import PreparedData, prepare
from clearhead.data.readers import CorpusError
from clearhead.data.spec import DataSpec, TextSource
from clearhead.data.streamed import MixedRows, StreamedText
from clearhead.data.tokenizing import share


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("CLEARHEAD_CACHE", str(tmp_path / "cache"))
    small_shards(monkeypatch)
    return tmp_path / "cache"


@pytest.fixture
def texts(tmp_path: Path) -> Path:
    return write_texts(tmp_path / "texts")


def streamed(data: PreparedData) -> StreamedText:
    assert isinstance(data.train, StreamedText)
    return data.train


def shard_files(root: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(root)): path.read_bytes()
        for path in sorted((root / "streams" / "sources").rglob("*"))
        if path.is_file() and path.suffix != ".lock"
    }


def texts_in(data: PreparedData, number: int) -> list[str]:
    """The training documents of a source, from its shards."""
    source = streamed(data).sources[number]
    found = []
    for shard in range(len(source.shards)):
        tokens, starts = source.open(shard)
        pieces = np.split(np.asarray(tokens), starts[1:])
        assert all(piece[0] == source.bos_token_id for piece in pieces)
        found += [str(data.tokenizer.decode(piece[1:].tolist())) for piece in pieces]
    return found


def test_every_document_is_trained_on_or_held_out(texts: Path) -> None:
    said: list[str] = []
    data = prepare(spec_in(texts), progress=said.append)
    held = [str(data.tokenizer.decode(data.validation.document(i))) for i in range(len(data.validation))]
    for number, written in enumerate((sentences(150, "page"), sentences(60, "book"))):
        assert sorted(texts_in(data, number) + [one for one in held if one in written]) == sorted(written)
    import hashlib

    shares = [share(0, hashlib.sha256(one.encode()).digest()) for one in held]
    assert shares == sorted(shares) and max(shares) < 0.1 and len(held) > 10
    assert data.validation.utf8_bytes.tolist() == [len(one.encode()) for one in held]
    counts = data.identity["train"]
    assert counts["documents"] == 210 - len(held) == len(data.train)
    assert counts["bytes"] + data.identity["validation"]["bytes"] == sum(
        len(one.encode()) for one in (*sentences(150, "page"), *sentences(60, "book"))
    )
    assert len(streamed(data).sources[0].shards) > 5
    assert any("tokenizing" in one for one in said)


def test_what_is_there_is_opened_and_the_texts_are_not_read_again(
    texts: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stamps, "UNSETTLED_NANOSECONDS", -(10**12))
    first = prepare(spec_in(texts))

    def never(*arguments: Any) -> Any:
        raise AssertionError("the text was read")

    monkeypatch.setattr("clearhead.data.corpora.fingerprint", never)
    monkeypatch.setattr("clearhead.data.corpora.read_file", never)
    again = prepare(spec_in(texts), began=first.identity)
    assert again.identity == first.identity
    one, two = (pack_text(data.train, 16, 0, document_masks=True) for data in (first, again))
    assert all(one[i]["input_ids"].tolist() == two[i]["input_ids"].tolist() for i in range(len(one)))


# The order of a tokenizing's files: the tokenizer, then five a shard.
@pytest.mark.parametrize(
    "moment", ["write:3", "replace:7", "write:19", "replace:26", "replace:38", "write:41"]
)
def test_killed_and_called_again_it_ends_with_the_same_shards(
    texts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, moment: str
) -> None:
    environment = {
        **os.environ,
        "CLEARHEAD_CACHE": str(tmp_path / "killed"),
        "PYTHONPATH": os.pathsep.join(sys.path),
    }
    command = [sys.executable, "-m", "tests.unit.stream_killed", str(texts), moment]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == -signal.SIGKILL, done.stderr
    finished = {
        path: path.stat().st_ino
        for path in (tmp_path / "killed" / "streams" / "sources").rglob("*.bin")
        if path.with_name(f"{path.name[:5]}.json").exists()
    }
    monkeypatch.setenv("CLEARHEAD_CACHE", str(tmp_path / "killed"))
    said: list[str] = []
    data = prepare(spec_in(texts), progress=said.append)
    monkeypatch.setenv("CLEARHEAD_CACHE", str(tmp_path / "cache"))
    whole = prepare(spec_in(texts))
    assert shard_files(tmp_path / "killed") == shard_files(tmp_path / "cache")
    assert data.identity == whole.identity
    # What was finished stands as it was.
    assert all(path.stat().st_ino == before for path, before in finished.items())
    assert not list((tmp_path / "killed").rglob("*.part"))
    if len(finished) > 3:
        assert any("finished shards are kept" in one for one in said)


def test_an_error_in_the_middle_keeps_what_is_finished(texts: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    encode: Any = vars(tokenizing)["encode_texts"]
    calls = 0

    def interrupted(*arguments: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == 14:
            raise KeyboardInterrupt
        return encode(*arguments)

    monkeypatch.setattr(tokenizing, "encode_texts", interrupted)
    with pytest.raises(KeyboardInterrupt):
        prepare(spec_in(texts))
    encoded = calls
    prepare(spec_in(texts))
    total, calls = calls - encoded, 0
    monkeypatch.setenv("CLEARHEAD_CACHE", str(texts / "anew"))
    with pytest.raises(KeyboardInterrupt):
        prepare(spec_in(texts))
    prepare(spec_in(texts))
    assert total < calls - 8


@pytest.mark.parametrize("change", ["content", "new", "gone"])
def test_a_text_that_is_another_is_refused_by_name(texts: Path, change: str) -> None:
    first = prepare(spec_in(texts))
    path = texts / "books" / "07.txt"
    before = path.stat()
    if change == "content":
        # Of the same size, and with its old time: only the system knows.
        path.write_bytes(path.read_bytes().replace(b"book", b"look"))
        os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    elif change == "new":
        (texts / "books" / "more.txt").write_text("one more")
    else:
        path.unlink()
    said = {"content": r"books: 07\.txt' differs", "new": r"more\.txt' is new", "gone": r"07\.txt' is gone"}
    with pytest.raises(CorpusError, match=rf"has changed since the run began.*{said[change]}.*--fresh"):
        prepare(spec_in(texts), began=first.identity)
    assert prepare(spec_in(texts)).identity != first.identity


def test_other_weights_and_another_tokenizer_are_refused(texts: Path, tmp_path: Path) -> None:
    first = prepare(spec_in(texts))
    first.tokenizer.save_pretrained(tmp_path / "tokenizer")
    sources = (TextSource(str(texts / "web.jsonl.gz"), 0.5), TextSource(str(texts / "books"), 0.5))
    with pytest.raises(CorpusError, match=r"corpus\.sources\.\S+web\.jsonl\.gz\.share: \"7000\" -> \"5000\""):
        prepare(spec_in(texts, sources=sources), began=first.identity)
    with pytest.raises(CorpusError, match="tokenizer_files"):
        prepare(spec_in(texts, tokenizer=str(tmp_path / "tokenizer")), began=first.identity)
    # Mixtures that differ in weights alone share their shards.
    given = prepare(spec_in(texts, tokenizer=str(tmp_path / "tokenizer")))
    files = set(shard_files(tmp_path / "cache"))
    other = prepare(spec_in(texts, tokenizer=str(tmp_path / "tokenizer"), sources=sources))
    assert set(shard_files(tmp_path / "cache")) == files
    assert (streamed(given).shares, streamed(other).shares) == ((7000, 3000), (5000, 5000))


def test_a_file_that_changes_while_it_is_read_is_refused_and_its_shard_not_kept(
    texts: Path, monkeypatch: pytest.MonkeyPatch, cache: Path
) -> None:
    fill = tokenizing.Tokenizing._fill
    filled = 0

    def late(self: Any, *arguments: Any) -> Any:
        nonlocal filled
        filled += 1
        found = fill(self, *arguments)
        if self.text.source.endswith("books") and found[1].file > 20:
            (texts / "books" / "20.txt").write_text("another text")
        return found

    monkeypatch.setattr(tokenizing.Tokenizing, "_fill", late)
    with pytest.raises(CorpusError, match=r"books/20\.txt' has changed while it was read"):
        prepare(spec_in(texts))
    kept = [name for name in shard_files(cache) if "books" in name and name.endswith("00000.json")]
    assert len(kept) <= 1
    monkeypatch.undo()


def test_damaged_and_missing_shards_are_made_again(texts: Path, cache: Path) -> None:
    first = prepare(spec_in(texts))
    before = shard_files(cache)
    folder = streamed(first).sources[0].folder
    unchanged = (folder / "00001.bin").stat().st_ino
    (folder / "00003.bin").unlink()
    raw = bytearray((folder / "00000.bin").read_bytes())
    raw[5] ^= 1
    (folder / "00000.bin").write_bytes(raw)
    # A missing one is seen at once, a damaged one by whoever reads it or verifies.
    data = prepare(spec_in(texts), began=first.identity)
    assert (folder / "00003.bin").exists()
    with pytest.raises(CorpusError, match=r"00000\.bin'"):
        for i in range(100):
            pack_text(data.train, 16, 0, document_masks=True)[i]
    assert prepare(spec_in(texts), verify=True).identity == first.identity
    assert shard_files(cache) == before
    assert (folder / "00001.bin").stat().st_ino == unchanged


def test_one_source_is_streamed_where_a_folder_is_named(texts: Path, tmp_path: Path) -> None:
    spec = DataSpec(
        source=str(texts / "books"), vocab_size=300, validation_fraction=0.2, tokenized=str(tmp_path / "t")
    )
    data = prepare(spec)
    rows = pack_text(data.train, 32, 0, document_masks=True)
    assert isinstance(rows, MixedRows) and len(rows.sources) == 1
    assert (tmp_path / "t" / "sources").is_dir() and not (tmp_path / "cache" / "streams").exists()
    assert data.validation.ids[0].endswith(".txt")
    # Where shards lie is no part of what the data are.
    elsewhere = prepare(DataSpec(**{**vars(spec), "tokenized": str(tmp_path / "u")}))
    assert elsewhere.identity == data.identity
    # Held out are the documents that are held out of one store.
    plain = prepare(DataSpec(**{**vars(spec), "tokenized": None}))
    assert plain.validation.ids == data.validation.ids


def test_held_out_text_is_bounded_by_weight(texts: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(streams, "VALIDATION_BYTES", 2000)
    said: list[str] = []
    data = prepare(spec_in(texts, validation_fraction=0.5), progress=said.append)
    sizes = {
        number: sum(
            int(size)
            for name, size in zip(data.validation.ids, data.validation.utf8_bytes, strict=True)
            if name.startswith(number)
        )
        for number in "01"
    }
    assert 1400 <= sizes["0"] < 1400 + 400 and 600 <= sizes["1"] < 600 + 400
    assert any("with the lowest hashes are kept" in one for one in said)


@pytest.mark.parametrize(
    ("fraction", "said"),
    [(1e-9, "no document of the corpus is held out"), (1 - 1e-9, "every document of .* is held out")],
)
def test_a_side_without_documents_is_refused(texts: Path, fraction: float, said: str) -> None:
    with pytest.raises(CorpusError, match=said):
        prepare(spec_in(texts, validation_fraction=fraction))


def corpora(folder: Path) -> Iterator[tuple[str, int | None]]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    pq.write_table(pa.table({"text": sentences(20, "row")}), folder / "rows.parquet")
    (folder / "lone.txt").write_text("\n\n".join(sentences(300, "part")))
    for name, limit in (("books", None), ("books", 4000), ("lone.txt", None), ("lone.txt", 40_000)):
        yield str(folder / name), limit
    yield str(folder / "web.jsonl.gz"), None
    yield str(folder / "web.jsonl.gz"), 5000
    yield str(folder / "rows.parquet"), 700


def test_reading_goes_on_from_any_place(texts: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    rows = [{"text": one} for one in (*sentences(9, "row"), " ", None, *sentences(4, "end"))]
    stream = datasets.Dataset.from_list(rows).to_iterable_dataset()
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: stream)
    for source, limit in (*corpora(texts), ("hf:owner/name", None), ("hf:owner/name", 700)):
        corpus = open_corpus(source, max_bytes=limit)
        whole = list(corpus.read())
        assert [document for document, _ in whole] == list(corpus.documents())
        assert len(whole) > 2
        for number, (_, place) in enumerate(whole, start=1):
            assert list(corpus.read(place)) == whole[number:], (source, limit, number)
        assert list(corpus.read(START)) == whole


def test_manifests_and_headers_are_json_and_nothing_is_pickled(texts: Path, cache: Path) -> None:
    prepare(spec_in(texts))
    kinds = {name.partition(".")[2] for name in map(os.path.basename, shard_files(cache))}
    assert kinds == {"bin", "starts.bin", "held.bin", "held.json", "json"}
    for name, raw in shard_files(cache).items():
        if name.endswith(".json"):
            json.loads(raw)


def in_folder(texts: Path, folder: Path) -> DataSpec:
    return DataSpec(str(texts / "books"), vocab_size=300, validation_fraction=0.2, tokenized=str(folder))


def test_tokens_are_read_where_nothing_can_be_written(
    texts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = DataSpec(
        source=str(texts / "books"),
        vocab_size=300,
        validation_fraction=0.2,
        tokenized=str(tmp_path / "tokens"),
    )
    first = prepare(made)
    shutil.rmtree(tmp_path / "tokens" / "stamps", ignore_errors=True)
    monkeypatch.setattr(stamps, "UNSETTLED_NANOSECONDS", 0)

    def refuse(*_: object) -> None:
        raise PermissionError(errno.EACCES, "Permission denied", str(tmp_path / "tokens"))

    monkeypatch.setattr(streams, "locked", refuse)
    monkeypatch.setattr(stamps, "replacing", refuse)
    assert prepare(made).identity == first.identity
    with pytest.raises(
        CorpusError, match=r"corpus\.tokenized: no tokens can be written to .* \(Permission denied"
    ):
        prepare(replace(made, tokenized=str(tmp_path / "others")))


def test_a_file_is_no_folder_for_tokens(texts: Path, tmp_path: Path) -> None:
    (tmp_path / "tokens").write_text("")
    with pytest.raises(CorpusError, match=r"corpus\.tokenized: no tokens can be written to .* name a folder"):
        prepare(
            DataSpec(
                source=str(texts / "books"),
                vocab_size=300,
                validation_fraction=0.2,
                tokenized=str(tmp_path / "tokens"),
            )
        )

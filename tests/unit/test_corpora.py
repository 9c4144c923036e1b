"""Every kind of source, and the one sentence each fault of the text is told in."""

from __future__ import annotations

import gzip
import json
import sys
from pathlib import Path

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from clearhead.data.corpora import CorpusError, Document, open_corpus
from clearhead.data.readers import cut, parts


def write(path: Path, content: str | bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def read(source: Path | str, **options: object) -> list[Document]:
    return list(open_corpus(str(source), **options).documents())  # type: ignore[arg-type]


def fault(source: Path | str, **options: object) -> str:
    with pytest.raises(CorpusError) as caught:
        read(source, **options)
    message = str(caught.value)
    assert "\n" not in message
    return message


def lines(*records: object) -> str:
    return "".join(json.dumps(record) + "\n" for record in records)


# -- the standard library ----------------------------------------------------------------------------------------------


def test_stdlib_is_the_library_without_tests() -> None:
    corpus = open_corpus("stdlib")
    identity = corpus.identity()
    assert identity["version"] == ".".join(map(str, sys.version_info[:3]))
    assert 400 < identity["files"] < 1500
    assert 8e6 < identity["bytes"] < 20e6
    names = [document.id for document in corpus.documents()]
    assert len(names) == identity["files"] == len(set(names))
    assert names == sorted(names)
    assert {"argparse.py", "json/decoder.py", "asyncio/tasks.py"} <= set(names)
    parts_of_names = {part for name in names for part in name.split("/")[:-1]}
    assert not parts_of_names & {
        "test",
        "tests",
        "idle_test",
        "site-packages",
        "dist-packages",
        "__pycache__",
    }
    assert not [name for name in names if name.startswith("_sysconfigdata")]


def test_stdlib_limit_takes_a_sample_and_not_the_beginning_of_the_alphabet() -> None:
    corpus = open_corpus("stdlib", max_bytes=1_000_000)
    documents = list(corpus.documents())
    size = sum(len(document.text.encode()) for document in documents)
    assert 1_000_000 <= size < 2_000_000
    assert corpus.identity()["files"] == len(documents)
    initials = {document.id.lstrip("_")[0] for document in documents}
    assert len(initials) > 10
    again = [document.id for document in open_corpus("stdlib", max_bytes=1_000_000).documents()]
    assert again == [document.id for document in documents]


# -- files, directories, globs -----------------------------------------------------------------------------------------


def test_a_directory_of_mixed_kinds_in_the_order_of_names(tmp_path: Path) -> None:
    write(tmp_path / "b" / "notes.md", "# notes\n")
    write(tmp_path / "a.txt", "\ufeffplain – text\r\n")
    write(tmp_path / "c.jsonl", lines({"text": "one", "n": 1}, {"text": " "}, {"text": "three\u0000"}) + "\n")
    write(tmp_path / "d.jsonl.gz", gzip.compress(lines({"text": "packed"}).encode()))
    pq.write_table(pa.table({"text": ["row", None, "", "last"]}), tmp_path / "e.parquet", row_group_size=2)
    write(tmp_path / "pkg" / "__init__.py", "")
    write(tmp_path / "pkg" / "code.py", "x = 1\n")
    write(tmp_path / "ignored.png", b"\x89PNG\0")
    write(tmp_path / ".git" / "hidden.txt", "hidden")
    write(tmp_path / "__pycache__" / "stale.py", "stale")
    assert [(document.id, document.text) for document in read(tmp_path)] == [
        ("a.txt", "plain – text\r\n"),
        ("b/notes.md", "# notes\n"),
        ("c.jsonl:1", "one"),
        ("c.jsonl:3", "three\u0000"),
        ("d.jsonl.gz:1", "packed"),
        ("e.parquet:0", "row"),
        ("e.parquet:3", "last"),
        ("pkg/code.py", "x = 1\n"),
    ]


def test_what_is_read_and_what_is_left_is_said(tmp_path: Path) -> None:
    for i in range(3):
        write(tmp_path / f"{i}.rst", "title\n=====\n")
    write(tmp_path / "a.txt", "text" * 100_000)
    for i in range(4):
        write(tmp_path / "html" / f"{i}.html", "<p>")
    for name in ("LICENSE", "b.c", "c.c", "d.h", "e.j", "f.k", "g.l", ".hidden.html", ".git/x.html"):
        write(tmp_path / name, "x")
    account = open_corpus(str(tmp_path)).account()
    assert account is not None
    read_part, _, left = account.partition("; left unread, ")
    assert read_part == "reading 4 files (3 .rst, 1 .txt), 0.4 MB"
    assert ".txt .md .rst .py" in left
    assert left.endswith("11 files (4 .html, 2 .c, 1 without a suffix, 1 .h, 1 .j, 2 others)")
    limited = open_corpus(str(tmp_path), max_bytes=20).account()
    assert limited is not None and "corpus.max_bytes leaves " in limited
    globbed = open_corpus(f"{tmp_path}/*.[rc]*").account()
    assert globbed is not None and globbed.startswith("reading 3 files (3 .rst)")
    assert globbed.endswith("2 files (2 .c)")
    assert open_corpus("hf:owner/name").account() is None


def test_a_glob_takes_what_it_matches(tmp_path: Path) -> None:
    for name in ("x/1.txt", "x/y/2.txt", "x/y/3.md"):
        write(tmp_path / name, name)
    assert [document.id for document in read(f"{tmp_path}/**/*.txt")] == ["1.txt", "y/2.txt"]


def test_the_text_field_is_chosen(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", lines({"body": "b", "text": 3}))
    assert [document.text for document in read(path, text_field="body")] == ["b"]


def test_a_lone_text_file_is_cut_at_paragraphs_and_loses_nothing(tmp_path: Path) -> None:
    text = "".join(f"paragraph {i} of a longer text, né\n\n" for i in range(9000))
    documents = read(write(tmp_path / "book.txt", text))
    assert "".join(document.text for document in documents) == text
    assert 16 <= len(documents) <= 33
    assert all(document.text.endswith("\n\n") for document in documents)
    assert documents[0].id == "book.txt#0"


def test_a_large_text_file_among_others_is_cut_too(tmp_path: Path) -> None:
    text = "a line without a blank one after it\n" * 150_000
    write(tmp_path / "a.txt", text)
    write(tmp_path / "b.txt", "small")
    documents = read(tmp_path)
    assert "".join(document.text for document in documents[:-1]) == text
    assert max(len(document.text) for document in documents) <= 2 * 2**20
    assert documents[-1].id == "b.txt"


@pytest.mark.parametrize("unit", ["é", "日", "🙂", "a", "x日é🙂"])
def test_cuts_never_fall_inside_a_character(unit: str, tmp_path: Path) -> None:
    raw = (unit * 500).encode()
    path = write(tmp_path / "raw", raw)
    with path.open("rb") as file:
        pieces = list(parts(file, 64))
    assert b"".join(piece for _, piece in pieces) == raw
    assert [offset for offset, _ in pieces] == [
        sum(len(p) for _, p in pieces[:i]) for i in range(len(pieces))
    ]
    assert "".join(piece.decode() for _, piece in pieces) == unit * 500
    assert 61 <= cut(raw, 64) <= 128


def test_max_bytes_stops_after_the_document_that_reaches_it(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", lines(*({"text": f"{i:09d}é"} for i in range(100))))
    assert len(read(path, max_bytes=100)) == 10
    assert len(read(path, max_bytes=111)) == 11
    # Text after the limit is not even looked at.
    with path.open("a") as file:
        file.write("not json")
    assert len(read(path, max_bytes=110)) == 10


def test_with_a_limit_only_the_files_that_are_read_count_for_the_identity(tmp_path: Path) -> None:
    for i in range(40):
        write(tmp_path / f"{i:02d}.txt", f"file {i:02d} " * 10)
    corpus = open_corpus(str(tmp_path), max_bytes=400)
    read_now = {document.id for document in corpus.documents()}
    assert len(read_now) == 5 and read_now != {f"{i:02d}.txt" for i in range(5)}
    before = corpus.identity()
    assert before["files"] == 5
    for i in range(40):
        if f"{i:02d}.txt" not in read_now:
            write(tmp_path / f"{i:02d}.txt", f"FILE {i:02d} " * 10)
    assert open_corpus(str(tmp_path), max_bytes=400).identity() == before


def test_the_identity_follows_content_and_names(tmp_path: Path) -> None:
    a = write(tmp_path / "a.txt", "one")
    write(tmp_path / "b.txt", "two")
    first = open_corpus(str(tmp_path)).identity()
    assert json.loads(json.dumps(first)) == first
    assert open_corpus(str(tmp_path)).identity() == first
    write(a, "two")
    second = open_corpus(str(tmp_path)).identity()
    a.rename(tmp_path / "c.txt")
    third = open_corpus(str(tmp_path)).identity()
    assert len({first["sha256"], second["sha256"], third["sha256"]}) == 3


# -- faults ------------------------------------------------------------------------------------------------------------


def test_missing_sources(tmp_path: Path) -> None:
    assert "there is no file or directory 'nowhere.txt'" in fault("nowhere.txt")
    assert f"'{tmp_path}/books'" in fault(tmp_path / "books")
    assert "matches no file" in fault(f"{tmp_path}/*.txt")
    assert "source is empty" in fault(" ")
    assert "max_bytes is 0" in fault("stdlib", max_bytes=0)
    assert "not a dataset id" in fault("hf:a:b:c:d")


def test_an_existing_parent_directory_is_not_taken_for_a_dataset_owner(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "data").mkdir()
    monkeypatch.chdir(tmp_path)
    assert "no file or directory 'data/books'" in fault("data/books")


def test_unsupported_kinds(tmp_path: Path) -> None:
    path = write(tmp_path / "a.docx", "x")
    for source in (path, tmp_path, f"{tmp_path}/*"):
        message = fault(source)
        assert "supported kind" in message and ".parquet" in message


@pytest.mark.parametrize("name", ["a.txt", "a.md", "a.py", "a.jsonl", "a.jsonl.gz", "a.parquet"])
def test_an_empty_file_is_named(tmp_path: Path, name: str) -> None:
    assert f"'{write(tmp_path / name, '')}' is empty" in fault(tmp_path)


def test_a_file_of_white_space_is_empty(tmp_path: Path) -> None:
    write(tmp_path / "a.txt", "text")
    path = write(tmp_path / "b.txt", " \n\n")
    assert f"'{path}' is empty" in fault(tmp_path)
    path = write(tmp_path / "c" / "c.jsonl", lines({"text": ""}))
    assert f"'{path}' is empty" in fault(path)


def test_binary_and_undecodable_files_are_named_with_the_byte(tmp_path: Path) -> None:
    path = write(tmp_path / "a.txt", b"abc\0def")
    assert f"'{path}' is binary (a NUL at byte 3)" in fault(path)
    write(path, b"caf\xe9 au lait")
    assert f"'{path}' is not UTF-8 (byte 3)" in fault(path)
    write(path, "text".encode("utf-16"))
    assert "UTF-16" in fault(path)
    late = b"line\n" * 20_000
    write(path, late + b"\xff")
    assert f"byte {len(late)}" in fault(path)
    path = write(tmp_path / "b.jsonl", b'{"text": "fine"}\n{"text": "caf\xe9"}\n')
    assert "'" + str(path) + "' is not UTF-8 (byte 30)" in fault(path)


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ('{"text": "a"}\n{"text": \n', "line 2 of '{path}' is not JSON"),
        ("[1]\n", "line 1 of '{path}' is a JSON list, not an object"),
        ('{"title": "t", "body": "b"}\n', "has no field 'text'; its fields are body, title"),
        ("{}\n", "its fields are none"),
        ('{"text": 3}\n', "field 'text' in line 1 of '{path}' is int, not text"),
        ('{"text": "\\ud800"}\n', "line 1 of '{path}' holds an unpaired surrogate at character 0"),
    ],
)
def test_faults_of_json_lines_name_file_and_line(tmp_path: Path, content: str, expected: str) -> None:
    path = write(tmp_path / "a.jsonl", content)
    assert expected.format(path=path) in fault(path)


def test_a_gzip_file_that_is_cut_or_none_is_named(tmp_path: Path) -> None:
    packed = gzip.compress(lines(*({"text": f"{i * 7919 % 1000}"} for i in range(2000))).encode())
    path = write(tmp_path / "a.jsonl.gz", packed[: len(packed) // 2])
    assert f"'{path}' is not a whole gzip file (after line" in fault(path)
    write(path, lines({"text": "not packed"}))
    assert f"'{path}' is not a whole gzip file" in fault(path)
    broken = bytearray(packed)
    broken[len(packed) // 2] ^= 0xFF
    write(path, bytes(broken))
    assert str(path) in fault(path)


def test_faults_of_parquet(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"title": ["t"], "n": [1]}), path)
    assert f"'{path}' has no column 'text'; its columns are title, n" in fault(path)
    assert "is int64, not text" in fault(path, text_field="n")
    write(path, path.read_bytes()[:-20])
    assert f"'{path}' is not a whole Parquet file" in fault(path)


def test_a_file_that_disappears_is_named(tmp_path: Path) -> None:
    path = write(tmp_path / "a.txt", "text")
    corpus = open_corpus(str(tmp_path))
    path.unlink()
    with pytest.raises(CorpusError, match=r"a\.txt' is missing"):
        list(corpus.documents())
    with pytest.raises(CorpusError, match=r"a\.txt' cannot be read"):
        corpus.identity()


# -- Hugging Face datasets ---------------------------------------------------------------------------------------------


def test_a_dataset_is_streamed_from_a_local_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    write(tmp_path / "set" / "train.jsonl", lines({"text": "one"}, {"text": ""}, {"text": "three"}))
    write(tmp_path / "set" / "test.jsonl", lines({"text": "held out"}))
    source = f"hf:{tmp_path}/set"
    assert [document.text for document in read(source)] == ["one", "three"]
    assert [document.text for document in read(f"{source}::test")] == ["held out"]
    assert [document.text for document in read(source, max_bytes=3)] == ["one"]
    assert "has no field 'body'; its fields are text" in fault(source, text_field="body")
    assert "cannot be opened" in fault(f"{source}::nosplit")


def test_dataset_ids_are_parsed_and_faults_told(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []

    def load_dataset(path: str, name: str | None, *, split: str, streaming: bool) -> object:
        calls.append((path, name, split, streaming))
        if path == "owner/gone":
            raise ConnectionError("Couldn't reach 'owner/gone' on the Hub\nlong trace")
        if path == "owner/breaks":
            return broken_stream()
        return iter([{"text": ["a list"]}] if path == "owner/lists" else [{"text": None}])

    def broken_stream() -> object:
        yield {"text": "one"}
        raise OSError("connection reset")

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    assert "holds no text" in fault("owner/name")
    assert "holds no text" in fault("hf:owner/name:en:test")
    assert "holds no text" in fault("hf:name::test")
    assert calls == [
        ("owner/name", None, "train", True),
        ("owner/name", "en", "test", True),
        ("name", None, "test", True),
    ]
    assert "not text but list" in fault("owner/lists")
    message = fault("owner/gone")
    assert "Couldn't reach" in message and "no file or directory 'owner/gone' either" in message
    assert "broke off while streaming (connection reset)" in fault("owner/breaks")
    identity = open_corpus("hf:owner/name:en:test").identity()
    assert (identity["dataset"], identity["config"], identity["split"]) == ("owner/name", "en", "test")

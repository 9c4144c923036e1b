"""Samples files that a kill or a disk has damaged, and data files with whatever people put into them."""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from clearhead.data.readers import CorpusError
from clearhead.evals.asking.records import RecordError
from clearhead.evals.asking.sample_log import SampleLog
from clearhead.evals.faithfulness.hallucination.data import open_set
from clearhead.evals.faithfulness.knowledge_conflicts.evaluation import read_conflicts
from clearhead.evals.faithfulness.long_document_qa.prompts import read_articles
from clearhead.evals.in_context.labelled import _named, open_labelled

ABOUT = {"config": {"seed": 1}}


def left(folder: Path, count: int = 4) -> Path:
    """What an evaluation leaves that is stopped after ``count`` answers."""
    with pytest.raises(KeyboardInterrupt), SampleLog.open(folder, "x", ABOUT, ("index",)) as log:
        for index in range(count):
            log.add({"index": index, "answer": f"naïve {index}", "found": [1, 0], "p": 0.1 + index})
        raise KeyboardInterrupt
    return folder / "x.partial.jsonl"


def kept(folder: Path) -> list[int]:
    with pytest.raises(KeyboardInterrupt), SampleLog.open(folder, "x", ABOUT, ("index",)) as log:
        found = [record["index"] for record in log.records]
        raise KeyboardInterrupt
    return found


def changed(old: bytes, new: bytes) -> Callable[[bytes], bytes]:
    return lambda raw: raw.replace(old, new)


@pytest.mark.parametrize(
    ("damage", "expected"),
    [
        (lambda raw: raw[:-20], [0, 1, 2]),
        (lambda raw: raw + b'{"index": 9, "ans', [0, 1, 2, 3]),
        (changed(b'2", "found": [1, 0]', b'2", "found": [1, 1]'), [0, 1, 3]),
        (changed(b"na\xc3\xafve 1", b"na\xc3ve 1"), [0, 2, 3]),
        (changed(b'"index": 1', b'"index": 7'), [0, 2, 3]),
        (changed(b'"seed": 1', b'"seed": 3'), []),
        (lambda raw: raw + b"5\n[]\nnull\n" + b"[" * 100_000 + b"\n" + b"9" * 5000 + b"\n", [0, 1, 2, 3]),
        (lambda raw: raw + b'{"answer": "no index"}\n{"index": [1]}\n', [0, 1, 2, 3]),
        (lambda raw: b"\0" * len(raw), []),
        (lambda raw: b"", []),
    ],
)
def test_only_lines_that_are_whole_are_gone_on_with(
    damage: Callable[[bytes], bytes], expected: list[int], tmp_path: Path
) -> None:
    part = left(tmp_path)
    part.write_bytes(damage(part.read_bytes()))
    assert kept(tmp_path) == expected
    assert kept(tmp_path) == expected


def test_a_finished_file_holds_the_answers_alone(tmp_path: Path) -> None:
    left(tmp_path, 2)
    with SampleLog.open(tmp_path, "x", ABOUT, ("index",)) as log:
        log.add({"index": 2, "p": float("nan")})
    lines = [json.loads(line) for line in (tmp_path / "x.jsonl").read_text().splitlines()]
    assert lines[0] == ABOUT and lines[3] == {"index": 2, "p": None} and len(lines) == 4
    assert lines[1] == {"index": 0, "answer": "naïve 0", "found": [1, 0], "p": 0.1}
    assert not (tmp_path / "x.partial.jsonl").exists()
    # Without checksums it may be gone on with all the same.
    (tmp_path / "x.jsonl").rename(tmp_path / "x.partial.jsonl")
    assert kept(tmp_path) == [0, 1, 2]


GOOD = b'{"text": "a", "label": "x"}\n'
READERS: dict[str, Callable[[str], Any]] = {
    "labelled": open_labelled,
    "conflicts": read_conflicts,
    "articles": lambda source: read_articles(source, unique=False),
    "items": lambda source: open_set(source, {}, 10, 0),
}


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize(
    "line",
    [
        b'{"text": ' + b"9" * 5000 + b"}",
        b"[" * 100_000,
        b'{"text": "\\ud800", "label": "x"}',
        b'{"text": NaN}',
        b'{"text": "\xff"}',
        b"5",
        b'{"text": null}',
        b'{"text": "a\0b"}',
    ],
)
def test_a_line_that_cannot_be_used_is_named(reader: str, line: bytes, tmp_path: Path) -> None:
    file = tmp_path / "set.jsonl"
    file.write_bytes(line + b"\n")
    with pytest.raises((RecordError, CorpusError)) as caught:
        READERS[reader](str(file))
    said = str(caught.value)
    assert str(file) in said and ("line 1" in said or "byte" in said)
    assert "\n" not in said and len(said) < 400 + len(str(file))


@pytest.mark.parametrize(
    "body", [b"9" * 5000, b"[" * 100_000, b'[{"a": "\\udfff"}]', b'[{"a": Infinity}]', b"\xff\xfe["]
)
def test_a_file_of_one_list_is_named_too(body: bytes, tmp_path: Path) -> None:
    file = tmp_path / "set.json"
    file.write_bytes(body)
    with pytest.raises((RecordError, CorpusError), match=r"set\.json"):
        read_articles(str(file), unique=False)


@pytest.mark.parametrize(
    "record",
    [
        {"paragraphs": 5},
        {"paragraphs": [{"context": "A text.", "qas": 5}]},
        {"paragraphs": [{"context": "A text.", "qas": ["q"]}]},
        {"paragraphs": [{"context": "A text.", "qas": [{"question": "Q", "answers": None}]}]},
        {"paragraphs": [{"context": "A text.", "qas": [{"question": "Q", "answers": [5]}]}]},
        {"paragraphs": [{"context": None, "qas": []}]},
    ],
)
def test_articles_of_other_shapes_are_refused(record: Any, tmp_path: Path) -> None:
    file = tmp_path / "set.jsonl"
    file.write_text(json.dumps(record))
    with pytest.raises(RecordError, match="line 1 of"):
        read_articles(str(file), unique=False)


@pytest.mark.parametrize("scores", [{"b": "0"}, {"b": None}, {"": 0}, ["b"]])
def test_scores_that_are_none_are_refused(scores: Any, tmp_path: Path) -> None:
    file = tmp_path / "set.jsonl"
    file.write_text(json.dumps({"input": "Q", "target": "a", "target_scores": scores}))
    with pytest.raises(RecordError, match="'target_scores' in line 1 of"):
        read_conflicts(str(file))


def test_a_damaged_archive_says_how_far_it_is_whole(tmp_path: Path) -> None:
    file = tmp_path / "set.jsonl.gz"
    file.write_bytes(gzip.compress(GOOD * 50)[:-12])
    with pytest.raises(RecordError, match="not a whole gzip file"):
        open_labelled(str(file))


def test_what_has_no_class_is_not_of_the_last_one() -> None:
    rows = [{"text": "a", "label": 1}]
    assert list(_named(rows, ["x", "y"], "text", "label", "it")) == [("a", "y")]
    for label in (-1, 2, "y"):
        with pytest.raises(RecordError, match="none of its 2 classes"):
            list(_named([{"text": "a", "label": label}], ["x", "y"], "text", "label", "it"))

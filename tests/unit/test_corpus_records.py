"""Records of .jsonl and .parquet files follow one rule, and what is broken in them is named with file and place."""

import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from clearhead.data.corpora import open_corpus
from clearhead.data.readers import CorpusError
from clearhead.evals.asking.records import RecordError, read_records

ROWS = ["first", None, "", " \n", "last"]


def texts(path: Path) -> list[str]:
    return [document.text for document in open_corpus(str(path)).documents()]


def test_missing_and_blank_texts_are_passed_over_everywhere(tmp_path: Path) -> None:
    lines, table = tmp_path / "a.jsonl", tmp_path / "a.parquet"
    lines.write_text("".join(json.dumps({"text": text}) + "\n" for text in ROWS))
    pq.write_table(pa.table({"text": ROWS}), table)
    assert texts(lines) == texts(table) == ["first", "last"]


@pytest.mark.parametrize(
    "column",
    [
        pa.array(ROWS, pa.string()),
        pa.array(ROWS, pa.large_string()),
        pa.array(ROWS, pa.string_view()),
        pa.array(ROWS).dictionary_encode(),
        pa.array(ROWS, pa.large_string()).dictionary_encode(),
    ],
    ids=lambda column: str(column.type),
)
def test_every_type_of_strings_is_text(tmp_path: Path, column: pa.Array) -> None:
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"text": column}), path)
    assert texts(path) == ["first", "last"]


@pytest.mark.parametrize("column", [pa.array([1, 2]), pa.array([1, 2]).dictionary_encode(), pa.array([b"x"])])
def test_other_types_are_none(tmp_path: Path, column: pa.Array) -> None:
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"text": column}), path)
    with pytest.raises(CorpusError, match=r"column 'text' of .*a\.parquet' is .*, not text"):
        texts(path)


def test_a_string_that_is_not_utf8_is_named(tmp_path: Path) -> None:
    raw = pa.array([b"\xff\xfe"]).buffers()
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"text": pa.StringArray.from_buffers(1, raw[1], raw[2])}), path)
    with pytest.raises(CorpusError, match=r"a\.parquet' is broken after row 0"):
        texts(path)


@pytest.mark.parametrize(
    "value", ["9" * 5000, "[" * 100_000, '{"text": ' + "9" * 5000 + "}"], ids=["long", "deep", "in"]
)
def test_what_python_does_not_read_is_named_with_its_line(tmp_path: Path, value: str) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text(f'{{"text": "fine"}}\n{value}\n')
    with pytest.raises(CorpusError, match=r"line 2 of '.*a\.jsonl' is not JSON"):
        texts(path)
    whole = tmp_path / "a.json"
    whole.write_text(value)
    with pytest.raises(RecordError, match=r"'.*a\.json' is not JSON"):
        list(read_records(str(whole)))

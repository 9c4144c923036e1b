"""Labelled texts and pairs: what is read, what is refused, folds, and rows that depend on seed and number alone."""

import gzip
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from clearhead.data.examples import ExampleRows, ExampleSet, read_examples
from clearhead.data.gaps import GapRows
from clearhead.data.packing import IGNORED, pack_text
from clearhead.data.readers import CorpusError
from clearhead.data.store import TokenStore
from clearhead.data.tokenizer import train_bpe, wrap
from clearhead.models.tasks import collate

LINES = [{"text": f"text number {i}", "label": "abc"[i % 3]} for i in range(31)]
TOKENIZER = wrap(train_bpe([line["text"] for line in LINES], 300, mask=True), mask=True)


def write(path: Path, lines: list[Any] = LINES) -> str:
    if path.suffix == ".csv":
        path.write_text("text,label\n" + "".join(f'"{one["text"]}",{one["label"]}\n' for one in lines))
    else:
        content = "\n".join(json.dumps(line) for line in lines).encode()
        path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)
    return str(path)


def read(source: str, **settings: Any) -> ExampleSet:
    chosen = {"text_field": "text", "target_field": "label", "folds": 5, "seed": 0, "labelled": True}
    return read_examples(source, **{**chosen, **settings})


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz", "a.csv"])
def test_every_kind_of_file_gives_the_same(tmp_path: Path, name: str) -> None:
    found = read(write(tmp_path / name))
    assert [(pair.text, pair.target) for pair in found.pairs] == [(o["text"], o["label"]) for o in LINES]
    assert found.labels == ("a", "b", "c")


def test_folds_are_of_one_size_and_have_their_share_of_labels(tmp_path: Path) -> None:
    found = read(write(tmp_path / "a.jsonl"))
    assert np.bincount(found.fold[found.fold >= 0]).tolist() == [6] * 5
    assert (found.fold == -1).sum() == 1
    for fold in range(5):
        held, learned = found.held_out(fold), found.learned(fold)
        assert not {pair.text for pair in held} & {pair.text for pair in learned}
        assert len(held) + len(learned) == 31
        assert {pair.target for pair in held} == {"a", "b", "c"}
    # Neither the order of the lines nor a run's seed changes who is together.
    again = read(write(tmp_path / "b.jsonl", LINES[::-1]))
    for fold in range(5):
        assert {pair.text for pair in found.held_out(fold)} == {pair.text for pair in again.held_out(fold)}
    other = read(str(tmp_path / "a.jsonl"), seed=1)
    assert {pair.text for pair in found.held_out(0)} != {pair.text for pair in other.held_out(0)}


def test_repeated_and_ambiguous_lines_are_left_out(tmp_path: Path) -> None:
    lines = [*LINES, LINES[0], {"text": " text number 1 ", "label": "z"}, {"text": "t", "label": 7}]
    found = read(write(tmp_path / "a.jsonl", lines))
    assert (found.repeated, found.ambiguous) == (1, 2)
    assert [pair.target for pair in found.pairs if pair.text == "t"] == ["7"]
    assert "text number 1" not in {pair.text for pair in found.pairs}


@pytest.mark.parametrize(
    ("lines", "said"),
    [
        (
            [{"text": "a"}],
            r"line 1 of .* has no field 'label'; its fields are text: set data\.examples\.target_field",
        ),
        ([{"text": 3, "label": "a"}], r"field 'text' in line 1 .* is int, not text"),
        ([{"text": "a", "label": None}], r"field 'label' in line 1 .* is NoneType, not text"),
        ([{"text": " ", "label": "a"}], r"field 'text' in line 1 .* is empty"),
        (LINES[:9], r"holds 9 different examples, too few for 5 folds: give at least 10"),
        ([{**line, "label": "a"} for line in LINES], r"has only the label 'a'"),
    ],
)
def test_what_cannot_be_used_is_named(tmp_path: Path, lines: list[Any], said: str) -> None:
    with pytest.raises(CorpusError, match=said):
        read(write(tmp_path / "a.jsonl", lines))


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (
            "a good text,yes\nanother,no\n",
            r"has no field 'text'; its fields are a good text, yes \(a CSV's first",
        ),
        ("text,label\nalone\n", r"field 'label' in record 1 .* is empty"),
    ],
)
def test_a_csv_without_names_and_one_without_values(tmp_path: Path, text: str, said: str) -> None:
    file = tmp_path / "a.csv"
    file.write_text(text)
    with pytest.raises(CorpusError, match=said):
        read(str(file))


def test_a_missing_file_names_the_key(tmp_path: Path) -> None:
    with pytest.raises(CorpusError, match=r"is missing: restore it or correct data\.examples\.source"):
        read(str(tmp_path / "none.csv"))


def test_rows_of_labels(tmp_path: Path) -> None:
    found = read(write(tmp_path / "a.jsonl"))
    pairs = found.learned(0)

    def rows() -> ExampleRows:
        return ExampleRows(TOKENIZER, pairs, 24, 500, 3, labels=found.labels)

    one, other = rows(), rows()
    seen = []
    for index in range(len(pairs)):
        row = one[index]
        size = int(row["attention_mask"].sum())
        text = TOKENIZER.decode(row["input_ids"][1 : size - 1])
        assert (row["input_ids"][0], row["input_ids"][size - 1]) == (1, 2)
        assert (row["input_ids"][size:] == 0).all() and len(row["input_ids"]) == 24
        seen.append(text)
        assert {p.text: p.target for p in pairs}[text] == found.labels[int(row["labels"])]
    assert sorted(seen) == sorted(pair.text for pair in pairs)
    for index in (400, 7):
        assert all((one[index][key] == other[index][key]).all() for key in one[index])


def test_the_first_held_out_examples_are_a_sample_of_a_sorted_file(tmp_path: Path) -> None:
    lines = [{"text": f"text number {i}", "label": f"label {i // 40}"} for i in range(400)]
    found = read(write(tmp_path / "a.jsonl", lines))
    for fold in range(5):
        held = found.held_out(fold)
        assert len({pair.target for pair in held[:32]}) >= 8
    # Nor does the order of the lines change them.
    again = read(write(tmp_path / "b.jsonl", lines[::-1]))
    assert again.held_out(2) == found.held_out(2)


def test_rows_of_targets_are_moved_by_one(tmp_path: Path) -> None:
    found = read(write(tmp_path / "a.jsonl"), labelled=False)
    row = ExampleRows(TOKENIZER, found.pairs, 24, 10, 0, target_length=6)[4]
    labels = row["labels"][row["labels"] != IGNORED]
    assert labels[-1] == 2 and row["decoder_input_ids"][0] == 1
    assert (row["decoder_input_ids"][1 : len(labels)] == labels[:-1]).all()
    batch = collate([row, row])
    assert batch["labels"].shape == batch["decoder_input_ids"].shape == (2, len(labels))
    assert batch["input_ids"].shape[1] == int(row["attention_mask"].sum())


def test_gaps_and_their_targets_make_the_text_again() -> None:
    store = TokenStore.from_documents([list(range(4, 204)), list(range(50, 150))], bos_token_id=1)
    text = pack_text(store, 32, 0, document_masks=False)
    rows, again = (GapRows(TOKENIZER, text, 12, 100, 0) for _ in range(2))
    sizes = set()
    for index in range(60):
        row = rows[index]
        source = row["input_ids"][row["attention_mask"] == 1]
        (place,) = np.flatnonzero(source == TOKENIZER.mask_token_id)
        target = row["labels"][row["labels"] != IGNORED]
        assert target[-1] == 2
        whole = np.concatenate([source[:place], target[:-1], source[place + 1 :]])
        assert (whole == text[index]["input_ids"]).all()
        assert (row["decoder_input_ids"][: len(target)] == [1, *target[:-1]]).all()
        sizes.add(len(target) - 1)
        assert all((again[index][key] == row[key]).all() for key in row)
    assert sizes == set(range(1, 9))  # A quarter of the row at most.

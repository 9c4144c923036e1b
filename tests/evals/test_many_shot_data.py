"""Labelled sets: what is read, what is refused, which texts are asked and which demonstrate, in what order."""

from __future__ import annotations

import gzip
import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import datasets
import pytest

from clearhead.evals.asking.records import RecordError, UnreachableError
from clearhead.evals.in_context.labelled import Example, LabelledSet, open_labelled
from clearhead.evals.in_context.rounds import divide, in_rounds, permuted

ROWS = [(f"what is  {n}", "number") for n in range(6)] + [(f"who is {n}\t?", "person") for n in range(4)]


def write(path: Path, rows: Sequence[tuple[Any, Any]], fields: tuple[str, str] = ("text", "label")) -> str:
    lines = [json.dumps(dict(zip(fields, row, strict=True))) for row in rows]
    data = "\n".join(lines).encode()
    path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)
    return str(path)


def test_a_set_is_the_same_from_every_kind_of_file(tmp_path: Path) -> None:
    plain = open_labelled(write(tmp_path / "q.jsonl", ROWS))
    assert plain.name == "q" and plain.labels == ("number", "person") and plain.test is None
    assert plain.examples[0] == Example("what is 0", "number") and plain.examples[-1].text == "who is 3 ?"
    packed = open_labelled(write(tmp_path / "q.jsonl.gz", ROWS, ("a", "b")), "a", "b")
    table = tmp_path / "q.csv"
    table.write_text("\ufefflabel,text\r\n" + "".join(f'{label},"{text}"\r\n' for text, label in ROWS))
    assert packed == plain == open_labelled(str(table))


def test_a_text_counts_once_and_not_at_all_where_its_label_is_in_doubt(tmp_path: Path) -> None:
    rows = [*ROWS, ("what is 0 ", "number"), ("when", "number"), ("when", "person"), (" ", "person")]
    data = open_labelled(write(tmp_path / "q.jsonl", rows))
    assert len(data.examples) == 10 and (data.repeated, data.ambiguous) == (1, 2)
    numbers = open_labelled(write(tmp_path / "n.jsonl", [("a", 0), ("b", 1)]))
    assert numbers.labels == ("0", "1")


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([], "is empty"),
        ([("a", "x"), ("b", "x")], "has only the label 'x'"),
        ([("a", "x"), ("b", "x ")], "labels 'x' and 'x ' of the set 'q' differ only in white space"),
        ([("a", "x"), ("b", " ")], "a text without a label"),
        ([("a", "x"), (3, "y")], "field 'text' in line 2 of .* is int, not text"),
        ([("a", "x"), ("b", None)], "field 'label' in line 2 of .* is NoneType, not a label"),
    ],
)
def test_sets_that_cannot_be_used(rows: list[tuple[Any, Any]], message: str, tmp_path: Path) -> None:
    with pytest.raises(RecordError, match=message):
        open_labelled(write(tmp_path / "q.jsonl", rows))


def test_sources_that_cannot_be_used(tmp_path: Path) -> None:
    with pytest.raises(
        RecordError, match=r"line 1 .* has no field 'label'; its fields are kind, text: set label_field"
    ):
        open_labelled(write(tmp_path / "f.jsonl", ROWS, ("text", "kind")))
    (tmp_path / "f.csv").write_text("text,kind\na,b\n")
    with pytest.raises(RecordError, match=r"record 1 .* has no field 'label'; its fields are kind, text"):
        open_labelled(str(tmp_path / "f.csv"))
    (tmp_path / "f.csv").write_bytes(b"text,label\n\xff,b\n")
    with pytest.raises(RecordError, match="is not CSV in UTF-8"):
        open_labelled(str(tmp_path / "f.csv"))
    half = tmp_path / "h.jsonl.gz"
    half.write_bytes(gzip.compress(json.dumps({"text": "a", "label": "b"}).encode())[:-9])
    with pytest.raises(RecordError, match="is not a whole gzip file"):
        open_labelled(str(half))
    with pytest.raises(RecordError, match="no labelled set 'banking7': did you mean 'banking77'"):
        open_labelled("banking7")
    with pytest.raises(RecordError, match="is not a dataset id"):
        open_labelled("hf:nothing")
    (tmp_path / "q.txt").write_text("a")
    with pytest.raises(RecordError, match=r"is none of \.jsonl, \.jsonl\.gz, \.csv"):
        open_labelled(str(tmp_path / "q.txt"))


def test_published_sets_come_divided_and_named(monkeypatch: pytest.MonkeyPatch) -> None:
    names = ["book_flight", "oos", "set_alarm"]
    features = datasets.Features(
        {"text": datasets.Value("string"), "intent": datasets.ClassLabel(names=names)}
    )

    def part(texts: str, labels: list[int]) -> datasets.Dataset:
        return datasets.Dataset.from_dict({"text": list(texts), "intent": labels}, features=features)

    asked: list[Any] = []

    def load(path: str, config: str | None, split: str | None) -> Any:
        asked.append((path, config, split))
        # "a" stands in both parts: it is asked, so it does not demonstrate.
        return datasets.DatasetDict(train=part("abcd", [0, 0, 2, 1]), test=part("aef", [0, 2, 1]))

    monkeypatch.setattr(datasets, "load_dataset", load)
    data = open_labelled("clinic150")
    assert asked == [("clinc/clinc_oos", "plus", None)]
    assert data.labels == ("book flight", "set alarm")
    assert data.examples == (Example("b", "book flight"), Example("c", "set alarm"))
    assert data.test == (Example("a", "book flight"), Example("e", "set alarm")) and data.repeated == 1
    assert (data.text_template, data.label_template) == ("utterance: {text}", "intent: {label}")
    with pytest.raises(RecordError, match="has no field 'label'; its fields are intent, text"):
        open_labelled("hf:clinc/clinc_oos")

    def offline(*unused: Any, **options: Any) -> Any:
        raise ConnectionError("Couldn't reach the hub\nand a long story")

    monkeypatch.setattr(datasets, "load_dataset", offline)
    with pytest.raises(
        UnreachableError, match=r"'SetFit/TREC-QC' cannot be opened \(Couldn't reach the hub\)$"
    ):
        open_labelled("trec")


def made(sizes: dict[str, int], test: dict[str, int] | None = None) -> LabelledSet:
    def examples(part: str, counts: dict[str, int]) -> tuple[Example, ...]:
        return tuple(
            Example(f"{part} {label} {n}", label) for label, size in counts.items() for n in range(size)
        )

    return LabelledSet("made", examples("p", sizes), None if test is None else examples("t", test))


def test_asked_texts_have_the_sets_own_labels_and_demonstrate_nothing() -> None:
    data = made({"a": 60, "b": 30, "c": 9, "d": 1})
    pool, asked = divide(data, 20, seed=0)
    assert Counter(e.label for e in asked) == {"a": 12, "b": 6, "c": 2}
    assert len(pool) == 80 and not set(pool) & set(asked) and {e.label for e in pool} == set("abcd")
    assert divide(data, 20, seed=0) == (pool, asked) and divide(data, 20, seed=1)[1] != asked
    # One of each label stays to demonstrate with.
    pool, asked = divide(data, 96, seed=0)
    assert Counter(e.label for e in pool) == dict.fromkeys("abcd", 1)
    with pytest.raises(RecordError, match=r"100 different texts .* items is 97, at most 96"):
        divide(data, 97, seed=0)
    divided = made({"a": 3, "b": 3}, {"a": 4, "b": 2})
    pool, asked = divide(divided, 6, seed=0)
    assert set(pool) == set(divided.examples) and set(asked) == set(divided.test or ())
    with pytest.raises(RecordError, match="items is 7, at most 6 can be asked"):
        divide(divided, 7, seed=0)


def test_demonstrations_give_every_label_as_evenly_as_the_pool_allows() -> None:
    pool = made({"a": 8, "b": 4, "c": 2}).examples
    order = in_rounds(pool, seed=0, draw=0)
    assert sorted(map(str, order)) == sorted(map(str, pool))
    assert [Counter(e.label for e in order[:k]) for k in (3, 6, 10)] == [
        {"a": 1, "b": 1, "c": 1}, {"a": 2, "b": 2, "c": 2}, {"a": 4, "b": 4, "c": 2},
    ]  # fmt: skip
    assert in_rounds(pool, seed=0, draw=0) == order != in_rounds(pool, seed=0, draw=1)
    firsts = Counter(in_rounds(pool, seed=0, draw=d)[0].label for d in range(300))
    assert min(firsts.values()) > 60, "no label is always the first"


def test_permutations_keep_the_demonstrations_and_by_class_lets_the_classes_take_turns() -> None:
    shown = list(made({"a": 4, "b": 3, "c": 1}).examples)
    seen = [permuted(shown, "random", 0, p) for p in range(200)]
    assert all(sorted(map(str, one)) == sorted(map(str, shown)) for one in seen)
    places = Counter(one.index(shown[0]) for one in seen)
    assert len(places) == 8 and max(places.values()) < 50, "every place is about equally likely"
    turns = set()
    for p in range(30):
        one = permuted(shown, "by_class", 0, p)
        assert sorted(map(str, one)) == sorted(map(str, shown))
        labels = [e.label for e in one]
        first = labels[:3]
        expected = [first, [x for x in first if x != "c"], [x for x in first if x != "c"], ["a"]]
        assert labels == [label for turn in expected for label in turn]
        turns.add(tuple(first))
    assert len(turns) == 6 and permuted(shown, "by_class", 0, 3) == permuted(shown, "by_class", 0, 3)

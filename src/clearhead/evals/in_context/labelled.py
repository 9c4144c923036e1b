"""Labelled texts to learn from in a context: files, Hugging Face datasets, and the published sets by their names.

White space in texts and labels is collapsed to single spaces, so that a line ends a label. A text that occurs again
counts once; one that occurs with different labels does not count at all.
"""

from __future__ import annotations

import csv
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from clearhead.data.corpora import HUB_ID
from clearhead.data.readers import suffix_of
from clearhead.evals.asking.records import RecordError, UnreachableError, json_lines
from clearhead.evals.reasons import reason_of
from clearhead.registry import did_you_mean

KINDS = (".jsonl", ".jsonl.gz", ".csv")
TEXT_TEMPLATE = "Text: {text}"
LABEL_TEMPLATE = "Label: {label}"


@dataclass(frozen=True)
class Example:
    """A text and its label."""

    text: str
    label: str


@dataclass(frozen=True)
class LabelledSet:
    """Examples, in a fixed order, no text twice.

    test: those to be asked, of a set that comes divided; None where the division is still to be made.
    repeated, ambiguous: texts left out because they were there before, or there with another label.
    """

    name: str
    examples: tuple[Example, ...]
    test: tuple[Example, ...] | None
    text_template: str = TEXT_TEMPLATE
    label_template: str = LABEL_TEMPLATE
    repeated: int = 0
    ambiguous: int = 0

    @property
    def labels(self) -> tuple[str, ...]:
        return tuple(sorted({example.label for example in (*self.examples, *(self.test or ()))}))


@dataclass(frozen=True)
class PublishedSet:
    """Where a published set lies on the hub, and the words around its texts in Bertsch et al.'s program.

    dropped: a label that is none of the set's classes. words: an underscore in a label stands for a space.
    """

    dataset: str
    config: str | None
    label: str
    text_template: str
    label_template: str
    dropped: str | None = None
    words: bool = False


PUBLISHED = {
    "trec": PublishedSet("SetFit/TREC-QC", None, "label_coarse_text", "Question: {text}", "Type: {label}"),
    "trec_fine": PublishedSet("SetFit/TREC-QC", None, "label_text", "Question: {text}", "Type: {label}"),
    "banking77": PublishedSet(
        "mteb/banking77", None, "label_text", "query: {text}", "intent: {label}", words=True
    ),
    "clinic150": PublishedSet(
        "clinc/clinc_oos", "plus", "intent", "utterance: {text}", "intent: {label}", "oos", words=True
    ),
}
Row = tuple[str, str]
"""(text, label) as they stand in the source."""


def open_labelled(source: str, text_field: str = "text", label_field: str = "label") -> LabelledSet:
    """The examples of `source`.

    * one of `trec`, `trec_fine`, `banking77`, `clinic150`: the published sets, from the hub;
    * `hf:owner/name[:config][:split]`: a Hugging Face dataset; its `test` split is asked if it has one and no
      split is named;
    * a .jsonl, .jsonl.gz or .csv file with the fields `text_field` and `label_field`.

    Raises RecordError for a source that does not exist or cannot be used, UnreachableError for what the hub does not
    give.
    """
    if source in PUBLISHED:
        known = PUBLISHED[source]
        parts = _hub_rows(known.dataset, known.config, None, "text", known.label)
        parts = {
            split: [
                (text, label.replace("_", " ") if known.words else label)
                for text, label in rows
                if label != known.dropped
            ]
            for split, rows in parts.items()
        }
        return _divided(source, parts, known.text_template, known.label_template)
    if source.startswith("hf:"):
        name = source.removeprefix("hf:")
        if not HUB_ID.fullmatch(name):
            raise RecordError(
                f"{source!r} is not a dataset id: write hf:owner/name, optionally :config and :split"
            )
        path, config, split = [*name.split(":"), "", ""][:3]
        return _divided(source, _hub_rows(path, config or None, split or None, text_field, label_field))
    file = Path(source).expanduser()
    if not file.is_file():
        raise RecordError(
            f"there is no labelled set {source!r}: {did_you_mean(source, PUBLISHED)} – a set is a file "
            f"({', '.join(KINDS)}), hf:owner/name or one of {', '.join(PUBLISHED)}"
        )
    if suffix_of(file) not in KINDS:
        raise RecordError(f"{source!r} is none of {', '.join(KINDS)}: convert it")
    rows = list(_csv_rows(file, text_field, label_field) if suffix_of(file) == ".csv" else _json_rows(
        file, text_field, label_field
    ))  # fmt: skip
    return _divided(file.name.removesuffix(suffix_of(file)), {"train": rows})


def _divided(
    name: str,
    parts: dict[str, list[Row]],
    text_template: str = TEXT_TEMPLATE,
    label_template: str = LABEL_TEMPLATE,
) -> LabelledSet:
    """The parts of a source as a set: `train` (or the only part) to learn from, `test` to be asked."""
    first = "train" if "train" in parts else next(iter(parts))
    learnt, asked = parts[first], parts.get("test", []) if first != "test" else []
    written: dict[str, str] = {}
    for _, label in (*learnt, *asked):
        clean = " ".join(label.split())
        if not clean:
            raise RecordError(f"the set {name!r} has a text without a label: remove it or label it")
        if written.setdefault(clean, label) != label:
            raise RecordError(
                f"the labels {written[clean]!r} and {label!r} of the set {name!r} differ only in white space: "
                "write them alike"
            )
    if not written:
        raise RecordError(f"the set {name!r} is empty: it holds no labelled text")
    if len(written) == 1:
        raise RecordError(
            f"the set {name!r} has only the label {next(iter(written))!r}: choosing takes at least two"
        )
    both = [
        [(" ".join(text.split()), " ".join(label.split())) for text, label in part if text.strip()]
        for part in (learnt, asked)
    ]
    kinds: dict[str, set[str]] = {}
    for text, label in (*both[0], *both[1]):
        kinds.setdefault(text, set()).add(label)
    # A text that is asked is never among the demonstrations, so the asked part comes first.
    seen: set[str] = set()
    kept: list[tuple[Example, ...]] = []
    for part in (both[1], both[0]):
        rows = []
        for text, label in part:
            if len(kinds[text]) == 1 and text not in seen:
                seen.add(text)
                rows.append(Example(text, label))
        kept.append(tuple(rows))
    counts = Counter(text for part in both for text, _ in part)
    return LabelledSet(
        name,
        kept[1],
        kept[0] if asked else None,
        text_template,
        label_template,
        repeated=sum(counts[text] - 1 for text in seen),
        ambiguous=sum(counts[text] for text in counts if len(kinds[text]) > 1),
    )


def _json_rows(path: Path, text_field: str, label_field: str) -> Iterator[Row]:
    for where, record in json_lines(path):
        yield _row(record, text_field, label_field, where)


def _csv_rows(path: Path, text_field: str, label_field: str) -> Iterator[Row]:
    number = 1
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            for number, record in enumerate(csv.DictReader(file, restkey=""), start=2):
                yield _row(record, text_field, label_field, f"record {number - 1} of '{path}'")
    except OSError as error:
        raise RecordError(f"'{path}' cannot be read ({error.strerror or error})") from error
    except (UnicodeDecodeError, csv.Error) as error:
        raise RecordError(
            f"'{path}' is not CSV in UTF-8 (after record {number - 1}: {error}): convert it"
        ) from error


def _row(record: dict[str, Any], text_field: str, label_field: str, where: str) -> Row:
    for option, name in (("text_field", text_field), ("label_field", label_field)):
        if name not in record:
            fields = ", ".join(sorted(filter(None, map(str, record)))) or "none"
            raise RecordError(f"{where} has no field {name!r}; its fields are {fields}: set {option}")
    text, label = record[text_field], record[label_field]
    if not isinstance(text, str):
        raise RecordError(
            f"field {text_field!r} in {where} is {type(text).__name__}, not text: set text_field"
        )
    if not isinstance(label, str | int):
        raise RecordError(
            f"field {label_field!r} in {where} is {type(label).__name__}, not a label: set label_field"
        )
    return text, str(label)


def _hub_rows(
    dataset: str, config: str | None, split: str | None, text_field: str, label_field: str
) -> dict[str, list[Row]]:
    """The rows of each split, or of the one that is named; numbers of classes become their names."""
    import datasets

    try:
        loaded = datasets.load_dataset(dataset, config, split=split)
    # The library raises a dozen unrelated types for no network and for a wrong name.
    except Exception as error:
        raise UnreachableError(
            f"the Hugging Face dataset {dataset!r} cannot be opened ({reason_of(error)})"
        ) from error
    parts = {split: loaded} if split is not None else dict(loaded)
    found: dict[str, list[Row]] = {}
    for name, part in parts.items():
        kind = part.features.get(label_field)
        names = kind.names if isinstance(kind, datasets.ClassLabel) else None
        where = f"the dataset {dataset!r}"
        found[str(name)] = list(_named(part, names, text_field, label_field, where))
    return found


def _named(
    part: Iterable[dict[str, Any]], names: list[str] | None, text_field: str, label_field: str, where: str
) -> Iterator[Row]:
    for record in part:
        text, label = _row(record, text_field, label_field, where)
        if names is not None:
            # Datasets mark what has no label by -1, which would be the last class.
            number = int(label) if label.lstrip("-").isdigit() else -1
            if not 0 <= number < len(names):
                raise RecordError(
                    f"field {label_field!r} in {where} is {label}, none of its {len(names)} classes: name a split "
                    "whose texts are labelled"
                )
            label = names[number]
        yield text, label

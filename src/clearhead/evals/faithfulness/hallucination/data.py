"""Documents to summarise and questions to answer from a document: files, and the published sets by their names."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from clearhead.evals.asking.records import Record, RecordError, hub_records, read_records, text_of, value_of
from clearhead.evals.faithfulness.judges.base import Task
from clearhead.registry import did_you_mean

LONGBENCH = "Xnhyacinth/LongBench"
"""LongBench (Bai et al. 2024) without a loading script, the copy that lm-evaluation-harness reads."""
FIELDS = ("document", "reference", "question")


@dataclass(frozen=True)
class PublishedJudgements:
    """Where a set lies on the hub, its fields for a document, a reference and a question ("" for a summary)."""

    dataset: str
    config: str | None
    task: Task
    document: str
    reference: str
    question: str = ""


PUBLISHED = {
    "xsum": PublishedJudgements("EdinburghNLP/xsum", None, "summarisation", "document", "summary"),
    "cnn_dm": PublishedJudgements("abisee/cnn_dailymail", "3.0.0", "summarisation", "article", "highlights"),
    "multi_news": PublishedJudgements(LONGBENCH, "multi_news", "summarisation", "context", "answers"),
    "qasper": PublishedJudgements(LONGBENCH, "qasper", "qa", "context", "answers", "question"),
    "hotpotqa": PublishedJudgements(LONGBENCH, "hotpotqa", "qa", "context", "answers", "question"),
    "2wikimqa": PublishedJudgements(LONGBENCH, "2wikimqa", "qa", "context", "answers", "question"),
}


@dataclass(frozen=True)
class Item:
    """A document, right answers or a summary of it, and the question of the task qa."""

    index: int
    document: str
    references: tuple[str, ...]
    question: str = ""


@dataclass(frozen=True)
class ItemSet:
    name: str
    task: Task
    items: tuple[Item, ...]


def known_source(source: str) -> None:
    """Raises RecordError for what is neither a published set nor a file, with the nearest name."""
    if source not in PUBLISHED and not Path(source).expanduser().is_file():
        raise RecordError(
            f"there is no file or set {source!r}: {did_you_mean(source, PUBLISHED)} – a set is a file of JSON lines or "
            f"one of {', '.join(PUBLISHED)}"
        )


def open_set(source: str, fields: Mapping[str, str], samples: int, seed: int) -> ItemSet:
    """`samples` items drawn from a set, the same for every model. Fields of files are renamed by `fields`.

    A file whose records have a question is of the task qa. A published set is read from its test split.
    Raises RecordError (or CorpusError) for a file that cannot be used, UnreachableError for what the hub does not give.
    """
    if source in PUBLISHED:
        known = PUBLISHED[source]
        records = list(hub_records(known.dataset, known.config, "test"))
        drawn = _drawn(records, samples, seed)
        named = {"document": known.document, "reference": known.reference, "question": known.question}
        return ItemSet(source, known.task, tuple(_items(drawn, named, known.task)))
    known_source(source)
    records = list(read_records(source))
    named = {field: fields.get(field, field) for field in FIELDS}
    task: Task = "qa" if named["question"] in records[0][1] else "summarisation"
    name = Path(source).name.partition(".")[0]
    # All are looked at: a file with a broken record is to be mended, whatever is drawn.
    items = list(_items(enumerate(records), named, task))
    return ItemSet(name, task, tuple(items[i] for i in _indices(len(items), samples, seed)))


def _indices(count: int, samples: int, seed: int) -> list[int]:
    order = np.random.default_rng(seed).permutation(count)[:samples]
    return sorted(int(i) for i in order)


def _drawn(records: Sequence[Record], samples: int, seed: int) -> Iterator[tuple[int, Record]]:
    return ((i, records[i]) for i in _indices(len(records), samples, seed))


def _items(records: Any, named: Mapping[str, str], task: Task) -> Iterator[Item]:
    for index, (where, record) in records:
        document = text_of(record, named["document"], where, "fields.document").strip()
        given = value_of(record, named["reference"], where, "fields.reference")
        references = [given] if isinstance(given, str) else given
        if not isinstance(references, list) or not all(isinstance(one, str) for one in references):
            raise RecordError(
                f"field '{named['reference']}' in {where} is neither a text nor a list of texts"
            )
        question = (
            text_of(record, named["question"], where, "fields.question").strip() if task == "qa" else ""
        )
        yield Item(index, document, tuple(one.strip() for one in references if one.strip()), question)

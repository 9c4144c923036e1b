"""Examples to learn from: labelled texts, or pairs of a source and a target, in JSON lines or CSV.

White space around a text is cut off. A text that occurs again counts once; one that occurs with different labels does
not count at all. The examples are divided into folds of equal size, label by label, by a hash of the texts: a run with
seed s holds out fold s modulo the number of folds, and every arm with that seed the same one.
"""

from __future__ import annotations

import csv
import gzip
import hashlib
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from clearhead.data.packing import IGNORED, Example
from clearhead.data.readers import CorpusError, decode, encodable, parse, suffix_of
from clearhead.data.tokenizer import encode_texts

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast


@dataclass(frozen=True)
class TextPair:
    """A text, and its label or the text to be written for it."""

    text: str
    target: str


@dataclass(frozen=True)
class ExampleSet:
    """Examples without repetitions, in a fixed order. repeated, ambiguous: how many lines were left out, and why.

    fold: (n,) of each example; −1 for the few that are left over by folds of equal size and are always learned.
    """

    pairs: tuple[TextPair, ...]
    fold: NDArray[np.int64]
    repeated: int = 0
    ambiguous: int = 0

    @cached_property
    def labels(self) -> tuple[str, ...]:
        return tuple(sorted({pair.target for pair in self.pairs}))

    def held_out(self, fold: int) -> list[TextPair]:
        """In an order of its own: the first of them are a sample, also of a file that is sorted by label."""
        found = [self.pairs[i] for i in np.flatnonzero(self.fold == fold)]
        return sorted(found, key=lambda pair: _digest(fold, pair.text))

    def learned(self, fold: int) -> list[TextPair]:
        return [self.pairs[i] for i in np.flatnonzero(self.fold != fold)]


def read_examples(
    source: str, *, text_field: str, target_field: str, folds: int, seed: int, labelled: bool
) -> ExampleSet:
    """The examples of a .jsonl, .jsonl.gz or .csv file. labelled: targets are labels, of which each fold has its share.

    Raises CorpusError, naming file, line and key, for a file that cannot be used, for fewer examples than folds and for
    labels of which there is but one.
    """
    path = Path(source).expanduser()
    try:
        rows = [_pair(record, text_field, target_field, where) for where, record in _records(path)]
    except FileNotFoundError:
        raise CorpusError(f"'{path}' is missing: restore it or correct data.examples.source") from None
    except (OSError, EOFError) as error:
        raise CorpusError(f"'{path}' cannot be read ({error}): repair it") from error
    kinds: dict[str, set[str]] = {}
    for pair in rows:
        kinds.setdefault(pair.text, set()).add(pair.target)
    clear = [pair for pair in rows if len(kinds[pair.text]) == 1]
    pairs = tuple(dict.fromkeys(clear))
    if len(pairs) < 2 * folds:
        raise CorpusError(
            f"'{path}' holds {len(pairs)} different examples, too few for {folds} folds: give at least {2 * folds}"
        )
    found = ExampleSet(
        pairs, divide(pairs, folds, seed, labelled), len(clear) - len(pairs), len(rows) - len(clear)
    )
    if labelled and len(found.labels) < 2:
        raise CorpusError(f"'{path}' has only the label {found.labels[0]!r}: choosing takes at least two")
    return found


def divide(pairs: Sequence[TextPair], folds: int, seed: int, labelled: bool) -> NDArray[np.int64]:
    """The fold of each pair: dealt out in the order of a hash, label after label; what does not go round has −1."""

    def key(i: int) -> tuple[str, bytes]:
        return (pairs[i].target if labelled else "", _digest(seed, pairs[i].text))

    order = sorted(range(len(pairs)), key=key)
    whole = len(pairs) // folds * folds
    fold = np.full(len(pairs), -1, dtype=np.int64)
    fold[order[:whole]] = np.arange(whole) % folds
    return fold


def _digest(seed: int, text: str) -> bytes:
    return hashlib.sha256(f"{seed}:{text}".encode()).digest()


def _records(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    if suffix_of(path) == ".csv":
        yield from _csv(path)
        return
    opener: Callable[..., Any] = gzip.open if suffix_of(path) == ".jsonl.gz" else open
    offset = 0
    with opener(path, "rb") as file:
        for number, raw in enumerate(file, start=1):
            line = decode(raw, path, offset).strip()
            offset += len(raw)
            if line:
                yield f"line {number} of '{path}'", parse(line, path, number)


def _csv(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    number = 0
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            for number, record in enumerate(csv.DictReader(file, restkey=""), start=1):
                yield f"record {number} of '{path}'", record
    except (UnicodeDecodeError, csv.Error) as error:
        raise CorpusError(
            f"'{path}' is not CSV in UTF-8 (after record {number}: {error}): convert it"
        ) from error


def _pair(record: dict[str, Any], text_field: str, target_field: str, where: str) -> TextPair:
    found, of_csv = [], where.startswith("record")
    for key, name in (("text_field", text_field), ("target_field", target_field)):
        if name not in record:
            fields = ", ".join(sorted(filter(None, map(str, record)))) or "none"
            first = " (a CSV's first line names them)" if of_csv else ""
            raise CorpusError(
                f"{where} has no field {name!r}; its fields are {fields}{first}: set data.examples.{key} to one of them"
            )
        value = record[name]
        if value is None and of_csv:
            raise CorpusError(f"field {name!r} in {where} is empty: fill it or remove the line")
        whole = key == "target_field" and isinstance(value, int) and not isinstance(value, bool)
        if not isinstance(value, str) and not whole:
            raise CorpusError(
                f"field {name!r} in {where} is {type(value).__name__}, not text: set data.examples.{key}"
            )
        text = encodable(str(value).strip(), where)
        if not text:
            raise CorpusError(f"field {name!r} in {where} is empty: fill it or remove the line")
        found.append(text)
    return TextPair(*found)


def encoded(tokenizer: PreTrainedTokenizerFast, texts: list[str], length: int) -> list[NDArray[np.int64]]:
    """Each text between bos and eos, in at most `length` tokens: a longer one loses its end, but not its eos."""
    begin, end = tokenizer.bos_token_id, tokenizer.eos_token_id
    tail = [] if end is None else [end]
    return [
        np.array([begin, *ids[: length - 1 - len(tail)], *tail], dtype=np.int64)
        for ids in encode_texts(tokenizer, texts)
    ]


def padded(ids: NDArray[np.int64], length: int, fill: int) -> NDArray[np.int64]:
    """`ids` with `fill` behind them."""
    return np.pad(ids, (0, length - len(ids)), constant_values=fill)


class ExampleRows:
    """One example a row, `length` tokens with padding; each epoch takes them in an order of (seed, epoch).

    A row is {"input_ids", "attention_mask", "labels"}. Without `target_length` the last is the number of the label;
    with it the ids of the target and eos, −100 behind them, and "decoder_input_ids" are the same, moved by one behind
    bos.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerFast,
        pairs: Sequence[TextPair],
        length: int,
        rows: int,
        seed: int,
        *,
        labels: Sequence[str] | None = None,
        target_length: int | None = None,
    ) -> None:
        self.length = length
        self.rows = rows
        self.seed = seed
        self.pad = int(tokenizer.pad_token_id)
        self.target_length = target_length
        self.texts = encoded(tokenizer, [pair.text for pair in pairs], length)
        if labels is not None:
            number = {label: i for i, label in enumerate(labels)}
            self.targets = [np.array(number[pair.target], dtype=np.int64) for pair in pairs]
        else:
            assert target_length is not None
            self.targets = encoded(tokenizer, [pair.target for pair in pairs], target_length + 1)
        self._epoch, self._order = -1, np.zeros(0, dtype=np.int64)

    def __len__(self) -> int:
        return self.rows

    def kind(self, index: int) -> str:
        """What the row is, for the log."""
        return "example" if self.target_length is None else "text"

    def __getitem__(self, index: int) -> Example:
        epoch, place = divmod(index, len(self.texts))
        if epoch != self._epoch:
            order = np.random.default_rng((self.seed, epoch)).permutation(len(self.texts))
            self._epoch, self._order = epoch, order
        return self.row(int(self._order[place]))

    def row(self, number: int) -> Example:
        """Example `number`, in the order in which they were given."""
        ids, target = self.texts[number], self.targets[number]
        found = {
            "input_ids": padded(ids, self.length, self.pad),
            "attention_mask": padded(np.ones_like(ids), self.length, 0),
        }
        if self.target_length is None:
            return {**found, "labels": target}
        return {
            **found,
            "decoder_input_ids": padded(target[:-1], self.target_length, self.pad),
            "labels": padded(target[1:], self.target_length, IGNORED),
        }


def label_counts(found: ExampleSet) -> str:
    """How many examples each label has, the most frequent first, at most six of them."""
    counts = Counter(pair.target for pair in found.pairs).most_common()
    more = f", {len(counts) - 6} more labels" if len(counts) > 6 else ""
    return ", ".join(f"{label} {number}" for label, number in counts[:6]) + more

"""Retrieval training data: needle documents, repeated segments, and their mixture with packed text.

Everything here is a pure function of ``(seed, index)``: the same pair gives the same tokens in every process and in any
order, which is what makes a resumed run see what an uninterrupted one would have seen.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from fractions import Fraction
from typing import Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from clearhead.data.needles import (
    IGNORE,
    QUESTION,
    TEMPLATE,
    Haystack,
    NeedleSample,
    NeedleSpec,
    Split,
    Tokenizer,
    chance_level,
    in_validation,
    minimum_length,
    needle_document,
    text_run,
    vocabulary,
)

__all__ = [
    "IGNORE",
    "Mixture",
    "NeedleRange",
    "NeedleSample",
    "NeedleSpec",
    "Split",
    "chance_level",
    "copy_document",
    "in_validation",
    "minimum_length",
    "needle_document",
]

Kind = Literal["text", "copy", "needles"]
Example = dict[str, NDArray[np.int64]]

SHORTEST_SEGMENT = 4
# Last word of the seed of a random stream: 0 and 1 are the needle documents'.
_COPIES = {"train": 2, "validation": 3}
_ROWS = {"needles": 4, "copy": 5}


class TextRows(Protocol):
    """Packed text (``packing.pack_text``): ``[i]`` works for every ``i >= 0``."""

    def __getitem__(self, index: int, /) -> Example: ...


def copy_document(length: int, *, seed: int, index: int, split: Split, tokenizer: Tokenizer) -> Example:
    """A random segment of ordinary tokens, repeated until ``length`` tokens are full.

    The segment has 4 to half of the document's tokens. Only what is predictable is labelled: the repetition from its
    second token on (where the segment ends is not announced).
    """
    language = vocabulary(tokenizer)
    longest = (length - 1) // 2
    if longest < 1:
        raise ValueError(f"a repeated segment needs at least 3 tokens, not {length}")
    rng = np.random.default_rng((seed, index, _COPIES[split]))
    period = int(rng.integers(min(SHORTEST_SEGMENT, longest), longest + 1))
    segment = language.ordinary[rng.integers(len(language.ordinary), size=period)]
    ids = np.concatenate([[language.bos], np.resize(segment, length - 1)])
    labels = ids.copy()
    labels[: 1 + period + 1] = IGNORE
    return {"input_ids": ids, "labels": labels, "position_ids": np.arange(length)}


@dataclass(frozen=True)
class NeedleRange:
    """Needle (and copy) documents of a training mixture: each draws its length and its number of needles uniformly.

    lengths, needles: (fewest, most). A document too short for its needles or questions gets as many as have room.
    """

    lengths: tuple[int, int] = (32, 128)
    needles: tuple[int, int] = (1, 16)
    questions: int = 4
    key_tokens: int = 2
    value_tokens: int = 2
    template: str = TEMPLATE
    question: str = QUESTION
    learn_context: bool = False

    def __post_init__(self) -> None:
        for name, (low, high) in (("lengths", self.lengths), ("needles", self.needles)):
            if not 1 <= low <= high:
                raise ValueError(
                    f"needles: {name} must be [fewest, most] with 1 <= fewest <= most, not [{low}, {high}]"
                )

    def spec(self, length: int, needles: int, questions: int) -> NeedleSpec:
        return NeedleSpec(
            length,
            needles,
            min(questions, needles),
            self.key_tokens,
            self.value_tokens,
            self.template,
            self.question,
            self.learn_context,
        )

    def fitting(self, length: int, needles: int, tokenizer: Tokenizer) -> NeedleSpec:
        """The largest spec with at most ``needles`` needles that has room in ``length`` tokens."""
        for count in range(needles, 0, -1):
            spec = self.spec(length, count, min(self.questions, count))
            if minimum_length(spec, tokenizer) <= length:
                return spec
        least = minimum_length(self.spec(length, 1, 1), tokenizer)
        raise ValueError(
            f"data.needles.lengths: a document of {length} tokens has no room for one needle; use at least {least}"
        )


@dataclass(frozen=True)
class Mixture:
    """Training rows of exactly ``length`` tokens: text, needle documents and copy documents by shares of rows.

    ``[i]`` is a pure function of ``(seed, i)`` for every ``i >= 0``: ``{"input_ids", "labels", "position_ids"}``.
    Labels are unshifted, -100 where nothing is to be learned; position_ids restart at each document when
    ``document_masks``. A row is of one kind, ``kind(i)``; text rows are used in order, each once per epoch of the text.
    In the first n rows each kind's share is exact to less than two rows, for every n.
    """

    text: TextRows
    haystack: Haystack
    tokenizer: Tokenizer
    length: int
    rows: int
    seed: int
    needle_share: float = 0.0
    copy_share: float = 0.0
    needles: NeedleRange = field(default_factory=NeedleRange)
    document_masks: bool = True
    split: Split = "train"

    def __post_init__(self) -> None:
        shares = (self.needle_share, self.copy_share)
        if min(shares) < 0 or sum(shares) > 1:
            raise ValueError(
                f"data: needle_share + copy_share must lie in 0..1, not {self.needle_share} + {self.copy_share}"
            )
        if sum(shares) > 0 and self.needles.lengths[0] > self.length:
            raise ValueError(
                f"data.needles.lengths starts at {self.needles.lengths[0]}, but a row has {self.length} tokens; "
                "lower it or raise data.length"
            )
        if self.needle_share > 0:
            self.needles.fitting(min(self.needles.lengths[0], self.length), 1, self.tokenizer)

    def __len__(self) -> int:
        return self.rows

    def _number(self, index: int) -> tuple[Kind, int]:
        """Kind of row ``index`` and its number among the rows of that kind, without looking at the rows before."""
        needle, copy = (
            Fraction(share).limit_denominator(1000) for share in (self.needle_share, self.copy_share)
        )
        made = math.floor(index * (needle + copy))
        if math.floor((index + 1) * (needle + copy)) == made:
            return "text", index - made
        copied = math.floor(made * copy / (needle + copy))
        if math.floor((made + 1) * copy / (needle + copy)) == copied:
            return "needles", made - copied
        return "copy", copied

    def kind(self, index: int) -> Kind:
        """ "text", "copy" or "needles": what row ``index`` holds."""
        return self._number(index)[0]

    def __getitem__(self, index: int) -> Example:
        if index < 0:
            raise IndexError(f"row {index}: rows are numbered from 0")
        kind, number = self._number(index)
        if kind == "text":
            return self.text[number]
        return self._row(kind, number)

    def _row(self, kind: Literal["copy", "needles"], number: int) -> Example:
        rng = np.random.default_rng((self.seed, number, _ROWS[kind]))
        lengths = _cut(rng, self.length, self.needles.lengths)
        pieces = [
            self._document(kind, rng, number * self.length + place, length)
            for place, length in enumerate(lengths)
        ]
        row = {key: np.concatenate([piece[key] for piece in pieces]) for key in pieces[0]}
        missing = self.length - len(row["input_ids"])
        if missing:
            row["input_ids"] = np.concatenate([row["input_ids"], text_run(rng, self.haystack, missing)])
            row["labels"] = np.concatenate([row["labels"], np.full(missing, IGNORE)])
            row["position_ids"] = np.concatenate([row["position_ids"], np.arange(missing)])
        if not self.document_masks:
            row["position_ids"] = np.arange(self.length)
        return row

    def _document(
        self, kind: Literal["copy", "needles"], rng: np.random.Generator, index: int, length: int
    ) -> Example:
        if kind == "copy":
            return copy_document(
                length, seed=self.seed, index=index, split=self.split, tokenizer=self.tokenizer
            )
        low, high = self.needles.needles
        spec = self.needles.fitting(length, int(rng.integers(low, high + 1)), self.tokenizer)
        sample = needle_document(
            spec,
            seed=self.seed,
            index=index,
            haystack=self.haystack,
            split=self.split,
            tokenizer=self.tokenizer,
        )
        return {"input_ids": sample.input_ids, "labels": sample.labels, "position_ids": np.arange(length)}


def _cut(rng: np.random.Generator, total: int, lengths: tuple[int, int]) -> list[int]:
    """Cut ``total`` tokens into documents of low..high tokens; what is left over is always shorter than low."""
    low, high = lengths
    cuts: list[int] = []
    while total >= low:
        if total <= high:
            cuts.append(total)
            break
        # Leave room for another document when the lengths allow it.
        most = min(high, total - low)
        cuts.append(int(rng.integers(low, most + 1)) if most >= low else high)
        total -= cuts[-1]
    return cuts

"""Retrieval training data: needle documents, shuffled pairs, and their mixture with packed text.

Everything here is a pure function of `(seed, index)`: the same pair gives the same tokens in every process and in any
order, which is what makes a resumed run see what an uninterrupted one would have seen.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from fractions import Fraction
from functools import lru_cache
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from clearhead.data.needles import (
    IGNORE,
    QUESTION,
    TEMPLATE,
    NeedleHaystack,
    NeedleSample,
    NeedleSpec,
    NeedleTokenizer,
    Split,
    chance_level,
    draw_facts,
    in_validation,
    minimum_length,
    needle_document,
    sentences,
    text_run,
    vocabulary,
)
from clearhead.data.store import TextRows

__all__ = [
    "IGNORE",
    "Mixture",
    "NeedleRange",
    "NeedleSample",
    "NeedleSpec",
    "Split",
    "chance_level",
    "in_validation",
    "minimum_length",
    "needle_document",
    "pair_document",
]

Kind = Literal["text", "pairs", "needles"]
Example = dict[str, NDArray[np.int64]]

# Last word of the seed of a random stream: 0 and 1 are the needle documents'.
_PAIRS = {"train": 2, "validation": 3}
_ROWS = {"needles": 4, "pairs": 5}


def pair_document(
    spec: NeedleSpec, *, seed: int, index: int, split: Split, tokenizer: NeedleTokenizer
) -> Example:
    """Retrieval with no text around it: bos, the needles of `spec`, then a question about each of them, shuffled.

    Labels on the answers. A large part of the tokens teaches, and with few needles the right one is a large part of
    what is seen: the mechanism forms here first. `spec.length` and `spec.questions` do not matter.
    """
    needle, question = sentences(spec, tokenizer)
    language = vocabulary(tokenizer)
    rng = np.random.default_rng((seed, index, _PAIRS[split]))
    keys, values = draw_facts(rng, spec, language, split)
    order = rng.permutation(spec.needles)
    asked = question.write(keys[order], values[order])
    labels = np.full(asked.shape, IGNORE)
    labels[:, -spec.value_tokens :] = asked[:, -spec.value_tokens :]
    facts = np.concatenate([[language.bos], needle.write(keys, values).ravel()])
    ids = np.concatenate([facts, asked.ravel()])
    return {
        "input_ids": ids,
        "labels": np.concatenate([np.full(len(facts), IGNORE), labels.ravel()]),
        "position_ids": np.arange(len(ids)),
    }


def repeated_segment(rng: np.random.Generator, bos: int, words: NDArray[np.int64], length: int) -> Example:
    """bos and a run of random words, twice: `length` tokens, or one less if that is even. Labels on the second run.

    What followed this word before? Copying asks it at every token, and retrieval is made of nothing else.
    """
    run = rng.choice(words, (length - 1) // 2)
    ids = np.concatenate([[bos], run, run])
    labels = np.concatenate([np.full(1 + len(run), IGNORE), run])
    return {"input_ids": ids, "labels": labels, "position_ids": np.arange(len(ids))}


@dataclass(frozen=True)
class NeedleRange:
    """Needle and pair documents of a training mixture: each draws its length and its number of needles.

    lengths, needles, pairs: (fewest, most); pairs are those of a pair document. Lengths are log-uniform: retrieval is
    learned on short documents first; counts are uniform. repeats: the share of pair rows that hold repeated segments
    (`repeated_segment`) of those lengths instead. A document too short for its needles or questions gets as
    many as have room.
    """

    lengths: tuple[int, int] = (32, 128)
    needles: tuple[int, int] = (1, 16)
    pairs: tuple[int, int] = (1, 4)
    questions: int = 4
    key_tokens: int = 2
    value_tokens: int = 2
    template: str = TEMPLATE
    question: str = QUESTION
    repeats: float = 0.0
    learn_context: bool = False
    separate_words: bool = False

    def __post_init__(self) -> None:
        for name, (low, high) in (
            ("lengths", self.lengths),
            ("needles", self.needles),
            ("pairs", self.pairs),
        ):
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
            self.separate_words,
        )

    def fitting(self, length: int, needles: int, tokenizer: NeedleTokenizer) -> NeedleSpec:
        """The largest spec with at most `needles` needles that has room in `length` tokens."""
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
    """Training rows of exactly `length` tokens: text, needle documents and pair documents by shares of rows.

    `[i]` is a pure function of `(seed, i)` for every `i >= 0`: `{"input_ids", "labels", "position_ids"}`.
    Labels are unshifted, -100 where nothing is to be learned; position_ids restart at each document when
    `document_masks`. A row is of one kind, `kind(i)`; text rows are used in order, each once per epoch of the text.
    The first `pairs_first` of the rows are pair documents only: retrieval forms sooner when nothing else pulls at the
    weights. In any n rows after them each kind has its share, exact to less than two rows.
    """

    text: TextRows
    haystack: NeedleHaystack
    tokenizer: NeedleTokenizer
    length: int
    rows: int
    seed: int
    needle_share: float = 0.0
    pair_share: float = 0.0
    pairs_first: float = 0.0
    needles: NeedleRange = field(default_factory=NeedleRange)
    document_masks: bool = True
    split: Split = "train"

    def __post_init__(self) -> None:
        shares = (self.needle_share, self.pair_share)
        if min(shares) < 0 or sum(shares) > 1:
            raise ValueError(
                f"data: needle_share + pair_share must lie in 0..1, not {self.needle_share} + {self.pair_share}"
            )
        if not 0 <= self.pairs_first < 1:
            raise ValueError(f"data.pairs_first must be at least 0 and below 1, not {self.pairs_first}")
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
        """Kind of row `index` and its number among the rows of that kind, without looking at the rows before."""
        lead = round(self.rows * self.pairs_first)
        if index < lead:
            return "pairs", index
        index -= lead
        needle, pair, whole = _whole_shares(self.needle_share, self.pair_share)
        made = index * (needle + pair) // whole
        if (index + 1) * (needle + pair) // whole == made:
            return "text", index - made
        paired = made * pair // (needle + pair)
        if (made + 1) * pair // (needle + pair) == paired:
            return "needles", made - paired
        return "pairs", lead + paired

    def text_before(self, index: int) -> int:
        """How many of the first `index` rows are text."""
        after = index - min(index, round(self.rows * self.pairs_first))
        needle, pair, whole = _whole_shares(self.needle_share, self.pair_share)
        return after - after * (needle + pair) // whole

    def kind(self, index: int) -> Kind:
        """ "text", "pairs" or "needles": what row `index` holds."""
        return self._number(index)[0]

    def __getitem__(self, index: int) -> Example:
        if index < 0:
            raise IndexError(f"row {index}: rows are numbered from 0")
        kind, number = self._number(index)
        if kind == "text":
            return self.text[number]
        return self._row(kind, number)

    def _row(self, kind: Literal["pairs", "needles"], number: int) -> Example:
        rng = np.random.default_rng((self.seed, number, _ROWS[kind]))
        if kind == "needles":
            pieces = self._needles(rng, number)
        elif self.needles.repeats and rng.random() < self.needles.repeats:
            pieces = self._repeats(rng)
        else:
            pieces = self._pairs(rng, number)
        if missing := self.length - sum(len(piece["input_ids"]) for piece in pieces):
            filler = text_run(rng, self.haystack, missing)
            pieces.append(
                {"input_ids": filler, "labels": np.full(missing, IGNORE), "position_ids": np.arange(missing)}
            )
        row = {key: np.concatenate([piece[key] for piece in pieces]) for key in pieces[0]}
        if not self.document_masks:
            row["position_ids"] = np.arange(self.length)
        return row

    def _needles(self, rng: np.random.Generator, number: int) -> list[Example]:
        pieces: list[Example] = []
        for place, length in enumerate(_cut(rng, self.length, self.needles.lengths)):
            wanted = int(rng.integers(self.needles.needles[0], self.needles.needles[1] + 1))
            sample = needle_document(
                self.needles.fitting(length, wanted, self.tokenizer),
                seed=self.seed,
                index=number * self.length + place,
                haystack=self.haystack,
                split=self.split,
                tokenizer=self.tokenizer,
            )
            pieces.append(
                {"input_ids": sample.input_ids, "labels": sample.labels, "position_ids": np.arange(length)}
            )
        return pieces

    def _repeats(self, rng: np.random.Generator) -> list[Example]:
        language = vocabulary(self.tokenizer)
        lengths = _cut(rng, self.length, self.needles.lengths)
        return [repeated_segment(rng, language.bos, language.words, length) for length in lengths]

    def _pairs(self, rng: np.random.Generator, number: int) -> list[Example]:
        pieces: list[Example] = []
        spec = self.needles.spec(self.length, 1, 1)
        needle, question = sentences(spec, self.tokenizer)
        fact = needle.size(spec) + question.size(spec)
        left = self.length
        while (room := (left - 1) // fact) > 0:
            wanted = min(room, int(rng.integers(self.needles.pairs[0], self.needles.pairs[1] + 1)))
            pieces.append(
                pair_document(
                    self.needles.spec(self.length, wanted, wanted),
                    seed=self.seed,
                    index=number * self.length + len(pieces),
                    split=self.split,
                    tokenizer=self.tokenizer,
                )
            )
            left -= 1 + wanted * fact
        return pieces


@lru_cache(maxsize=64)
def _whole_shares(needle: float, pair: float) -> tuple[int, int, int]:
    """Both shares as numerators over one denominator: each row asks for its kind, and whole numbers are quick."""
    first, second = (Fraction(share).limit_denominator(1000) for share in (needle, pair))
    whole = math.lcm(first.denominator, second.denominator)
    return int(first * whole), int(second * whole), whole


def _cut(rng: np.random.Generator, total: int, lengths: tuple[int, int]) -> list[int]:
    """Cut `total` tokens into documents of low..high tokens, log-uniformly; what is left over is shorter than low."""
    low, high = lengths
    cuts: list[int] = []
    while total >= low:
        if total <= high:
            cuts.append(total)
            break
        # Leave room for another document when the lengths allow it.
        most = min(high, total - low)
        cuts.append(_log_uniform(rng, low, most) if most >= low else high)
        total -= cuts[-1]
    return cuts


def _log_uniform(rng: np.random.Generator, low: int, high: int) -> int:
    """A whole number in low..high, as likely to lie in one octave as in the next."""
    return min(high, int(low * ((high + 1) / low) ** rng.random()))

"""Needle documents: facts hidden in real text, and questions about them.

A *needle* is a key and a value written as a sentence in the corpus's own tokens (`"\\n# {key}{value}"` reads like a
comment line in source code). The needles lie in a run of real text; questions that repeat a key stand at the end, and
the answer to each is the value. Keys and values are tuples of word tokens. A hash of the tuple says whether it
belongs to training or to validation, so that no key and no value of the validation split is ever one in training,
whatever the seed.

A document is a pure function of `(spec, seed, index, split, depth)`, the corpus and the tokenizer.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache
from typing import Literal, Protocol

import numpy as np
from numpy.typing import NDArray

Split = Literal["train", "validation"]
Role = Literal["key", "value"]
Ids = NDArray[np.int64]

IGNORE = -100
VALIDATION_SHARE = Fraction(1, 4)
FEWEST_WORDS = 16
TEMPLATE = "\n# {key}{value}"
QUESTION = "\n# {key}{value}"

_SALT = {"key": 0x9E3779B97F4A7C15, "value": 0xD1B54A32D192ED03}
# Last word of the seed of a random stream, so that documents of different kinds never share random numbers.
_STREAM = {"train": 0, "validation": 1}


class NeedleTokenizer(Protocol):
    """What this module asks of a Hugging Face tokenizer."""

    @property
    def bos_token_id(self) -> int | None: ...

    @property
    def all_special_ids(self) -> list[int]: ...

    def __hash__(self) -> int: ...

    def __len__(self) -> int: ...

    def encode(self, text: str, *, add_special_tokens: bool) -> list[int]: ...

    def decode(self, token_ids: list[int]) -> str | list[str]: ...


class NeedleHaystack(Protocol):
    """What this module asks of a token store: all tokens of the corpus in one flat array."""

    @property
    def tokens(self) -> NDArray[np.integer]: ...


@dataclass(frozen=True)
class NeedleSpec:
    """Shape of one needle document.

    length: tokens of the whole document, the bos token, the questions and their answers included.
    needles: facts in the context; questions: how many of them are asked, each once.
    key_tokens, value_tokens: word tokens of a key and of a value.
    template, question: the sentence of a fact and of a question; each names `{key}` and then `{value}` once. The
        document ends with the value of its last question, so nothing may follow `{value}` in `question`.
    learn_context: also put labels on the text around the needles (never on the needles' own tokens).
    separate_words: keys and values share no word: every other word of the vocabulary is for keys, the rest for values,
        as a city and a number are different kinds of words.
    """

    length: int
    needles: int = 1
    questions: int = 1
    key_tokens: int = 2
    value_tokens: int = 2
    template: str = TEMPLATE
    question: str = QUESTION
    learn_context: bool = False
    separate_words: bool = False

    def __post_init__(self) -> None:
        for name in ("length", "needles", "questions", "key_tokens", "value_tokens"):
            if getattr(self, name) < 1:
                raise ValueError(f"needles: {name} must be at least 1, not {getattr(self, name)}")
        if self.questions > self.needles:
            raise ValueError(
                f"needles: {self.questions} questions about {self.needles} needles; each needle is asked once"
            )
        _parts("template", self.template)
        if _parts("question", self.question)[2]:
            raise ValueError(
                f"needles: question {self.question!r} must end with {{value}}: the answer ends the document"
            )


@dataclass(frozen=True)
class NeedleSample:
    """One needle document and where everything lies in it (slices of `input_ids`; all per question, in asked order).

    answers: the value after a question: exact match holds when each of its tokens is the argmax given those before it.
    needle_spans: the same value in the context; question_spans: the question up to its answer, key included.
    sentence_spans: the whole asked needle, template words included. depth: tokens of context before the first asked
    needle, divided by the largest number possible (0 = right after bos, 1 = right before the questions).
    """

    input_ids: Ids
    labels: Ids
    answers: tuple[slice, ...]
    needle_spans: tuple[slice, ...]
    question_spans: tuple[slice, ...]
    sentence_spans: tuple[slice, ...]
    keys: Ids
    values: Ids
    depth: float


@dataclass(frozen=True)
class Sentence:
    """A template in tokens: `before key between value after`."""

    before: Ids
    between: Ids
    after: Ids

    def size(self, spec: NeedleSpec) -> int:
        return len(self.before) + spec.key_tokens + len(self.between) + spec.value_tokens + len(self.after)

    def value_start(self, spec: NeedleSpec) -> int:
        return len(self.before) + spec.key_tokens + len(self.between)

    def write(self, keys: Ids, values: Ids) -> Ids:
        """keys (n, K), values (n, V) -> sentences (n, size)"""
        n = len(keys)
        fixed = [np.broadcast_to(part, (n, len(part))) for part in (self.before, self.between, self.after)]
        return np.concatenate([fixed[0], keys, fixed[1], values, fixed[2]], axis=1)


@dataclass(frozen=True)
class Words:
    """What a tokenizer offers for retrieval documents: its bos and its word tokens."""

    bos: int
    words: Ids


def _parts(name: str, template: str) -> tuple[str, str, str]:
    before, key, rest = template.partition("{key}")
    between, value, after = rest.partition("{value}")
    if not key or not value or "{key}" in rest or "{value}" in before + after:
        raise ValueError(f"needles: {name} {template!r} must name {{key}} once and then {{value}} once")
    return before, between, after


@lru_cache(maxsize=32)
def _sentence(tokenizer: NeedleTokenizer, name: str, template: str) -> Sentence:
    ids = [np.array(tokenizer.encode(part, add_special_tokens=False) if part else [], dtype=np.int64)
           for part in _parts(name, template)]  # fmt: skip
    return Sentence(*ids)


@lru_cache(maxsize=8)
def vocabulary(tokenizer: NeedleTokenizer) -> Words:
    """Tokens of a tokenizer by use. A word is a token of two letters or more, whatever the space around it.

    Raises ValueError when the tokenizer has no bos token or too few words.
    """
    if tokenizer.bos_token_id is None:
        raise ValueError("the tokenizer has no bos token to begin a document with; set tokenizer.bos_token")
    special = set(tokenizer.all_special_ids)
    ordinary = [i for i in range(len(tokenizer)) if i not in special]
    words = [i for i in ordinary if len(word := str(tokenizer.decode([i])).strip()) >= 2 and word.isalpha()]
    if len(words) < FEWEST_WORDS:
        raise ValueError(
            f"the tokenizer has {len(words)} tokens that are words, too few for needles; raise tokenizer.vocab_size"
        )
    return Words(tokenizer.bos_token_id, np.array(words))


def words_for(spec: NeedleSpec, language: Words, role: Role) -> Ids:
    """The words that keys, or values, of `spec` are made of."""
    if not spec.separate_words:
        return language.words
    return language.words[0 if role == "key" else 1 :: 2]


def in_validation(tuples: Ids, role: Role) -> NDArray[np.bool_]:
    """(n, tokens) -> (n,): which tuples belong to the validation split, by a fixed 64-bit hash (splitmix64)."""
    with np.errstate(over="ignore"):
        state = np.full(len(tuples), _SALT[role], dtype=np.uint64)
        for column in np.asarray(tuples, dtype=np.uint64).T:
            state = (state ^ column) + np.uint64(0x9E3779B97F4A7C15)
            state = (state ^ (state >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
            state = (state ^ (state >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
            state ^= state >> np.uint64(31)
    return state % np.uint64(VALIDATION_SHARE.denominator) < np.uint64(VALIDATION_SHARE.numerator)


def sentences(spec: NeedleSpec, tokenizer: NeedleTokenizer) -> tuple[Sentence, Sentence]:
    """The template of a needle and that of a question, in tokens."""
    return _sentence(tokenizer, "template", spec.template), _sentence(tokenizer, "question", spec.question)


def minimum_length(spec: NeedleSpec, tokenizer: NeedleTokenizer) -> int:
    """Fewest tokens in which the needles, at any depth, and the questions of `spec` have room."""
    needle, question = (sentence.size(spec) for sentence in sentences(spec, tokenizer))
    # One needle's worth of text lets the asked needle stand at any token offset between the others.
    return 1 + (spec.needles + 1) * needle + spec.questions * question


def chance_level(spec: NeedleSpec, tokenizer: NeedleTokenizer, split: Split = "validation") -> float:
    """Exact match of a guess drawn uniformly from all values of the split: 1 / their number.

    A reader that copies the value of a random needle of the document, ignoring the key, reaches `1 / needles`.
    """
    words = words_for(spec, vocabulary(tokenizer), "value")
    total = len(words) ** spec.value_tokens
    if total > 1_000_000:
        share = VALIDATION_SHARE if split == "validation" else 1 - VALIDATION_SHARE
        return 1.0 / (total * float(share))
    grid = np.stack(np.meshgrid(*[words] * spec.value_tokens, indexing="ij"), axis=-1).reshape(total, -1)
    count = int((in_validation(grid, "value") == (split == "validation")).sum())
    return 1.0 / max(count, 1)


def draw(rng: np.random.Generator, words: Ids, count: int, size: int, role: Role, split: Split) -> Ids:
    """`count` distinct tuples of `size` words that belong to the split -> (count, size)"""
    found: dict[tuple[int, ...], None] = {}
    for _ in range(64):
        candidates = words[rng.integers(len(words), size=(8 * count, size))]
        mine = candidates[in_validation(candidates, role) == (split == "validation")]
        found.update(dict.fromkeys(map(tuple, mine.tolist())))
        if len(found) >= count:
            return np.array(list(found)[:count], dtype=np.int64)
    raise ValueError(
        f"needles: fewer than {count} distinct {role}s of {size} tokens in the {split} split; "
        f"raise {role}_tokens or tokenizer.vocab_size, or ask for fewer needles"
    )


def draw_facts(rng: np.random.Generator, spec: NeedleSpec, language: Words, split: Split) -> tuple[Ids, Ids]:
    """Distinct keys (needles, key_tokens) and distinct values (needles, value_tokens) of the split."""
    keys = draw(rng, words_for(spec, language, "key"), spec.needles, spec.key_tokens, "key", split)
    values = draw(rng, words_for(spec, language, "value"), spec.needles, spec.value_tokens, "value", split)
    return keys, values


def text_run(rng: np.random.Generator, haystack: NeedleHaystack, count: int) -> Ids:
    """A run of `count` corpus tokens from a random place; it may cross the end of a document."""
    tokens = haystack.tokens
    start = int(rng.integers(max(1, len(tokens) - count + 1)))
    piece = np.asarray(tokens[start : start + count], dtype=np.int64)
    return piece if len(piece) == count else np.resize(piece, count)


def needle_document(
    spec: NeedleSpec,
    *,
    seed: int,
    index: int,
    haystack: NeedleHaystack,
    split: Split,
    tokenizer: NeedleTokenizer,
    depth: float | None = None,
) -> NeedleSample:
    """Document `index` of `seed`: bos, context with needles, questions and answers; exactly `spec.length` tokens.

    depth: place of the first asked needle: it starts `round(depth · (context − needle))` tokens after bos, exactly;
    the other needles, or all of them when `None`, stand at random places. Needles never overlap.
    Raises ValueError when the length has no room (see `minimum_length`) or depth is outside 0..1.
    """
    needle, question = sentences(spec, tokenizer)
    language = vocabulary(tokenizer)
    size, value_at = needle.size(spec), needle.value_start(spec)
    if (least := minimum_length(spec, tokenizer)) > spec.length:
        raise ValueError(
            f"needles: {spec.needles} needles and {spec.questions} questions need at least {least} tokens, "
            f"not {spec.length}; raise the length or lower needles or questions"
        )
    rng = np.random.default_rng((seed, index, _STREAM[split]))
    keys, values = draw_facts(rng, spec, language, split)
    context = spec.length - 1 - spec.questions * question.size(spec)
    text = text_run(rng, haystack, context - spec.needles * size)
    # Needle 0 is the first one asked; `order` is how the needles follow one another in the context.
    order, before = _places(rng, spec.needles, size, context, depth)
    starts = np.empty(spec.needles, dtype=np.int64)
    starts[order] = 1 + before + size * np.arange(spec.needles)

    ids = np.empty(spec.length, dtype=np.int64)
    ids[0] = language.bos
    is_text = np.zeros(spec.length, dtype=bool)
    is_text[1 : 1 + context] = True
    cells = starts[:, None] + np.arange(size)
    is_text[cells] = False
    ids[cells] = needle.write(keys, values)
    ids[is_text] = text
    asked = slice(0, spec.questions)
    ids[1 + context :] = question.write(keys[asked], values[asked]).reshape(-1)

    ends = 1 + context + question.size(spec) * np.arange(1, spec.questions + 1)
    answers = tuple(slice(int(end) - spec.value_tokens, int(end)) for end in ends)
    labels = np.where(is_text & spec.learn_context, ids, IGNORE)
    for span in answers:
        labels[span] = ids[span]
    return NeedleSample(
        input_ids=ids,
        labels=labels,
        answers=answers,
        needle_spans=tuple(
            slice(int(s) + value_at, int(s) + value_at + spec.value_tokens) for s in starts[asked]
        ),
        question_spans=tuple(
            slice(int(e) - question.size(spec), a.start) for e, a in zip(ends, answers, strict=True)
        ),
        sentence_spans=tuple(slice(int(s), int(s) + size) for s in starts[asked]),
        keys=keys,
        values=values,
        depth=float(starts[0] - 1) / (context - size),
    )


def _places(
    rng: np.random.Generator, needles: int, size: int, context: int, depth: float | None
) -> tuple[Ids, Ids]:
    """Order of the needles in the context and, per place, the number of text tokens before it (non-decreasing)."""
    free = context - needles * size
    if depth is None:
        return rng.permutation(needles), np.sort(rng.integers(free + 1, size=needles))
    if not 0.0 <= depth <= 1.0:
        raise ValueError(f"needles: depth must lie in 0..1, not {depth}")
    start = math.floor(depth * (context - size) + 0.5)
    others, room = needles - 1, context - size - start
    first = int(np.clip(rng.binomial(others, start / (context - size)), others - room // size, start // size))
    text_before = start - first * size
    rest = 1 + rng.permutation(others)
    order = np.concatenate([rest[:first], [0], rest[first:]])
    left = np.sort(rng.integers(text_before + 1, size=first))
    right = np.sort(rng.integers(text_before, free + 1, size=others - first))
    return order, np.concatenate([left, [text_before], right])

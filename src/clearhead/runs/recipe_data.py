"""What a recipe says of its text: corpus, tokenizer, kinds of rows. Everything here is pure, as in `recipe`."""

import re
from collections.abc import Mapping
from pathlib import PurePath
from typing import Annotated, Any, Literal, Self

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, model_validator

from clearhead.data.weights import WHOLE

Share = Annotated[float, Field(ge=0, le=1)]
Count = Annotated[int, Field(ge=1, le=10**6)]
Tokens = Annotated[int, Field(ge=1, le=10**15)]
Length = Annotated[int, Field(ge=1, le=2**24)]
Period = Annotated[int, Field(ge=1, le=10**9)]
Processes = Annotated[int, Field(ge=0, le=4096)]
# What a float32 can hold.
Rate = Annotated[float, Field(gt=0, le=1e38)]
NotNegative = Annotated[float, Field(ge=0, le=1e38)]
# What every generator of random numbers takes.
Seed = Annotated[int, Field(ge=0, lt=2**32)]
LENGTHS = tuple[Length, Length]
COUNTS = tuple[Count, Count]
TaskName = Literal["causal", "masked", "seq2seq", "classify"]
# Tasks that learn from examples, and tasks that learn from the text of the corpus.
FROM_EXAMPLES: tuple[TaskName, ...] = ("classify", "seq2seq")
EXAMPLE_SUFFIXES = (".jsonl", ".jsonl.gz", ".csv")


class RecipeError(ValueError):
    """A recipe that cannot be run. The message is one sentence that names the file and the key to change."""


class RecipeTable(BaseModel):
    """A table of the recipe: unknown keys are errors, values are not converted from other types."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


def written(text: str) -> str:
    """A name of something that exists: not blank, and nothing that cannot be seen."""
    if not text.strip():
        raise ValueError("it is empty")
    if not text.isprintable():
        raise ValueError(f"{text!r} has a character that cannot be seen")
    return text


Written = Annotated[str, AfterValidator(written)]


def _template(text: str) -> str:
    """A sentence around one {key} and then one {value}; other names in braces would stand in the text as they are."""
    found = re.findall(r"\{(?:[A-Za-z_][^{}]*)?\}", text)
    if found != ["{key}", "{value}"]:
        raise ValueError(
            f"{text!r} must name {{key}} once and then {{value}} once, and nothing else in braces"
        )
    return text


def _question(text: str) -> str:
    if not _template(text).endswith("{value}"):
        raise ValueError(f"{text!r} must end with {{value}}: the answer ends the document")
    return text


def _ordered(range_: tuple[int, int], what: str) -> None:
    if range_[0] > range_[1]:
        raise ValueError(f"{what} is [smallest, largest], got {list(range_)}")


Bytes = Annotated[int, Field(ge=1, lt=2**63)]


class SourceOptions(RecipeTable):
    """One text of several; see `CorpusOptions`."""

    source: Written
    # Its part of the rows, in proportion to the weights of the others.
    weight: Annotated[float, Field(gt=0, le=1e9)] = 1.0
    text_field: Written | None = None  # left out: corpus.text_field
    max_bytes: Bytes | None = None


class CorpusOptions(RecipeTable):
    """Where the text comes from; see `clearhead.data.corpora.open_corpus` for what a source can be."""

    source: Written = "stdlib"
    # Several texts by weight in place of `source`. They are tokenized into shards and streamed: `data.streams`.
    sources: Annotated[list[SourceOptions], Field(min_length=1)] | None = None
    tokenized: Written | None = None  # the folder of the shards; with `source`, it is streamed too
    text_field: Written = "text"
    max_bytes: Bytes | None = None
    validation_fraction: Annotated[float, Field(gt=0, lt=1)] = 0.05
    # Seed of the split by document, not the seed of a run, so that all seeds share one validation set.
    seed: Seed = 0

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.sources is None:
            return self
        if self.source != "stdlib":
            raise ValueError("source and sources both name the text: leave one of them out")
        if self.max_bytes is not None:
            raise ValueError("max_bytes beside sources says nothing: set it in the tables of sources")
        names = [one.source for one in self.sources]
        if again := [name for name in names if names.count(name) > 1]:
            raise ValueError(f"sources names {again[0]!r} twice: give it once, with both weights together")
        total = sum(one.weight for one in self.sources)
        for one in self.sources:
            if one.weight / total * WHOLE < 1:
                raise ValueError(
                    f"sources: the weight {one.weight:g} of {one.source!r} is less than 1/{WHOLE:,} of all of them, "
                    f"{total:g}: raise it or leave the source out"
                )
        return self

    @property
    def named(self) -> str:
        """The text in a few words: its source, or the sources with their parts of the rows."""
        return corpus_name(self.model_dump())


def corpus_name(corpus: Mapping[str, Any]) -> str:
    """The same of a table as it stands in recipe.toml or job.json."""
    sources = corpus.get("sources")
    if not sources:
        return str(corpus.get("source", ""))
    total = sum(one["weight"] for one in sources)
    return ", ".join(f"{one['source']} ({one['weight'] / total:.1%})" for one in sources)


class TokenizerOptions(RecipeTable):
    """`bpe` trains a byte-level BPE on the training split; anything else is a Hugging Face path or id."""

    source: Written = "bpe"
    # At least 256 bytes and the special tokens; only for `bpe`.
    vocab_size: Annotated[int, Field(ge=260, le=10**7)] = 1024


class NeedleRows(RecipeTable):
    """The retrieval documents in training; see `clearhead.data.retrieval.NeedleRange`.

    A range is [smallest, largest]; lengths are drawn log-uniformly, counts uniformly.
    """

    lengths: LENGTHS = (32, 128)
    needles: COUNTS = (1, 16)
    pairs: COUNTS = (1, 4)  # facts of a pair document
    questions: Count = 4
    key_tokens: Annotated[int, Field(ge=1, le=1024)] = 2
    value_tokens: Annotated[int, Field(ge=1, le=1024)] = 2
    template: Annotated[str, AfterValidator(_template)] = "\n# {key}{value}"
    question: Annotated[str, AfterValidator(_question)] = "\n# {key}{value}"
    repeats: Share = 0.0  # of the pair rows: random words, twice, to be copied
    learn_context: bool = False  # also learn the text around the needles
    separate_words: bool = False  # keys and values are made of different words

    @model_validator(mode="after")
    def _check(self) -> Self:
        _ordered(self.lengths, "lengths")
        _ordered(self.needles, "needles")
        _ordered(self.pairs, "pairs")
        return self


class MaskOptions(RecipeTable):
    """What is hidden in masked language modelling; see `clearhead.data.masking.Masker`."""

    share: Annotated[float, Field(gt=0, lt=1)] = 0.3  # of the tokens, or of the words
    whole_words: bool = False


def _examples(text: str) -> str:
    if not PurePath(written(text)).name.lower().endswith(EXAMPLE_SUFFIXES):
        raise ValueError(f"{text!r} is none of {', '.join(EXAMPLE_SUFFIXES)}: convert it")
    return text


class ExampleOptions(RecipeTable):
    """Labelled texts, or pairs of a source and a target; see `clearhead.data.examples`."""

    source: Annotated[str, AfterValidator(_examples)] | None = None  # JSON lines or CSV
    text_field: Written = "text"
    target_field: Written = "label"  # the label, or the text to be written
    folds: Annotated[int, Field(ge=2, le=1000)] = 5  # a run with seed s holds out fold s modulo folds
    seed: Seed = 0  # of the division into folds
    target_length: Annotated[int, Field(ge=2, le=2**24)] = 64  # tokens of a target, of seq2seq


class Data(RecipeTable):
    """What a row of `length` tokens is: text, retrieval documents or shuffled pairs, by share of the rows."""

    length: Annotated[int, Field(ge=8, le=2**24)] = 256
    document_masks: bool = True
    needle_share: Share = 0.0
    pair_share: Share = 0.0
    # Share of the rows, at the beginning, that are pairs alone; after them the shares above hold.
    pairs_first: Annotated[float, Field(ge=0, lt=1)] = 0.0
    needles: NeedleRows = NeedleRows()
    # JSON lines with messages, or prompt and completion, instead of all of that; the corpus is then for evaluations.
    instructions: Written | None = None
    masks: MaskOptions = MaskOptions()  # of masked
    examples: ExampleOptions = ExampleOptions()  # of classify and seq2seq

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.instructions is not None and self.needle_share + self.pair_share + self.pairs_first > 0:
            raise ValueError("instructions take all rows: leave out needle_share, pair_share and pairs_first")
        if self.needle_share + self.pair_share > 1:
            raise ValueError(
                f"needle_share + pair_share is {self.needle_share + self.pair_share:g}; they are shares of the rows "
                "and cannot exceed 1"
            )
        if self.needle_share + self.pair_share > 0 and self.needles.lengths[0] > self.length:
            raise ValueError(
                f"needles.lengths starts at {self.needles.lengths[0]}, longer than a row (length = {self.length})"
            )
        return self


def check_task(task: TaskName, data: Data) -> None:
    """ValueError, naming the key, for rows that the task does not have or for examples that it lacks."""
    here = f'task = "{task}"'
    own = {"needle_share", "pair_share", "pairs_first", "instructions", "needles"}
    if task != "causal" and (given := sorted(own & data.model_fields_set - _default_keys(data))):
        raise ValueError(f"{here} has no rows of data.{given[0]}, which is causal's: leave it out")
    if task == "classify" and data.examples.source is None:
        raise ValueError(
            f"{here} needs data.examples.source: JSON lines or a CSV file with a text and its label a line"
        )
    if task not in FROM_EXAMPLES and data.examples != ExampleOptions():
        raise ValueError(f"{here} does not read data.examples: leave it out, or set task to one of "
                         f"{', '.join(FROM_EXAMPLES)}")  # fmt: skip
    if task != "masked" and data.masks != MaskOptions():
        raise ValueError(f'{here} hides no tokens: leave out data.masks, or set task = "masked"')


def _default_keys(data: Data) -> set[str]:
    """Keys that are set to their defaults, as in a recipe that was written out."""
    return {key for key, field in Data.model_fields.items() if getattr(data, key) == field.default}

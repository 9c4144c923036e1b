"""What evaluations of learning in context share: options, a set made ready for a tokenizer, measuring, kept answers."""

from __future__ import annotations

from abc import abstractmethod
from collections import Counter
from collections.abc import Generator, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray
from pydantic import Field, field_validator
from transformers import PreTrainedTokenizerFast

from clearhead.evals.asking.answering import fast_tokenizer
from clearhead.evals.asking.decoding import shared
from clearhead.evals.asking.haystack import digest
from clearhead.evals.asking.records import RecordError, UnreachableError
from clearhead.evals.asking.running import inference
from clearhead.evals.asking.sample_log import Key, Row
from clearhead.evals.cells import Asked, Cell, LeftOut, SampleEvaluation, grouped
from clearhead.evals.evaluation import EvaluationConfig, R
from clearhead.evals.in_context.labelled import Example, LabelledSet, open_labelled
from clearhead.evals.in_context.prompts import SEPARATOR, LabelTrie, Wording, make_prompts, make_trie
from clearhead.evals.in_context.rounds import divide
from clearhead.evals.in_context.scoring import LogitReader, Score, decide
from clearhead.evals.probing.rescaling import rescaled
from clearhead.evals.reasons import reason_of
from clearhead.evals.subject import Subject

CONTEXT = -1
"""The index of the line that holds a block's demonstrations."""
SHOWN = 2
"""Right answers, and wrong ones, that the report shows."""


class InContextConfig(EvaluationConfig):
    """sets: labelled files (.jsonl, .jsonl.gz, .csv), `hf:owner/name[:config][:split]`, or published sets by name.

    text_field, label_field: where they stand in files and datasets that are not named.
    items: texts asked of each set. length: tokens of a prompt and its answer (default: the training length).
    text_template, label_template: the lines of a demonstration (default: the published ones of a named set, else
        "Text: {text}" and "Label: {label}"). separator: between two, beginning with a line's end.
    score: greedy or likelihood, see `clearhead.evals.in_context.scoring`.
    share_prefix: read what prompts begin with only once where that is exact. It changes no answer but by rounding.
    rope_parameters: see `clearhead.evals.probing.rescaling`.
    """

    sets: list[str] = Field(min_length=1)
    text_field: str = "text"
    label_field: str = "label"
    items: int = Field(default=250, ge=1)
    length: int | None = Field(default=None, ge=1)
    text_template: str | None = None
    label_template: str | None = None
    separator: str = SEPARATOR
    score: Score = "greedy"
    share_prefix: bool = True
    batch_tokens: int = Field(default=8192, ge=1)
    rope_parameters: dict[str, Any] | None = None
    seed: int = 6000

    @field_validator("text_template")
    @classmethod
    def _holds_a_text(cls, value: str | None) -> str | None:
        if value is not None and value.count("{text}") != 1:
            raise ValueError("a text's template holds {text} once")
        return value

    @field_validator("label_template")
    @classmethod
    def _ends_with_a_label(cls, value: str | None) -> str | None:
        if value is not None and not (value.count("{label}") == 1 and value.endswith("{label}")):
            raise ValueError("a label's template ends with {label}")
        return value

    @field_validator("separator")
    @classmethod
    def _ends_a_line(cls, value: str) -> str:
        if not value.startswith("\n"):
            raise ValueError("the separator begins with the end of the label's line, \\n")
        return value

    def length_for(self, subject: Subject) -> int:
        return self.length or subject.training_length or 4096


@dataclass(frozen=True, eq=False)
class LabelledTask:
    """A set made ready: what is asked, what demonstrates, and the labels in a tokenizer's tokens.

    tails: the tokens of each asked text and the beginning of its label's line.
    texts: tells the texts of all sets of the evaluation from others.
    """

    data: LabelledSet
    form: Wording
    pool: tuple[Example, ...]
    asked: tuple[Example, ...]
    trie: LabelTrie
    tails: tuple[NDArray[np.int64], ...]
    tokenizer: PreTrainedTokenizerFast
    texts: str

    @property
    def name(self) -> str:
        return self.data.name


@dataclass(frozen=True, eq=False)
class Block:
    """Texts that are asked after the same demonstrations.

    key: the values of the log's keys but the index. family: the number of those blocks of a set that begin alike.
    rests: of each prompt, the tokens that it shares with `context`, which are not kept again, and those behind.
    """

    key: Key
    family: int
    demonstrations: tuple[Example, ...]
    indices: tuple[int, ...]
    context: NDArray[np.int64]
    rests: tuple[tuple[int, NDArray[np.int64]], ...]

    @classmethod
    def of(
        cls,
        task: LabelledTask,
        key: Key,
        family: int,
        demonstrations: Sequence[Example],
        indices: Sequence[int],
    ) -> Block:
        context, prompts = make_prompts(
            task.tokenizer,
            task.form,
            demonstrations,
            [task.asked[i].text for i in indices],
            [task.tails[i] for i in indices],
        )
        same = [shared(context, prompt) for prompt in prompts]
        rests = tuple((size, prompt[size:].copy()) for size, prompt in zip(same, prompts, strict=True))
        return cls(key, family, tuple(demonstrations), tuple(indices), context, rests)

    def prompt(self, row: int) -> NDArray[np.int64]:
        size, rest = self.rests[row]
        return np.concatenate([self.context[:size], rest])

    def size(self, row: int) -> int:
        """Tokens of a prompt."""
        size, rest = self.rests[row]
        return size + len(rest)

    @property
    def tokens(self) -> int:
        """Of the longest prompt."""
        return max(map(self.size, range(len(self.rests))))


@dataclass(frozen=True, kw_only=True)
class BlocksCell(Cell):
    """The blocks of which a set's accuracy is one value."""

    task: LabelledTask
    blocks: tuple[Block, ...]

    @cached_property
    def places(self) -> dict[Key, tuple[Block, int]]:
        """Where the prompt of a sample is: its block, and the row in it."""
        return {
            (*block.key, index): (block, row)
            for block in self.blocks
            for row, index in enumerate(block.indices)
        }


def read_sets(config: InContextConfig) -> tuple[list[LabelledSet], list[LeftOut]]:
    """All sets, before anything is measured, and why some are not there.

    Raises RecordError for a set that cannot be used.
    """
    sets: list[LabelledSet] = []
    skipped: list[LeftOut] = []
    for source in dict.fromkeys(config.sets):
        try:
            data = open_labelled(source, config.text_field, config.label_field)
        except UnreachableError as error:
            skipped.append(LeftOut(source, str(error)))
            continue
        if any(data.name == other.name for other in sets):
            raise RecordError(f"two sets are called {data.name!r}: rename one of the files")
        divide(data, config.items, config.seed)
        sets.append(data)
    return sets, skipped


def prepare(
    tokenizer: PreTrainedTokenizerFast, config: InContextConfig, data: LabelledSet, texts: str
) -> LabelledTask:
    """Raises ValueError for a tokenizer that cannot tell the labels apart."""
    form = Wording(
        config.text_template or data.text_template,
        config.label_template or data.label_template,
        config.separator,
    )
    pool, asked = divide(data, config.items, config.seed)
    trie, tails = make_trie(tokenizer, form, data.labels, [example.text for example in asked])
    return LabelledTask(data, form, tuple(pool), tuple(asked), trie, tuple(tails), tokenizer, texts)


G = TypeVar("G", bound=InContextConfig)
B = TypeVar("B", bound=BlocksCell)


class InContextEvaluation(SampleEvaluation[G, R, B]):
    """Sets of labelled texts, each asked after demonstrations: which, a subclass says."""

    @abstractmethod
    def cells_of(self, config: G, task: LabelledTask, length: int) -> Iterable[B | LeftOut]:
        """What is measured of a set, in prompts of at most `length` tokens with their answers.

        Raises ValueError with the reason why nothing of it can be.
        """

    def cells(self, subject: Subject, config: G) -> Iterator[B | LeftOut]:
        """Raises RecordError for a set that cannot be used: that is no property of the model."""
        tokenizer = fast_tokenizer(subject)
        sets, unreachable = read_sets(config)
        yield from unreachable
        texts = digest(
            [f"{e.text}\t{e.label}" for data in sets for e in (*data.examples, *(data.test or ()))]
        )
        for data in sets:
            try:
                task = prepare(tokenizer, config, data, texts)
                yield from list(self.cells_of(config, task, config.length_for(subject)))
            except ValueError as error:
                yield LeftOut(data.name, reason_of(error))

    def about(self, subject: Subject, config: G, cells: Sequence[B]) -> dict[str, Any]:
        return {"config": config.model_dump(mode="json"), "text": cells[0].task.texts}

    def samples(self, config: G, cell: B) -> Iterable[Key]:
        return cell.places

    def together(
        self, subject: Subject, config: G, samples: Sequence[tuple[B, Key]]
    ) -> Iterator[Sequence[tuple[B, Key]]]:
        """Those of a family, or only prompts of one length where the rotary frequencies depend on it.

        A rotary scaling that grows with the length is settled for each prompt and its longest answer, so that no result
        depends on what else is asked.
        """
        by_length = subject.adapter.frequencies_depend_on_length(config.rope_parameters)
        for same in grouped(samples, lambda cell, key: cell.task.name).values():
            number = {name: i for i, name in enumerate(dict.fromkeys(cell.name for cell, _ in same))}

            def kind(cell: B, key: Key, number: dict[str, int] = number) -> tuple[int, ...]:
                block, row = cell.places[key]
                return (block.family, number[cell.name], block.size(row)) if by_length else (block.family,)

            groups = grouped(same, kind)
            yield from (groups[one] for one in sorted(groups))

    def ask(self, subject: Subject, config: G, asked: Asked[B]) -> Generator[Row, None, None]:
        model, task = subject.model, asked.cells[0].task
        todo: dict[Block, list[int]] = {}
        for cell, key in asked.samples:
            block, row = cell.places[key]
            todo.setdefault(block, []).append(row)
        longest = max(todo, key=lambda block: len(block.context))
        prompts = [block.prompt(row) for block, rows in todo.items() for row in rows]
        length = max(map(len, prompts)) + task.trie.longest
        trained = subject.training_length
        with rescaled(model, config.rope_parameters, trained=trained, length=length), inference(model):
            common = longest.context if config.share_prefix else None
            reader = LogitReader(model, prompts, common, batch_tokens=config.batch_tokens, length=length)
            for block, rows in todo.items():
                names = dict(zip(self.keys, block.key, strict=False))
                yield from answers(reader, config.score, task, block, rows, names)


def answers(
    reader: LogitReader,
    score: Score,
    task: LabelledTask,
    block: Block,
    rows: Sequence[int],
    names: dict[str, Any],
) -> Iterator[Row]:
    """The demonstrations of a block, and the labels of some of its texts. names: the block's part of a row."""
    text = str(task.tokenizer.bos_token or "") + task.form.demonstrations(block.demonstrations)
    yield {**names, "index": CONTEXT, "demonstrations": text}
    for at, label in decide(reader, [block.prompt(row) for row in rows], task.trie, score):
        index = block.indices[rows[at]]
        asked, said = task.asked[index], task.trie.labels[label]
        yield {
            **names,
            "index": index,
            "asked": task.form.asked(asked.text),
            "label": asked.label,
            "answer": said,
            "right": said == asked.label,
        }


def marks(rows: Iterable[Row]) -> str:
    """One character an asked text, 1 where the label is right, in an order that all arms share."""
    return "".join("1" if row["right"] else "0" for row in sorted(rows, key=lambda row: int(row["index"])))


def task_values(task: LabelledTask) -> dict[str, Any]:
    """What the report says of a set."""
    counts = Counter(example.label for example in task.asked)
    return {
        "set": task.name,
        "labels": len(task.trie.labels),
        "majority": max(counts.values()) / len(task.asked),
        "pool": len(task.pool),
        "asked": len(task.asked),
        "form": task.form.demonstrations([Example("…", "…")]),
        "repeated": task.data.repeated,
        "ambiguous": task.data.ambiguous,
    }


def shown(records: Sequence[Row]) -> list[Row]:
    """A few right and wrong answers for the report, of different sets where there are several."""
    kept: list[Row] = []
    for wanted in (True, False):
        rows = [row for row in reversed(records) if row["index"] != CONTEXT and row["right"] == wanted]
        first = list({row["set"]: row for row in reversed(rows)}.values())
        kept += [*first, *(row for row in rows if row not in first)][:SHOWN]
    return kept

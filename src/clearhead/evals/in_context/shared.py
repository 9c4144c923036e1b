"""What evaluations of learning in context share: options, a set made ready for a tokenizer, measuring, kept answers."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import Field, field_validator
from transformers import PreTrainedTokenizerFast

from clearhead.evals.asking.answering import answer_log, fast_tokenizer
from clearhead.evals.asking.haystack import digest
from clearhead.evals.asking.records import RecordError, UnreachableError
from clearhead.evals.asking.running import inference
from clearhead.evals.asking.sample_log import SampleLog, Say
from clearhead.evals.evaluation import EvaluationConfig
from clearhead.evals.in_context.labelled import Example, LabelledSet, open_labelled
from clearhead.evals.in_context.prompts import SEPARATOR, LabelTrie, Wording, make_prompts, make_trie
from clearhead.evals.in_context.rounds import divide
from clearhead.evals.in_context.scoring import LogitReader, Score, decide
from clearhead.evals.probing.rescaling import rescaled
from clearhead.evals.reasons import Unmeasured, all_of, reason_of
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
    """

    data: LabelledSet
    form: Wording
    pool: tuple[Example, ...]
    asked: tuple[Example, ...]
    trie: LabelTrie
    tails: tuple[NDArray[np.int64], ...]
    tokenizer: PreTrainedTokenizerFast

    @property
    def name(self) -> str:
        return self.data.name


@dataclass(frozen=True, eq=False)
class Block:
    """Texts that are asked after the same demonstrations. key: the values of the log's keys but the index."""

    key: tuple[Any, ...]
    demonstrations: tuple[Example, ...]
    indices: tuple[int, ...]
    context: NDArray[np.int64]
    prompts: tuple[NDArray[np.int64], ...]

    @classmethod
    def of(
        cls,
        task: LabelledTask,
        key: tuple[Any, ...],
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
        return cls(key, tuple(demonstrations), tuple(indices), context, tuple(prompts))

    @property
    def tokens(self) -> int:
        """Of the longest prompt."""
        return max(map(len, self.prompts))


def read_sets(config: InContextConfig) -> tuple[list[LabelledSet], dict[str, str]]:
    """All sets, before anything is measured, and why some are not there.

    Raises RecordError for a set that cannot be used.
    """
    sets: list[LabelledSet] = []
    skipped: dict[str, str] = {}
    for source in dict.fromkeys(config.sets):
        try:
            data = open_labelled(source, config.text_field, config.label_field)
        except UnreachableError as error:
            skipped[source] = str(error)
            continue
        if any(data.name == other.name for other in sets):
            raise RecordError(f"two sets are called {data.name!r}: rename one of the files")
        divide(data, config.items, config.seed)
        sets.append(data)
    return sets, skipped


def prepare(tokenizer: PreTrainedTokenizerFast, config: InContextConfig, data: LabelledSet) -> LabelledTask:
    """Raises ValueError for a tokenizer that cannot tell the labels apart."""
    form = Wording(
        config.text_template or data.text_template,
        config.label_template or data.label_template,
        config.separator,
    )
    pool, asked = divide(data, config.items, config.seed)
    trie, tails = make_trie(tokenizer, form, data.labels, [example.text for example in asked])
    return LabelledTask(data, form, tuple(pool), tuple(asked), trie, tuple(tails), tokenizer)


def measure(
    subject: Subject,
    config: InContextConfig,
    task: LabelledTask,
    families: Sequence[Sequence[Block]],
    log: SampleLog,
) -> dict[tuple[Any, ...], str]:
    """Answers what `log` does not have; why blocks were left out, by their keys.

    Blocks of a family begin alike. A rotary scaling that grows with the length is settled for each prompt and its
    longest answer, and only prompts of one length are read together, so that no result depends on what else is asked.
    Raises ValueError for rotary parameters that the model cannot take.
    """
    model = subject.model
    failed: dict[tuple[Any, ...], str] = {}
    for todo in _together(
        families, log, subject.adapter.frequencies_depend_on_length(config.rope_parameters)
    ):
        longest = max(todo, key=lambda block: len(block.context))
        prompts = [block.prompts[row] for block, rows in todo.items() for row in rows]
        length = max(map(len, prompts)) + task.trie.longest
        trained = subject.training_length
        with rescaled(model, config.rope_parameters, trained=trained, length=length), inference(model):
            common = longest.context if config.share_prefix else None
            try:
                reader = LogitReader(model, prompts, common, batch_tokens=config.batch_tokens, length=length)
                for block, rows in todo.items():
                    _answer(reader, config.score, task, block, rows, log)
            except torch.OutOfMemoryError as error:
                failed |= dict.fromkeys((block.key for block in todo), reason_of(error))
    return failed


def _together(
    families: Sequence[Sequence[Block]], log: SampleLog, by_length: bool
) -> Iterator[dict[Block, list[int]]]:
    """Blocks, and which of their prompts are still to be answered, that are read together; of one length if asked."""
    for family in families:
        todo = {
            block: [row for row, i in enumerate(block.indices) if not log.has((*block.key, i))]
            for block in family
        }
        if not by_length:
            if any(todo.values()):
                yield {block: rows for block, rows in todo.items() if rows}
            continue
        for block, rows in todo.items():
            for length in sorted({len(block.prompts[row]) for row in rows}):
                yield {block: [row for row in rows if len(block.prompts[row]) == length]}


def _answer(
    reader: LogitReader, score: Score, task: LabelledTask, block: Block, rows: Sequence[int], log: SampleLog
) -> None:
    names = dict(zip(log.keys, block.key, strict=False))
    if not log.has((*block.key, CONTEXT)):
        text = str(task.tokenizer.bos_token or "") + task.form.demonstrations(block.demonstrations)
        log.add({**names, "index": CONTEXT, "demonstrations": text})
    for at, label in decide(reader, [block.prompts[row] for row in rows], task.trie, score):
        index = block.indices[rows[at]]
        asked, said = task.asked[index], task.trie.labels[label]
        log.add(
            {
                **names,
                "index": index,
                "asked": task.form.asked(asked.text),
                "label": asked.label,
                "answer": said,
                "right": said == asked.label,
            }
        )


T = TypeVar("T")


@dataclass(frozen=True)
class OverSets(Generic[T]):
    """What was measured of every set, why others or parts are left out, and a few answers."""

    sets: list[tuple[LabelledTask, T]]
    left_out: dict[str, str]
    examples: list[dict[str, Any]]
    bos: str | None


def over_sets(
    subject: Subject,
    config: InContextConfig,
    name: str,
    keys: Sequence[str],
    one: Callable[[LabelledTask, SampleLog, dict[str, str]], T | None],
    progress: Say | None = None,
) -> OverSets[T]:
    """What `one` makes of every set.

    one: (task, log, reasons that it may add to) -> the set's values, None when nothing of it could be measured; a
    ValueError is the reason why the whole set is left out. Raises RecordError for a set that cannot be used, Unmeasured
    when no set is left.
    """
    tokenizer = fast_tokenizer(subject)
    sets, left_out = read_sets(config)
    found: list[tuple[LabelledTask, T]] = []
    text = digest([f"{e.text}\t{e.label}" for data in sets for e in (*data.examples, *(data.test or ()))])
    about = {"config": config.model_dump(mode="json"), "text": text}
    with answer_log(subject, name, about, (*keys, "index"), progress) as log:
        for data in sets:
            try:
                task = prepare(tokenizer, config, data)
                measured = one(task, log, left_out)
            except ValueError as error:
                left_out[data.name] = reason_of(error)
                continue
            if measured is not None:
                found.append((task, measured))
        examples = shown(log.records)
    if not found:
        raise Unmeasured(all_of(left_out))
    return OverSets(found, left_out, examples, tokenizer.bos_token)


def answered(log: SampleLog, blocks: Sequence[Block]) -> list[dict[str, Any]]:
    """The answers of blocks in the order of the asked texts."""
    keys = {block.key for block in blocks}
    rows = [r for r in log.records if r["index"] != CONTEXT and tuple(r[k] for k in log.keys[:-1]) in keys]
    return sorted(rows, key=lambda row: int(row["index"]))


def marks(rows: Sequence[dict[str, Any]]) -> str:
    """One character an asked text, 1 where the label is right, in an order that all arms share."""
    return "".join("1" if row["right"] else "0" for row in rows)


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


def shown(records: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """A few right and wrong answers for the report, of different sets where there are several."""
    kept: list[dict[str, Any]] = []
    for wanted in (True, False):
        rows = [row for row in reversed(records) if row["index"] != CONTEXT and row["right"] == wanted]
        first = list({row["set"]: row for row in reversed(rows)}.values())
        kept += [*first, *(row for row in rows if row not in first)][:SHOWN]
    return kept

"""Knowledge conflicts: does a model answer from the context, or from what it remembers?

A question comes with a context in which the answer that the world gives was replaced by another one of its kind
(Longpre et al. 2021, arXiv 2109.05052). No judge is needed:

* *preference*: the context's answer has a higher log-likelihood after the prompt than every remembered one, by the
  mean over its tokens (the default, which does not favour short answers) and by the sum;
* the same *without the context*, which says whether the model prefers the remembered answer at all, and the preference
  on just those questions;
* *said*: which of the answers a greedy answer names. Memorisation ratio: remembered / (remembered + context's).

Data: JSON lines with `input` (question and context), `target` (the context's answer) and `target_scores` (all
answers). The prompt is `input` without outer white space, a new line and "Answer:"; an answer follows after a space.
Likelihoods are always those after this prompt; the greedy answer of a chat model is asked for in its template.
"""

from __future__ import annotations

from collections.abc import Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from pydantic import Field
from transformers import PreTrainedTokenizerFast

from clearhead.analysis.sections import Section
from clearhead.data.cache import digest_json
from clearhead.evals.asking.answering import (
    FormName,
    Ids,
    continued,
    encode,
    fast_tokenizer,
    form_of,
    frame,
    greedy_answers,
    likelihoods,
)
from clearhead.evals.asking.records import RecordError, read_records, text_of, value_of
from clearhead.evals.asking.sample_log import Key, Row
from clearhead.evals.asking.squad_rules import within
from clearhead.evals.cells import Asked, Cell, Measured, SampleEvaluation
from clearhead.evals.evaluation import EvaluationConfig
from clearhead.evals.faithfulness.knowledge_conflicts.section import (
    ConflictExample,
    ConflictItem,
    ConflictsResult,
    conflicts_section,
)
from clearhead.evals.reasons import Unmeasured, reason_of
from clearhead.evals.subject import Subject
from clearhead.runs.results import RunResults

CUE = "\nAnswer:"
CHAT = "\nAnswer with as few words as possible."
MARK = "\nContext:"
SHOWN = 2


class KnowledgeConflictsConfig(EvaluationConfig):
    """data: a .jsonl or .jsonl.gz file. samples: questions drawn from it (all, if it has fewer).

    form: of the greedy answer, chat or completion (default: chat where the tokenizer has a template).
    max_new_tokens: of a greedy answer, which ends with its line in the completion form.
    save_prompts: keep the prompts beside the answers.
    """

    data: str = Field(min_length=1)
    samples: int = Field(default=400, ge=1)
    form: FormName | None = None
    max_new_tokens: int = Field(default=32, ge=1)
    batch_tokens: int = Field(default=8192, ge=1)
    save_prompts: bool = True
    seed: int = 7000


@dataclass(frozen=True)
class Conflict:
    """A question with its context, the same without it ("" if it cannot be told apart), the answers of both kinds."""

    index: int
    asked: str
    alone: str
    context: str
    remembered: tuple[str, ...]

    @property
    def answers(self) -> tuple[str, ...]:
        """The context's answer first."""
        return (self.context, *self.remembered)


def read_conflicts(source: str) -> list[Conflict]:
    """All questions of a file. Raises RecordError (or CorpusError) for one that cannot be used."""
    found = []
    for number, (where, record) in enumerate(read_records(source)):
        asked = text_of(record, "input", where).strip()
        target = text_of(record, "target", where).strip()
        scores = value_of(record, "target_scores", where)
        if not isinstance(scores, dict) or not all(
            name.strip() and isinstance(score, int | float) for name, score in scores.items()
        ):
            raise RecordError(
                f"field 'target_scores' in {where} is not an object of answers and their scores"
            )
        remembered = tuple(
            dict.fromkeys(name.strip() for name in scores if name.strip() != target and not scores[name])
        )
        if not remembered:
            raise RecordError(
                f"field 'target_scores' in {where} names no other answer than the target {target!r} with the score 0"
            )
        alone = asked.rpartition(MARK)[0].strip()
        found.append(Conflict(number, asked, alone, target, remembered))
    return found


def draw(conflicts: Sequence[Conflict], samples: int, seed: int) -> list[Conflict]:
    """The questions that are asked: the same for every model."""
    order = np.random.default_rng(seed).permutation(len(conflicts))[:samples]
    return [conflicts[i] for i in sorted(order.tolist())]


@dataclass(frozen=True, kw_only=True)
class ConflictQuestion(Cell):
    """One question and the form of its greedy answer."""

    conflict: Conflict
    tokenizer: PreTrainedTokenizerFast
    form: FormName


class KnowledgeConflicts(SampleEvaluation[KnowledgeConflictsConfig, ConflictsResult, ConflictQuestion]):
    name = "knowledge_conflicts"
    Config = KnowledgeConflictsConfig
    Result = ConflictsResult
    keys = ("index",)
    # So many questions are written to the disk together.
    at_once = 32

    def cells(self, subject: Subject, config: KnowledgeConflictsConfig) -> Iterator[ConflictQuestion]:
        """Raises RecordError for a file that cannot be used: that is no property of the model."""
        conflicts = read_conflicts(config.data)
        tokenizer = fast_tokenizer(subject)
        form = asked_in(tokenizer, config.form)
        for one in draw(conflicts, config.samples, config.seed):
            yield ConflictQuestion(
                name=f"question {one.index}",
                length=longest(tokenizer, form, one, config.max_new_tokens),
                conflict=one,
                tokenizer=tokenizer,
                form=form,
            )

    def about(
        self, subject: Subject, config: KnowledgeConflictsConfig, cells: Sequence[ConflictQuestion]
    ) -> dict[str, Any]:
        return {
            "config": config.model_dump(mode="json", exclude={"data", "batch_tokens"}),
            "form": cells[0].form,
            "data": digest_json([[cell.conflict.asked, *cell.conflict.answers] for cell in cells]),
        }

    def samples(self, config: KnowledgeConflictsConfig, cell: ConflictQuestion) -> list[Key]:
        return [(cell.conflict.index,)]

    def together(
        self,
        subject: Subject,
        config: KnowledgeConflictsConfig,
        samples: Sequence[tuple[ConflictQuestion, Key]],
    ) -> list[Sequence[tuple[ConflictQuestion, Key]]]:
        return [samples]

    def ask(
        self, subject: Subject, config: KnowledgeConflictsConfig, asked: Asked[ConflictQuestion]
    ) -> Generator[Row, None, None]:
        tokenizer, form = asked.cells[0].tokenizer, asked.cells[0].form
        yield from measured(subject, tokenizer, config, form, [cell.conflict for cell in asked.cells])

    def why(self, skipped: Mapping[str, str]) -> str:
        return next(iter(skipped.values()), "")

    def gather(
        self,
        subject: Subject,
        config: KnowledgeConflictsConfig,
        measured: Measured[ConflictQuestion, list[Row]],
    ) -> ConflictsResult:
        records = [row for rows in measured.values for row in rows]
        cells = [cell for cell, _ in measured.pairs]
        return ConflictsResult(
            items=[summary(record) for record in records],
            chance=float(np.mean([1 / len(cell.conflict.answers) for cell in cells])),
            skipped_items=measured.skipped,
            examples=[ConflictExample.model_validate(row) for row in shown(records)],
            form=cells[0].form,
            bos=cells[0].tokenizer.bos_token,
            n=len(records),
        )

    def section(self, run: RunResults) -> Section:
        title, question = "Knowledge conflicts", "Does it answer from the text or from memory?"
        values = self.results(run)
        if not values:
            return self.missing(run, title, question)
        return conflicts_section(self.name, title, question, run, values)


def asked_in(tokenizer: PreTrainedTokenizerFast, wanted: FormName | None) -> FormName:
    """The form of the greedy answers. Raises Unmeasured for a tokenizer that cannot ask in it."""
    try:
        form = form_of(tokenizer, wanted)
        greedily(tokenizer, form, "?")
    except ValueError as error:
        raise Unmeasured(reason_of(error)) from error
    return form


def longest(tokenizer: PreTrainedTokenizerFast, form: FormName, conflict: Conflict, new_tokens: int) -> int:
    """Tokens of the longest text that a question needs: with an answer, or with room for a greedy one."""
    prompt = f"{tokenizer.bos_token or ''}{conflict.asked}{CUE}"
    return max(
        [len(continued(tokenizer, prompt, f" {answer}")[0]) for answer in conflict.answers]
        + [len(greedily(tokenizer, form, conflict.asked)) + new_tokens]
    )


def greedily(tokenizer: PreTrainedTokenizerFast, form: FormName, asked: str) -> Ids:
    """The prompt of the greedy answer."""
    before, after = frame(tokenizer, form, "", CHAT if form == "chat" else "", CUE)
    return encode(tokenizer, before + asked + after)


def measured(
    subject: Subject,
    tokenizer: PreTrainedTokenizerFast,
    config: KnowledgeConflictsConfig,
    form: FormName,
    part: Sequence[Conflict],
) -> list[dict[str, Any]]:
    """Likelihoods and greedy answers of some questions, as lines of the samples' file."""
    bos = str(tokenizer.bos_token or "")
    prompts = [f"{bos}{one.asked}{CUE}" for one in part]
    rows, places = [], []
    for number, one in enumerate(part):
        for kind, prompt in (("with", prompts[number]), ("without", f"{bos}{one.alone}{CUE}")):
            if kind == "without" and not one.alone:
                continue
            pairs = [continued(tokenizer, prompt, f" {answer}") for answer in one.answers]
            # All answers are read from one place on, so that each is given the same.
            first = max(1, min(start for _, start in pairs))
            rows += [(ids, first) for ids, _ in pairs]
            places += [(number, kind)] * len(pairs)
    scored: dict[tuple[int, str], list[list[float]]] = {}
    for place, nats in zip(
        places, likelihoods(subject.model, rows, batch_tokens=config.batch_tokens), strict=True
    ):
        scored.setdefault(place, []).append(nats)
    texts = dict(
        greedy_answers(
            subject,
            [greedily(tokenizer, form, one.asked) for one in part],
            config.max_new_tokens,
            one_line=form == "completion",
            batch_tokens=config.batch_tokens,
        )
    )
    return [
        {
            "index": one.index,
            "answers": list(one.answers),
            # [answer][0] the mean over its tokens, [answer][1] the sum.
            "with": _means(scored[number, "with"]),
            "without": _means(scored.get((number, "without"), [])),
            "answer": texts[number],
            "said": said(texts[number], one),
            "prompt": prompts[number] if config.save_prompts else None,
        }
        for number, one in enumerate(part)
    ]


def _means(rows: Sequence[Sequence[float]]) -> list[list[float]]:
    return [[sum(nats) / len(nats), sum(nats)] for nats in rows]


def said(text: str, conflict: Conflict) -> str:
    """Which answers a text names, by SQuAD's way of writing them alike: context, remembered, both or neither."""
    context = within(conflict.context, text)
    remembered = any(within(answer, text) for answer in conflict.remembered)
    if context and remembered:
        return "both"
    return "context" if context else "remembered" if remembered else "neither"


def prefers(scores: Sequence[Sequence[float]], measure: int) -> bool | None:
    """Whether the first answer beats all others by the mean (0) or the sum (1); a tie does not. None without scores."""
    if not scores:
        return None
    return scores[0][measure] > max(score[measure] for score in scores[1:])


def summary(record: dict[str, Any]) -> ConflictItem:
    """What the report needs of a line."""
    return ConflictItem(
        index=record["index"],
        mean=prefers(record["with"], 0),
        total=prefers(record["with"], 1),
        mean_without=prefers(record["without"], 0),
        total_without=prefers(record["without"], 1),
        said=record["said"],
    )


def shown(records: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """A few questions that were answered from the context and a few that were not."""
    kept = []
    for wanted in (True, False):
        rows = [record for record in records if (record["said"] == "context") == wanted]
        kept += [{key: row[key] for key in row if key != "prompt"} for row in rows[:SHOWN]]
    return kept

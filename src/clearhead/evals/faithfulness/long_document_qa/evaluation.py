"""Question answering over long documents: SQuAD articles, paragraphs together, judged by SQuAD's own rules.

The paragraph that holds the answer stands at 0, 25, 50, 75 or 100 % of a text of the article's other paragraphs, of an
exact number of tokens (`long_document_qa.prompts`). Greedy answers; exact match and F1 as in SQuAD
v1.1 (`asking.squad_rules`), and whether the answer contains a right one. Two controls need no judge:
whether what the model says occurs in the text at all (*extractive*: a model that invents says other things), and the
same questions without the text (*closed book*: what it knows anyway).

Every length and depth asks the same questions. A length that no article fills is left out with the reason.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from pydantic import Field, field_validator

from clearhead.analysis.sections import Section
from clearhead.data.cache import digest_json
from clearhead.evals.asking.answering import FormName, answer_log, fast_tokenizer, form_of, greedy_answers
from clearhead.evals.asking.sample_log import SampleLog
from clearhead.evals.asking.squad_rules import covered, exact, f1, normalised, within
from clearhead.evals.evaluation import Evaluation, EvaluationConfig, Say
from clearhead.evals.faithfulness.long_document_qa.prompts import (
    Article,
    Asker,
    Question,
    draw,
    read_articles,
)
from clearhead.evals.faithfulness.long_document_qa.section import (
    DocumentAnswer,
    DocumentCell,
    LongDocumentQaResult,
    long_document_section,
)
from clearhead.evals.reasons import Unmeasured, all_of, reason_of
from clearhead.evals.subject import Subject
from clearhead.runs.results import RunResults

SHOWN = 2
CLOSED = 0
"""The length under which the questions without a text are kept."""
AT_ONCE = 64
"""Prompts that are held, and answered together, before the next are made."""


class LongDocumentQaConfig(EvaluationConfig):
    """data: articles in SQuAD's form, .json, .jsonl or .jsonl.gz.

    lengths: tokens of a prompt (default: 1/4, 1/2 and all of the training length, at most 4096). depths: in 0..1.
    samples: questions, each asked in every cell. unique: only questions whose answers stand in one paragraph alone.
    form: chat or completion (default: chat where the tokenizer has a template). closed_book: ask without the text too.
    rope_parameters: see `clearhead.evals.probing.rescaling`.
    """

    data: str = Field(min_length=1)
    lengths: list[int] | None = Field(default=None, min_length=1)
    depths: list[float] = Field(default=[0.0, 0.25, 0.5, 0.75, 1.0], min_length=1)
    samples: int = Field(default=50, ge=1)
    unique: bool = True
    form: FormName | None = None
    closed_book: bool = True
    max_new_tokens: int = Field(default=32, ge=1)
    batch_tokens: int = Field(default=8192, ge=1)
    save_prompts: bool = True
    rope_parameters: dict[str, Any] | None = None
    seed: int = 8000

    @field_validator("depths")
    @classmethod
    def _within(cls, value: list[float]) -> list[float]:
        if not all(0 <= depth <= 1 for depth in value):
            raise ValueError("a depth lies between 0 and 1")
        return value

    def all_lengths(self, trained: int | None) -> list[int]:
        whole = min(trained or 4096, 4096)
        return sorted(set(self.lengths or [whole // part for part in (4, 2, 1)]))


@dataclass(frozen=True)
class QuestionsCell:
    """What one number is over; CLOSED for the questions alone."""

    length: int
    depth: float


class LongDocumentQa(Evaluation[LongDocumentQaConfig, LongDocumentQaResult]):
    name = "long_document_qa"
    Config = LongDocumentQaConfig
    Result = LongDocumentQaResult

    def result(
        self, subject: Subject, config: LongDocumentQaConfig, progress: Say | None = None
    ) -> LongDocumentQaResult:
        """Raises RecordError for a file that cannot be used: that is no property of the model."""
        articles = read_articles(config.data, unique=config.unique)
        asker = self._asker(subject, config, articles)
        skipped: dict[str, str] = {}
        lengths = []
        for length in config.all_lengths(subject.training_length):
            if reason := subject.too_long(length + config.max_new_tokens):
                skipped[f"{length} tokens"] = reason
            else:
                lengths.append(length)
        lengths, questions, reasons = fitting(asker, articles, lengths)
        skipped |= reasons
        if not lengths:
            raise Unmeasured(all_of(skipped))
        chosen = draw(questions, config.samples, config.seed)
        cells = [QuestionsCell(length, depth) for length in lengths for depth in dict.fromkeys(config.depths)]
        if config.closed_book:
            cells.insert(0, QuestionsCell(CLOSED, 0.0))
        about = {
            "config": config.model_dump(mode="json", exclude={"data", "batch_tokens"}),
            "form": asker.form,
            "data": digest_json([[a.title, *a.paragraphs] for a in articles]),
            "lengths": lengths,
        }
        with answer_log(subject, self.name, about, ("length", "depth", "index"), progress) as log:
            failed, unmade = every_cell(subject, asker, config, cells, chosen, log)
            records = [row for row in log.records if row["index"] not in unmade]
        skipped |= {f"{cell.length} tokens, depth {cell.depth:.0%}": why for cell, why in failed.items()}
        if unmade:
            skipped[f"{len(unmade)} questions"] = (
                "no prompt of exactly these tokens could be made of their articles"
            )
        done = [cell for cell in cells if cell not in failed and any(_of(row, cell) for row in records)]
        if not any(cell.length for cell in done):
            raise Unmeasured(all_of(skipped))
        return LongDocumentQaResult(
            cells=[values(cell, records) for cell in done],
            articles={str(i): chosen[i].article for i in range(len(chosen)) if i not in unmade},
            skipped_cells=skipped,
            examples=[DocumentAnswer.model_validate(row) for row in shown(records)],
            form=asker.form,
            bos=asker.tokenizer.bos_token,
            unique=config.unique,
            training_length=subject.training_length,
            rope_parameters=config.rope_parameters,
            n=len(records),
        )

    def _asker(self, subject: Subject, config: LongDocumentQaConfig, articles: Sequence[Article]) -> Asker:
        """Raises Unmeasured for a tokenizer that cannot ask in the form."""
        tokenizer = fast_tokenizer(subject)
        try:
            asker = Asker(articles, tokenizer, form_of(tokenizer, config.form))
            asker.around("?")
        except ValueError as error:
            raise Unmeasured(reason_of(error)) from error
        return asker

    def section(self, run: RunResults) -> Section:
        title, question = "Long documents", "Does it answer questions from a long text?"
        values = self.results(run)
        if not values:
            return self.missing(run, title, question)
        return long_document_section(self.name, title, question, run, values)


def every_cell(
    subject: Subject,
    asker: Asker,
    config: LongDocumentQaConfig,
    cells: Sequence[QuestionsCell],
    questions: Sequence[Question],
    log: SampleLog,
) -> tuple[dict[QuestionsCell, str], set[int]]:
    """Answers what `log` does not have; why cells were left out, and the questions of which no prompt could be made."""
    failed: dict[QuestionsCell, str] = {}
    unmade: set[int] = set()
    for cell in cells:
        try:
            unmade |= measure(subject, asker, config, cell, questions, log)
        except (ValueError, torch.OutOfMemoryError) as error:
            failed[cell] = reason_of(error)
    return failed, unmade


def fitting(
    asker: Asker, articles: Sequence[Article], lengths: Sequence[int]
) -> tuple[list[int], list[list[Question]], dict[str, str]]:
    """The lengths that can be asked, the questions (by article) that fit all of them, and why lengths were left out."""
    skipped: dict[str, str] = {}
    bounds = {question: asker.bounds(question) for a in articles for question in a.questions}
    kept = []
    for length in lengths:
        if not any(least <= length for least, _ in bounds.values()):
            skipped[f"{length} tokens"] = (
                f"no question and its paragraph fit into {length} tokens; the shortest need "
                f"{min(least for least, _ in bounds.values())}"
            )
        elif not any(least <= length <= most for least, most in bounds.values()):
            skipped[f"{length} tokens"] = (
                f"no article fills {length} tokens; the longest has {max(most for _, most in bounds.values())}"
            )
        else:
            kept.append(length)
    while kept:
        questions = [
            [q for q in article.questions if bounds[q][0] <= kept[0] and kept[-1] <= bounds[q][1]]
            for article in articles
        ]
        if any(questions):
            return kept, questions, skipped
        # A short paragraph in a long article is what all lengths need; the longest length gives way.
        skipped[f"{kept[-1]} tokens"] = f"no question fits both {kept[0]} and {kept[-1]} tokens"
        kept = kept[:-1]
    return [], [], skipped


def measure(
    subject: Subject,
    asker: Asker,
    config: LongDocumentQaConfig,
    cell: QuestionsCell,
    questions: Sequence[Question],
    log: SampleLog,
) -> set[int]:
    """Answers all questions of a cell that `log` does not have; the ones of which no prompt could be made."""
    unmade: set[int] = set()
    todo = [i for i in range(len(questions)) if not log.has((cell.length, cell.depth, i))]
    for start in range(0, len(todo), AT_ONCE):
        made: list[tuple[int, dict[str, Any], Any]] = []
        for index in todo[start : start + AT_ONCE]:
            question = questions[index]
            if cell.length == CLOSED:
                ids = asker.closed(question.text)
                made.append((index, {"document": None, "chance": 0.0, "at": None, "prompt": None}, ids))
                continue
            try:
                prompt = asker.prompt(question, cell.length, cell.depth)
            except ValueError:
                unmade.add(index)
                continue
            about = {
                "document": prompt.document,
                "chance": blind(prompt.document, question.answers),
                "at": prompt.before / prompt.around,
                "prompt": prompt.text,
            }
            made.append((index, about, prompt.ids))
        said = greedy_answers(
            subject,
            [ids for _, _, ids in made],
            config.max_new_tokens,
            one_line=asker.form == "completion",
            batch_tokens=config.batch_tokens,
            rope_parameters=config.rope_parameters,
        )
        for row, text in said:
            index, about, _ = made[row]
            log.add(record(cell, index, questions[index], about, text, config.save_prompts))
    return unmade


def record(
    cell: QuestionsCell, index: int, question: Question, about: dict[str, Any], text: str, whole: bool
) -> dict[str, Any]:
    """One line of the samples' file."""
    document = about["document"]
    return {
        "length": cell.length,
        "depth": cell.depth,
        "index": index,
        "article": question.article,
        "question": question.text,
        "answers": list(question.answers),
        "answer": text,
        "exact": exact(text, question.answers),
        "f1": f1(text, question.answers),
        "contains": any(within(answer, text) for answer in question.answers),
        "extractive": None if document is None else within(text, document),
        "words": None if document is None else covered(text, document),
        "chance": about["chance"],
        "at": about["at"],
        "prompt": about["prompt"] if whole else None,
    }


def blind(document: str, answers: Sequence[str]) -> float:
    """How often as many neighbouring words as the first answer has, drawn blindly from the text, are that answer."""
    size = len(normalised(answers[0]).split())
    return 1 / max(1, len(normalised(document).split()) - size + 1)


def _of(row: dict[str, Any], cell: QuestionsCell) -> bool:
    return bool(row["length"] == cell.length and row["depth"] == cell.depth)


def values(cell: QuestionsCell, records: Sequence[dict[str, Any]]) -> DocumentCell:
    """One number of everything for each question, under its index."""
    rows = sorted((row for row in records if _of(row, cell)), key=lambda row: int(row["index"]))
    text = cell.length != CLOSED
    return DocumentCell(
        length=cell.length,
        depth=cell.depth,
        n=len(rows),
        index=[row["index"] for row in rows],
        exact=[float(row["exact"]) for row in rows],
        f1=[float(row["f1"]) for row in rows],
        contains=[float(row["contains"]) for row in rows],
        extractive=[float(row["extractive"]) for row in rows] if text else None,
        words=[float(row["words"]) for row in rows] if text else None,
        chance=sum(row["chance"] for row in rows) / max(1, len(rows)),
        at=sum(row["at"] for row in rows) / max(1, len(rows)) if text else None,
    )


def shown(records: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """A few right and wrong answers, of different questions."""
    kept: list[dict[str, Any]] = []
    for wanted in (True, False):
        rows = [row for row in records if row["exact"] == wanted and row["length"] != CLOSED]
        rows.sort(key=lambda row: (row["length"], row["depth"], row["index"]))
        seen: set[int] = set()
        for row in rows:
            if len(seen) < SHOWN and row["index"] not in seen:
                seen.add(row["index"])
                kept.append({key: row[key] for key in row if key != "prompt"})
    return kept

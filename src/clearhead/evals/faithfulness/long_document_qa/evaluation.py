"""Question answering over long documents: SQuAD articles, paragraphs together, judged by SQuAD's own rules.

The paragraph that holds the answer stands at 0, 25, 50, 75 or 100 % of a text of the article's other paragraphs, of an
exact number of tokens (`long_document_qa.prompts`). Greedy answers; exact match and F1 as in SQuAD
v1.1 (`asking.squad_rules`), and whether the answer contains a right one. Two controls need no judge:
whether what the model says occurs in the text at all (*extractive*: a model that invents says other things), and the
same questions without the text (*closed book*: what it knows anyway).

Every length and depth asks the same questions. A length that no article fills is left out with the reason.
"""

from __future__ import annotations

from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from pydantic import Field, field_validator

from clearhead.analysis.sections import Section
from clearhead.data.cache import digest_json
from clearhead.evals.asking.answering import FormName, Ids, fast_tokenizer, form_of, greedy_answers
from clearhead.evals.asking.sample_log import Key, Row
from clearhead.evals.asking.squad_rules import covered, exact, f1, normalised, within
from clearhead.evals.cells import Asked, Cell, LeftOut, Measured, SampleEvaluation
from clearhead.evals.evaluation import EvaluationConfig
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
from clearhead.evals.reasons import Unmeasured, reason_of
from clearhead.evals.subject import Subject
from clearhead.runs.results import RunResults

SHOWN = 2
CLOSED = 0
"""The length under which the questions without a text are kept."""


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


@dataclass(frozen=True, kw_only=True)
class QuestionsCell(Cell):
    """The questions with a text of `tokens` tokens, CLOSED for none, in which the answer stands at `depth`."""

    tokens: int
    depth: float
    questions: Sequence[Question]
    asker: Asker
    lengths: Sequence[int]


class LongDocumentQa(SampleEvaluation[LongDocumentQaConfig, LongDocumentQaResult, QuestionsCell]):
    name = "long_document_qa"
    Config = LongDocumentQaConfig
    Result = LongDocumentQaResult
    keys = ("length", "depth", "index")
    # So many prompts are held before the next are made.
    at_once = 64

    def cells(self, subject: Subject, config: LongDocumentQaConfig) -> Iterator[QuestionsCell | LeftOut]:
        """Raises RecordError for a file that cannot be used: that is no property of the model."""
        articles = read_articles(config.data, unique=config.unique)
        asker = self._asker(subject, config, articles)
        lengths = []
        # All cells ask the same questions, those that fit every length, so a length is given up before they are drawn.
        for length in config.all_lengths(subject.training_length):
            if reason := subject.too_long(length + config.max_new_tokens):
                yield LeftOut(f"{length} tokens", reason)
            else:
                lengths.append(length)
        lengths, fit, reasons = fitting(asker, articles, lengths)
        yield from (LeftOut(name, reason) for name, reason in reasons.items())
        questions = draw(fit, config.samples, config.seed)
        places = [(length, depth) for length in lengths for depth in dict.fromkeys(config.depths)]
        if config.closed_book and places:
            places.insert(0, (CLOSED, 0.0))
        for length, depth in places:
            yield QuestionsCell(
                name=f"{length} tokens, depth {depth:.0%}",
                tokens=length,
                depth=depth,
                questions=questions,
                asker=asker,
                lengths=lengths,
            )

    def about(
        self, subject: Subject, config: LongDocumentQaConfig, cells: Sequence[QuestionsCell]
    ) -> dict[str, Any]:
        asker = cells[0].asker
        return {
            "config": config.model_dump(mode="json", exclude={"data", "batch_tokens"}),
            "form": asker.form,
            "data": digest_json([[a.title, *a.paragraphs] for a in asker.articles]),
            "lengths": list(cells[0].lengths),
        }

    def samples(self, config: LongDocumentQaConfig, cell: QuestionsCell) -> list[Key]:
        return [(cell.tokens, cell.depth, index) for index in range(len(cell.questions))]

    def ask(
        self, subject: Subject, config: LongDocumentQaConfig, asked: Asked[QuestionsCell]
    ) -> Generator[Row, None, None]:
        """Leaves a question out of which no prompt can be made."""
        (cell,) = asked.cells
        made = [one for _, _, index in asked.keys(cell) if (one := prompted(cell, index)) is not None]
        said = greedy_answers(
            subject,
            [one.ids for one in made],
            config.max_new_tokens,
            one_line=cell.asker.form == "completion",
            batch_tokens=config.batch_tokens,
            rope_parameters=config.rope_parameters,
        )
        for place, text in said:
            yield record(cell, made[place], text, config.save_prompts)

    def gather(
        self,
        subject: Subject,
        config: LongDocumentQaConfig,
        measured: Measured[QuestionsCell, list[Row]],
    ) -> LongDocumentQaResult:
        chosen, asker = measured.pairs[0][0].questions, measured.pairs[0][0].asker
        # What cannot be asked everywhere is counted nowhere.
        unmade = {
            i for rows in measured.values for i in {*range(len(chosen))} - {row["index"] for row in rows}
        }
        skipped = dict(measured.skipped)
        if unmade:
            skipped[f"{len(unmade)} questions"] = (
                "no prompt of exactly these tokens could be made of their articles"
            )
        records = [row for row in measured.rows if row["index"] not in unmade]
        cells = [
            (cell, kept)
            for cell, rows in measured.pairs
            if (kept := [row for row in rows if row["index"] not in unmade])
        ]
        if not any(cell.tokens for cell, _ in cells):
            raise Unmeasured(self.why(skipped))
        return LongDocumentQaResult(
            cells=[values(cell, rows) for cell, rows in cells],
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


@dataclass(frozen=True)
class MadePrompt:
    """A question's prompt, and what its row says of it. document: None for the question alone."""

    index: int
    ids: Ids
    document: str | None = None
    at: float | None = None
    text: str | None = None


def prompted(cell: QuestionsCell, index: int) -> MadePrompt | None:
    """The prompt of a question; None where none of exactly the cell's tokens can be made."""
    question = cell.questions[index]
    if cell.tokens == CLOSED:
        return MadePrompt(index, cell.asker.closed(question.text))
    try:
        prompt = cell.asker.prompt(question, cell.tokens, cell.depth)
    except ValueError:
        return None
    return MadePrompt(index, prompt.ids, prompt.document, prompt.before / prompt.around, prompt.text)


def record(cell: QuestionsCell, prompt: MadePrompt, text: str, whole: bool) -> Row:
    """One line of the samples' file."""
    question, document = cell.questions[prompt.index], prompt.document
    return {
        "length": cell.tokens,
        "depth": cell.depth,
        "index": prompt.index,
        "article": question.article,
        "question": question.text,
        "answers": list(question.answers),
        "answer": text,
        "exact": exact(text, question.answers),
        "f1": f1(text, question.answers),
        "contains": any(within(answer, text) for answer in question.answers),
        "extractive": None if document is None else within(text, document),
        "words": None if document is None else covered(text, document),
        "chance": 0.0 if document is None else blind(document, question.answers),
        "at": prompt.at,
        "prompt": prompt.text if whole else None,
    }


def blind(document: str, answers: Sequence[str]) -> float:
    """How often as many neighbouring words as the first answer has, drawn blindly from the text, are that answer."""
    size = len(normalised(answers[0]).split())
    return 1 / max(1, len(normalised(document).split()) - size + 1)


def values(cell: QuestionsCell, rows: Sequence[Row]) -> DocumentCell:
    """One number of everything for each question, under its index."""
    text = cell.tokens != CLOSED
    return DocumentCell(
        length=cell.tokens,
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


def shown(records: Sequence[Row]) -> list[Row]:
    """A few right and wrong answers, of different questions."""
    kept: list[Row] = []
    for wanted in (True, False):
        rows = [row for row in records if row["exact"] == wanted and row["length"] != CLOSED]
        rows.sort(key=lambda row: (row["length"], row["depth"], row["index"]))
        seen: set[int] = set()
        for row in rows:
            if len(seen) < SHOWN and row["index"] not in seen:
                seen.add(row["index"])
                kept.append({key: row[key] for key in row if key != "prompt"})
    return kept

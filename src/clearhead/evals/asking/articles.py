"""Articles with questions in SQuAD's form, each with the paragraph that it was written for."""

from __future__ import annotations

from dataclasses import dataclass

from clearhead.evals.asking.records import RecordError, objects_of, read_records, text_of, value_of
from clearhead.evals.asking.squad_rules import normalised


@dataclass(frozen=True)
class Question:
    """A question, its right answers, and the article and paragraph that it was written for."""

    article: int
    paragraph: int
    text: str
    answers: tuple[str, ...]


@dataclass(frozen=True)
class Article:
    title: str
    paragraphs: tuple[str, ...]
    questions: tuple[Question, ...]


def read_articles(source: str, *, unique: bool) -> list[Article]:
    """The articles of a file: SQuAD's own .json, or JSON lines with an article each.

    Fields: `title`, `paragraphs` with `context` and `qas`, those with `question` and `answers`, texts or
    objects with `text`. unique: leave out questions one of whose answers stands in another paragraph too.
    Raises RecordError (or CorpusError) for a file that cannot be used.
    """
    found = []
    for number, (where, record) in enumerate(read_records(source)):
        title = str(record.get("title") or f"article {number}")
        parts = objects_of(record, "paragraphs", where)
        paragraphs = tuple(text_of(part, "context", f"a paragraph in {where}").strip() for part in parts)
        words = [f" {normalised(text)} " for text in paragraphs]
        questions = []
        for place, part in enumerate(parts):
            for qa in objects_of(part, "qas", f"a paragraph in {where}"):
                text = text_of(qa, "question", f"a question in {where}").strip()
                given = value_of(qa, "answers", f"a question in {where}")
                if not isinstance(given, list):
                    raise RecordError(f"field 'answers' of a question in {where} is not a list")
                answers = tuple(dict.fromkeys(_answer(one, where).strip() for one in given))
                right = [normalised(answer) for answer in answers]
                # Nothing is left of an answer like "the": no rule could tell it.
                if not right or not all(right):
                    continue
                elsewhere = any(
                    f" {answer} " in text for answer in right for i, text in enumerate(words) if i != place
                )
                if not (unique and elsewhere):
                    questions.append(Question(number, place, text, answers))
        found.append(Article(title, paragraphs, tuple(questions)))
    if not any(article.questions for article in found):
        raise RecordError(
            f"'{source}' holds no question with an answer"
            + (" that stands in one paragraph alone: set unique = false" if unique else "")
        )
    return found


def _answer(one: object, where: str) -> str:
    text = one.get("text") if isinstance(one, dict) else one
    if not isinstance(text, str):
        raise RecordError(
            f"an answer in {where} is {type(text).__name__}, not a text or an object with 'text'"
        )
    return text

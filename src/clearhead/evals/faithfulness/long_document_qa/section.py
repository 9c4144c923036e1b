"""The report's section on questions about long documents."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Literal

import numpy as np
from pydantic import Field

from clearhead.analysis.by_length import Values, first_values, heat_panels, left_out, length_chart
from clearhead.analysis.comparison import Comparison, compare
from clearhead.analysis.paired import shortened
from clearhead.analysis.sections import Chart, HeatMap, Section, SectionTable
from clearhead.analysis.statistics import Estimate, ratio, wilson
from clearhead.evals.evaluation import EvaluationResult
from clearhead.runs.results import RunResults

Cell = tuple[int, float]
"""(length, depth); length 0: the question alone."""
Measure = Literal["f1", "exact", "contains", "extractive", "words"]


class DocumentCell(EvaluationResult):
    """One number a question, under its `index`. extractive, words, at: None without a text."""

    length: int
    depth: float
    n: int
    index: list[int]
    exact: list[float]
    f1: list[float]
    contains: list[float]
    extractive: list[float] | None
    words: list[float] | None
    chance: float
    at: float | None

    def scores(self, measure: Measure) -> list[float]:
        found = {
            "f1": self.f1,
            "exact": self.exact,
            "contains": self.contains,
            "extractive": self.extractive,
            "words": self.words,
        }
        return found[measure] or []


class DocumentAnswer(EvaluationResult):
    """One answer, word for word."""

    length: int
    depth: float
    index: int
    article: int
    question: str
    answers: list[str]
    answer: str
    exact: bool
    f1: float
    contains: bool
    extractive: bool | None
    words: float | None
    chance: float
    at: float | None


class LongDocumentQaResult(EvaluationResult):
    """articles: the article of each question, by its index."""

    cells: list[DocumentCell]
    articles: dict[str, int]
    skipped_cells: dict[str, str] = Field(default={})
    examples: list[DocumentAnswer]
    form: str
    bos: str | None
    unique: bool
    training_length: int | None
    rope_parameters: dict[str, Any] | None
    n: int


MEASURES: dict[Measure, str] = {
    "f1": "F1",
    "exact": "exact match",
    "contains": "contains a right answer",
    "extractive": "extractive: what is said stands in the text",
    "words": "words: of what is said, those that the text has",
}


SPOKEN: tuple[Measure, ...] = ("f1", "exact", "contains")
"""What is measured without a text too."""


def long_document_section(
    name: str, title: str, question: str, run: RunResults, values: Values[LongDocumentQaResult]
) -> Section:
    """F1 over all lengths and depths that every arm has decides."""
    first = first_values(values)
    every = [value for seeds in values.values() for value in seeds.values()]
    asked = {cell: (_index(first, cell), first.articles) for cell in cells(first)}
    shared = [cell for cell in asked if all((_index(v, cell), v.articles) == asked[cell] for v in every)]
    result, answer = None, "No cell was measured for all arms."
    if shared:
        result = compared(values, shared, "f1")
        span = sorted({length for length, _ in shared})
        where = f"{span[0]:,} tokens" if len(span) == 1 else f"{span[0]:,} to {span[-1]:,} tokens"
        answer = f"F1 of greedy answers, {where}: {result.sentence()}"
    unique = (
        " Only questions are asked whose answers stand in one paragraph of the article alone."
        if first.unique
        else " Answers may stand elsewhere in the article too."
    )
    scaling = "" if first.rope_parameters is None else f" Rotary scaling: {first.rope_parameters}."
    return Section(
        name,
        title,
        question,
        answer,
        measure="" if result is None else "F1 over long documents ↑",
        headlines=[] if result is None else result.headlines(),
        charts=_charts(run, values),
        tables=[_table(values), _by_length(values), _examples(values)],
        notes=[
            f"Form: {first.form}. Exact match and F1 by SQuAD v1.1's rules; extractive: what the model says, "
            "written alike, stands in the text word for word (a model that invents says other things); closed book: "
            "the same questions without the text. Blind: as many neighbouring words as the right answer has, drawn "
            f"from the text.{unique}{scaling}",
            "The paragraph with the answer stands at the depth, among the article's other paragraphs; every length, "
            "depth and arm asks the same questions. Intervals: bootstrap over articles (a Wilson interval over answers "
            "where that is wider), or Student's t over seeds; differences are paired by article. All answers: "
            "long_document_qa.jsonl beside the results.",
            *left_out(values),
            *run.skipped(name),
        ],
    )


def cells(value: LongDocumentQaResult) -> list[Cell]:
    """All that have a text."""
    return [(cell.length, cell.depth) for cell in value.cells if cell.length]


def _cell(value: LongDocumentQaResult, key: Cell) -> DocumentCell | None:
    return next((c for c in value.cells if (c.length, c.depth) == key), None)


def _index(value: LongDocumentQaResult, key: Cell) -> list[int] | None:
    cell = _cell(value, key)
    return None if cell is None else cell.index


def by_article(value: LongDocumentQaResult, keys: Sequence[Cell], measure: Measure) -> dict[int, list[float]]:
    """Article -> what its questions scored over these cells."""
    found: dict[int, list[float]] = {}
    for key in keys:
        cell = _cell(value, key)
        if cell is None:
            continue
        for index, score in zip(cell.index, cell.scores(measure), strict=True):
            found.setdefault(value.articles[str(index)], []).append(score)
    return found


def compared(values: Values[LongDocumentQaResult], keys: Sequence[Cell], measure: Measure) -> Comparison:
    """Arms article by article: the ratio of all scores to all questions."""
    sums: dict[str, dict[int, list[float]]] = {}
    counts: list[int] = []
    for arm, seeds in values.items():
        for seed, value in seeds.items():
            found = by_article(value, keys, measure)
            sums.setdefault(arm, {})[seed] = [sum(found[article]) for article in sorted(found)]
            counts = [len(found[article]) for article in sorted(found)]
    return compare(sums, "higher", denominators=np.array(counts, np.float64), shares=True)


def estimate(
    values: Values[LongDocumentQaResult], arm: str, keys: Sequence[Cell], measure: Measure
) -> Estimate | None:
    """One arm's share over the cells that all of its seeds have; over articles, or answers where that is wider."""
    rows = [by_article(value, _having(value, keys), measure) for value in values[arm].values()]
    if any(not row for row in rows) or len({tuple(sorted(row)) for row in rows}) > 1:
        return None
    articles = sorted(rows[0])
    counts = np.array([len(rows[0][article]) for article in articles], np.float64)
    found = ratio([[sum(row[article]) for article in articles] for row in rows], counts)
    n = int(counts.sum())
    low, high = min(found.low, found.value), max(found.high, found.value)
    if measure not in ("f1", "words"):
        # A few articles that all agree would have no interval at all.
        bound = wilson(round(found.value * n), n)
        low, high = min(low, bound[0]), max(high, bound[1])
    return replace(found, low=max(0.0, low), high=min(1.0, high), n=n)


def _having(value: LongDocumentQaResult, keys: Sequence[Cell]) -> list[Cell]:
    return [key for key in keys if _index(value, key)]


def _said(found: Estimate | None) -> str | None:
    return None if found is None else f"{found.value:.2f} ({found.interval()}, n={found.n})"


def _all_cells(values: Values[LongDocumentQaResult]) -> list[Cell]:
    return list(dict.fromkeys(c for s in values.values() for v in s.values() for c in cells(v)))


def _table(values: Values[LongDocumentQaResult]) -> SectionTable:
    every = _all_cells(values)
    rows: list[list[str | None]] = [
        [label, *(_said(estimate(values, arm, every, measure)) for arm in values)]
        for measure, label in MEASURES.items()
    ]
    for measure in SPOKEN:
        closed = [_said(estimate(values, arm, [(0, 0.0)], measure)) for arm in values]
        if any(closed):
            rows.append([f"closed book, {MEASURES[measure]}", *closed])
    chance = [cell.chance for cell in first_values(values).cells if cell.length]
    rows.append(["blind, exact match", *([f"{float(np.mean(chance)):.4f}"] * len(values))])
    return SectionTable("All lengths and depths", ["", *values], rows)


def _by_length(values: Values[LongDocumentQaResult]) -> SectionTable:
    every = _all_cells(values)
    rows: list[list[str | None]] = []
    for length in sorted({length for length, _ in every}):
        keys = [key for key in every if key[0] == length]
        row: list[str | None] = [f"{length:,} tokens"]
        for arm in values:
            parts = [(measure, estimate(values, arm, keys, measure)) for measure in MEASURES]
            known = [f"{MEASURES[m].partition(':')[0]} {e.value:.2f} ({e.interval()})" for m, e in parts if e]
            row.append("; ".join(known) or None)
        rows.append(row)
    return SectionTable("By length, all depths", ["length", *values], rows)


def _charts(run: RunResults, values: Values[LongDocumentQaResult]) -> list[Chart]:
    every = _all_cells(values)
    lengths, depths = sorted({length for length, _ in every}), sorted({depth for _, depth in every})

    def mean(arm: str, length: int, depth: float) -> float | None:
        found = estimate(values, arm, [(length, depth)], "f1") if arm in values else None
        return None if found is None else found.value

    panels = heat_panels([arm.name for arm in run.arms], lengths, depths, mean)
    charts: list[Chart] = [
        HeatMap(
            "long-document-heat", "F1 by length and depth", "length (tokens)", "depth", panels,
            "Depth: how much of the other text stands before the paragraph with the answer.",
        )
    ]  # fmt: skip
    if len(lengths) > 1:
        charts.append(
            length_chart(
                "long-document-length", "F1 by length, all depths", "F1", list(values), lengths,
                lambda arm, length: estimate(values, arm, [key for key in every if key[0] == length], "f1"),
                trained=first_values(values).training_length, y_range=(0.0, 1.0),
            )
        )  # fmt: skip
    return charts


def _examples(values: Values[LongDocumentQaResult]) -> SectionTable:
    rows: list[list[str | None]] = []
    for arm, seeds in values.items():
        for row in next(iter(seeds.values())).examples:
            mark = "right" if row.exact else "wrong"
            where = f"{row.length:,} tokens, depth {row.depth:.0%}"
            text = f"{shortened(row.answer)}" + ("" if row.extractive else " [not in the text]")
            rows.append([f"{arm}, {mark}", where, row.question, "; ".join(row.answers), text])
    return SectionTable("Answers, word for word", ["arm", "cell", "question", "right", "answer"], rows)

"""The report's section on knowledge conflicts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal

from pydantic import Field

from clearhead.analysis.by_length import Values, first_values
from clearhead.analysis.comparison import compare
from clearhead.analysis.paired import few, paired_samples, shared_items, shortened
from clearhead.analysis.sections import BarChart, BarSeries, Reference, Section, SectionTable
from clearhead.analysis.statistics import Estimate, proportion
from clearhead.evals.evaluation import EvaluationResult
from clearhead.runs.results import RunResults

Measure = Literal["mean", "total", "mean_without", "total_without"]


class ConflictItem(EvaluationResult):
    """One question: whether the context's answer is preferred, by both measures, with the context and without it.

    None where there is no telling the question from its context.
    """

    index: int
    mean: bool | None
    total: bool | None
    mean_without: bool | None
    total_without: bool | None
    said: str

    def preferred(self, measure: Measure) -> bool | None:
        return {
            "mean": self.mean,
            "total": self.total,
            "mean_without": self.mean_without,
            "total_without": self.total_without,
        }[measure]


class ConflictExample(EvaluationResult):
    """answers: the context's first."""

    index: int
    answers: list[str]
    with_context: list[list[float]] | None = Field(default=None, alias="with")
    without_context: list[list[float]] | None = Field(default=None, alias="without")
    answer: str
    said: str


class ConflictsResult(EvaluationResult):
    items: list[ConflictItem]
    chance: float
    skipped_items: dict[str, str]
    examples: list[ConflictExample]
    form: str
    bos: str | None
    n: int


MEASURES: dict[Measure, str] = {
    "mean": "context's answer preferred, mean log-likelihood per token",
    "total": "context's answer preferred, total log-likelihood",
    "mean_without": "the same without the context, mean",
    "total_without": "the same without the context, total",
}


def items(value: ConflictsResult) -> dict[int, ConflictItem]:
    return {item.index: item for item in value.items}


def conflicts_section(
    name: str, title: str, question: str, run: RunResults, values: Values[ConflictsResult]
) -> Section:
    """The preference by the mean per token decides."""
    shared = shared_items(values, items)
    result, answer = None, "No question was asked of all arms."
    if shared:
        result = compare(
            paired_samples(values, items, shared, lambda item: float(bool(item.mean))),
            "higher",
            proportions=True,
        )
        answer = f"The context's answer is preferred (mean log-likelihood per token): {result.sentence()}"
    first = first_values(values)
    return Section(
        name,
        title,
        question,
        answer,
        measure="" if result is None else "answers from the context ↑",
        headlines=[] if result is None else result.headlines(),
        charts=[_bars(values, first.chance)],
        tables=[_table(values, first.chance), _examples(values)],
        notes=[
            "Preferred: a higher log-likelihood than every remembered answer, after the question, its context and "
            f"'Answer:'. Chance: {first.chance:.2f} (one of the answers drawn blindly); what is reached without the "
            "context says what the model brings along. Known: questions whose remembered answer it prefers without the "
            "context. Said: which answer a greedy one names, by SQuAD's normalisation; memorisation ratio: remembered "
            f"/ (remembered + context's). Form of the greedy answers: {first.form}.",
            "Every arm is asked the same questions; differences are paired by question. Intervals: Wilson over "
            "questions or Student's t over seeds, the wider. All answers: knowledge_conflicts.jsonl beside the "
            "results.",
            *few([f"{item}: {why}." for item, why in first.skipped_items.items()]),
            *run.skipped(name),
        ],
    )


def share(marks: Sequence[Sequence[bool]]) -> Estimate | None:
    """Of the marked answers of each seed, with its interval; None where a seed has none."""
    counts = [(sum(row), len(row)) for row in marks]
    return proportion(counts) if counts and all(n for _, n in counts) else None


def preference(
    seeds: Mapping[int, ConflictsResult], measure: Measure, known: bool = False
) -> Estimate | None:
    """known: of the questions alone whose remembered answer the model prefers without the context."""
    marks = [
        [
            preferred
            for item in value.items
            if (preferred := item.preferred(measure)) is not None
            and (not known or item.mean_without is False)
        ]
        for value in seeds.values()
    ]
    return share(marks)


def spoken(seeds: Mapping[int, ConflictsResult], kind: str, among: Sequence[str] = ()) -> Estimate | None:
    marks = [
        [item.said == kind for item in value.items if not among or item.said in among]
        for value in seeds.values()
    ]
    return share(marks)


def cell(estimate: Estimate | None) -> str | None:
    return None if estimate is None else f"{estimate.value:.2f} ({estimate.interval()}, n={estimate.n})"


def _table(values: Values[ConflictsResult], chance: float) -> SectionTable:
    rows: list[list[str | None]] = [
        [label, *(cell(preference(seeds, measure)) for seeds in values.values()), f"{chance:.2f}"]
        for measure, label in MEASURES.items()
    ]
    rows.append(
        ["preferred, of the known, mean", *(cell(preference(s, "mean", True)) for s in values.values()), None]
    )
    for kind in ("context", "remembered", "both", "neither"):
        rows.append([f"said: {kind}", *(cell(spoken(seeds, kind)) for seeds in values.values()), None])
    ratio = [cell(spoken(seeds, "remembered", ("remembered", "context"))) for seeds in values.values()]
    rows.append(["memorisation ratio ↓", *ratio, None])
    return SectionTable("Context against memory", ["", *values, "chance"], rows)


def _bars(values: Values[ConflictsResult], chance: float) -> BarChart:
    groups = ["with the context", "without it", "with it, of the known"]
    series = []
    for arm, seeds in values.items():
        points = [
            preference(seeds, "mean"), preference(seeds, "mean_without"), preference(seeds, "mean", True)
        ]  # fmt: skip
        y, low, high = (
            [None if point is None else getattr(point, part) for point in points]
            for part in ("value", "low", "high")
        )
        series.append(BarSeries(arm, y, low, high, arm))
    return BarChart(
        "knowledge-conflicts", "The context's answer is preferred", "share of questions", groups, series,
        "Mean log-likelihood per token.", y_range=(0.0, 1.0), references=[Reference("chance", chance)],
    )  # fmt: skip


def _examples(values: Values[ConflictsResult]) -> SectionTable:
    rows: list[list[str | None]] = []
    for arm, seeds in values.items():
        for row in next(iter(seeds.values())).examples:
            context, *remembered = row.answers
            mark = "right" if row.said == "context" else "wrong"
            rows.append([f"{arm}, {mark}", context, "; ".join(remembered), shortened(row.answer)])
    return SectionTable(
        "Greedy answers, word for word", ["arm", "context says", "remembered", "answer"], rows
    )

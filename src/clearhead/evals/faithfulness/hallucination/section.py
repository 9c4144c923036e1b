"""The report's section on hallucination: the share of answers that a judge found free of it, set by set."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from clearhead.analysis.by_length import Values, first_values
from clearhead.analysis.comparison import compare
from clearhead.analysis.paired import few, paired_samples, shared_items, shortened
from clearhead.analysis.sections import BarChart, BarSeries, Section, SectionTable
from clearhead.analysis.statistics import Estimate, proportion
from clearhead.evals.evaluation import EvaluationResult
from clearhead.runs.results import RunResults

PUBLISHED = SectionTable(
    "The Differential Transformer paper: free of hallucination, models of 3B parameters, judged by GPT-4o",
    ["model", "XSum", "CNN/DM", "MultiNews", "Qasper", "HotpotQA", "2WikiMQA"],
    [
        ["Transformer", ".44", ".32", ".42", ".28", ".36", ".29"],
        ["DIFF", ".53", ".41", ".61", ".39", ".46", ".36"],
    ],
    "100 samples a set, so an interval of about ±.10 each. Judges differ: a share by another judge, or by another "
    "prompt, does not stand beside these; only the direction does.",
)


class JudgedSet(EvaluationResult):
    """free: whether each answer is free of hallucination, None where the judge did not decide. tokens: of a prompt."""

    name: str
    task: str
    n: int
    index: list[int]
    free: list[bool | None]
    empty: int
    tokens: float


class JudgedAnswer(EvaluationResult):
    set: str
    index: int
    free: bool | None
    why: str
    tokens: int
    answer: str


class HallucinationResult(EvaluationResult):
    sets: list[JudgedSet]
    judge: str
    usage: Any
    spent: str
    skipped_items: dict[str, str]
    examples: list[JudgedAnswer]
    form: str
    n: int


MARKS = {True: "free", False: "hallucinates", None: "undecided"}


def verdicts(value: HallucinationResult) -> dict[tuple[str, int], bool | None]:
    """(set, record) -> free of hallucination, None where the judge did not decide."""
    return {
        (part.name, index): free
        for part in value.sets
        for index, free in zip(part.index, part.free, strict=True)
    }


def hallucination_section(
    name: str, title: str, question: str, run: RunResults, values: Values[HallucinationResult]
) -> Section:
    """The share over all sets decides, on the answers that were decided for every arm."""
    shared = shared_items(values, verdicts, lambda free: free is not None)
    result, answer = None, "No answer was decided for all arms."
    if shared:
        samples = paired_samples(values, verdicts, shared, lambda free: float(bool(free)))
        result = compare(samples, "higher", proportions=True)
        answer = f"Free of hallucination: {result.sentence()}"
    first = first_values(values)
    judges = sorted({value.judge for seeds in values.values() for value in seeds.values()})
    spent = dict.fromkeys(value.spent for seeds in values.values() for value in seeds.values())
    left_out = {
        item: why for s in values.values() for v in s.values() for item, why in v.skipped_items.items()
    }
    return Section(
        name,
        title,
        question,
        answer,
        measure="" if result is None else "free of hallucination ↑",
        headlines=[] if result is None else result.headlines(),
        charts=[_bars(values)],
        tables=[_table(values), _examples(values), PUBLISHED],
        notes=[
            f"Judge: {'; '.join(judges)}. Form: {first.form}. Greedy answers. Undecided: the judge came to no "
            "conclusion, or the answer is empty; such answers are neither right nor wrong, and the table gives the "
            "share if all of them were one or the other. There is no chance level: a judge that tosses a coin gives "
            "0.50, and a model that repeats a sentence of its document is always free.",
            "Every arm is asked the same; differences are paired by document, on answers that were decided for every "
            "arm. Intervals: Wilson over documents or Student's t over seeds, the wider; they say nothing about the "
            "judge's own errors. All answers and the judge's words: hallucination_answers.jsonl and "
            "hallucination_verdicts.jsonl beside the results.",
            *(f"Judging took {text}" for text in spent if text),
            *few([f"{item}: {why}." for item, why in left_out.items()]),
            *run.skipped(name),
        ],
    )


def _parts(seeds: Mapping[int, HallucinationResult], name: str | None) -> list[list[bool | None]]:
    """The verdicts of each seed on one set, or on all."""
    return [
        [free for (of, _), free in verdicts(value).items() if name in (None, of)] for value in seeds.values()
    ]


def share(seeds: Mapping[int, HallucinationResult], name: str | None) -> Estimate | None:
    """Of the decided answers, those that are free of hallucination."""
    counts = [
        (sum(free is True for free in part), sum(free is not None for free in part))
        for part in _parts(seeds, name)
    ]
    return proportion(counts) if counts and all(n for _, n in counts) else None


def _names(values: Values[HallucinationResult]) -> list[str]:
    return list(dict.fromkeys(part.name for s in values.values() for v in s.values() for part in v.sets))


def _cell(seeds: Mapping[int, HallucinationResult], name: str | None) -> str | None:
    every = [free for part in _parts(seeds, name) for free in part]
    if not every:
        return None
    found = share(seeds, name)
    said = "none decided" if found is None else f"{found.value:.2f} ({found.interval()}, n={found.n})"
    undecided = sum(free is None for free in every)
    if undecided:
        free = sum(free is True for free in every)
        low, high = free / len(every), (free + undecided) / len(every)
        said += f"; {undecided} of {len(every)} undecided: {low:.2f} to {high:.2f}"
    return said


def _table(values: Values[HallucinationResult]) -> SectionTable:
    names: Sequence[str | None] = [*_names(values), *([None] if len(_names(values)) > 1 else [])]
    rows: list[list[str | None]] = [
        [name or "all sets", *(_cell(seeds, name) for seeds in values.values())] for name in names
    ]
    return SectionTable("Free of hallucination", ["set", *values], rows)


def _bars(values: Values[HallucinationResult]) -> BarChart:
    names = _names(values)
    series = []
    for arm, seeds in values.items():
        points = [share(seeds, name) for name in names]
        y, low, high = (
            [None if point is None else getattr(point, part) for point in points]
            for part in ("value", "low", "high")
        )
        series.append(BarSeries(arm, y, low, high, arm))
    return BarChart(
        "hallucination", "Free of hallucination", "share of decided answers", names, series,
        "Judges differ: compare arms, not reports.", y_range=(0.0, 1.0),
    )  # fmt: skip


def _examples(values: Values[HallucinationResult]) -> SectionTable:
    rows: list[list[str | None]] = []
    for arm, seeds in values.items():
        for row in next(iter(seeds.values())).examples:
            where = f"{row.set}, record {row.index}"
            rows.append([f"{arm}, {MARKS[row.free]}", where, shortened(row.answer), shortened(row.why)])
    return SectionTable("Answers and the judge's words", ["arm", "document", "answer", "judge"], rows)

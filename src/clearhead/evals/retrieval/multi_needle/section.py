"""The report's section on multi-needle retrieval."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from pydantic import Field

from clearhead.analysis.by_length import Values, first_values, heat_panels, left_out, length_chart
from clearhead.analysis.comparison import compare
from clearhead.analysis.sections import BarChart, BarSeries, Chart, HeatMap, Reference, Section, SectionTable
from clearhead.analysis.statistics import Estimate, bootstrap_mean, proportion
from clearhead.evals.evaluation import EvaluationResult
from clearhead.runs.results import RunResults

Place = tuple[int, int, int]
"""(needles, asked, length)."""


class MultiNeedleCell(EvaluationResult):
    """found: of each sample, how many asked numbers are right. any_needle: the level of naming others' numbers."""

    needles: int
    asked: int
    length: int
    depth: float
    n: int
    found: list[int]
    any_needle: float


class FoundNeedles(EvaluationResult):
    """One answer, word for word."""

    needles: int
    asked: int
    length: int
    depth: float
    index: int
    haystack: int
    cities: list[str]
    numbers: list[str]
    answer: str
    found: list[bool]


class MultiNeedleResult(EvaluationResult):
    """pairs, grid: (needles, asked, length) that were to be measured."""

    cells: list[MultiNeedleCell]
    pairs: list[Place]
    grid: list[Place]
    skipped_cells: dict[str, str] = Field(default={})
    examples: list[FoundNeedles]
    form: str
    bos: str | None
    haystacks: int
    training_length: int | None
    rope_parameters: dict[str, Any] | None
    n: int


PUBLISHED = SectionTable(
    "The Differential Transformer paper, 4,096 tokens, models of 3B parameters trained on 350B tokens",
    ["(needles, asked)", "(1, 1)", "(2, 2)", "(4, 2)", "(6, 2)"],
    [["Transformer", "1.00", ".85", ".62", ".55"], ["DIFF", "1.00", ".92", ".84", ".85"]],
    "50 samples per depth. Another scale, text and tokenizer: for the direction only. Its prompt is not published. "
    "With 8 needles, 1 asked, at 64K tokens and depth 25 % DIFF is 76 points above the Transformer.",
)
LONGEST = 300
"""Characters of an answer that the report shows."""


def multi_needle_section(
    name: str, title: str, question: str, run: RunResults, values: Values[MultiNeedleResult]
) -> Section:
    """All pairs at their one length decide, or the grid where there are none."""
    first = first_values(values)
    places = list(dict.fromkeys(_place(cell) for cell in first.cells))
    pairs = [kind for kind in first.pairs if kind in places]
    grid = [kind for kind in first.grid if kind in places]
    decide = pairs or grid
    cells = _shared(values, decide)
    result = None
    answer = "No cell was measured for all arms."
    if cells:
        samples = {
            arm: {seed: [hit for key in cells for hit in _exact(v, key)] for seed, v in seeds.items()}
            for arm, seeds in values.items()
        }
        result = compare(samples, "higher", proportions=True)
        span = sorted({length for _, _, length, _ in cells})
        where = f"{span[0]:,} tokens" if len(span) == 1 else f"{span[0]:,} to {span[-1]:,} tokens"
        kinds = ", ".join(f"{asked} of {needles}" for needles, asked in dict.fromkeys(c[:2] for c in cells))
        answer = f"All asked numbers right ({kinds}), {where}: {result.sentence()}"
    charts: list[Chart] = []
    if pairs:
        charts.append(_bars(values, pairs))
    charts += _grid_charts(run, values, grid, first.training_length)
    form = first.form
    bos = (
        ""
        if first.bos or form == "chat"
        else " The tokenizer has no bos token: the prompt begins with the text."
    )
    scaling = "" if first.rope_parameters is None else f" Rotary scaling: {first.rope_parameters}."
    return Section(
        name,
        title,
        question,
        answer,
        measure="" if result is None else "all asked numbers right ↑",
        headlines=[] if result is None else result.headlines(),
        charts=charts,
        tables=[_table(values, places), _examples(values), PUBLISHED],
        notes=[
            f"Form: {form}.{bos} Match rule: a number is right when its digits occur in the answer; exact: every asked "
            "number is right; share: of the asked numbers. Chance (a number drawn blindly) is 1.1e-07 for each; 'any "
            "needle' is the level of naming as many numbers of the text blindly as are asked, 1 when all are asked. An "
            f"answer that names more numbers than asked is not marked down.{scaling}",
            f"The first asked needle stands at the depth, the others anywhere. Each length has {first.haystacks} "
            "texts, which samples share; cities, numbers and places are the same at every length and depth and for "
            "every arm, and differences are paired by sample. Intervals: Wilson over samples or Student's t over "
            "seeds, the wider (samples in one text count as independent). All answers: multi_needle.jsonl beside "
            "the results.",
            *left_out(values),
            *run.skipped(name),
        ],
    )


def _place(cell: MultiNeedleCell) -> Place:
    return cell.needles, cell.asked, cell.length


def _cell(value: MultiNeedleResult, key: tuple[int, int, int, float]) -> MultiNeedleCell | None:
    return next((c for c in value.cells if (*_place(c), c.depth) == key), None)


def _exact(value: MultiNeedleResult, key: tuple[int, int, int, float]) -> list[float]:
    """The samples of a cell as 0 and 1."""
    cell = _cell(value, key)
    return [] if cell is None else [float(hits == key[1]) for hits in cell.found]


def _shared(values: Values[MultiNeedleResult], places: Sequence[Place]) -> list[tuple[int, int, int, float]]:
    """The cells of these places that every model was measured at."""
    keys = [
        [(*_place(c), c.depth) for c in v.cells if _place(c) in places]
        for seeds in values.values()
        for v in seeds.values()
    ]
    return [key for key in keys[0] if all(key in others for others in keys)]


def accuracy(
    values: Values[MultiNeedleResult], arm: str, place: Place, depth: float | None = None
) -> Estimate | None:
    """Samples with every asked number right, over depths (or at one) and seeds."""
    counts = []
    for value in values[arm].values():
        rows = [
            hit
            for c in value.cells
            if _place(c) == place and depth in (None, c.depth)
            for hit in _exact(value, (*place, c.depth))
        ]
        if rows:
            counts.append((int(sum(rows)), len(rows)))
    return proportion(counts) if counts else None


def share(values: Values[MultiNeedleResult], arm: str, place: Place) -> tuple[float, float, float] | None:
    """(mean, low, high) of the share of asked numbers, over samples and seeds."""
    rows = [
        hits / place[1]
        for value in values[arm].values()
        for c in value.cells
        if _place(c) == place
        for hits in c.found
    ]
    return (sum(rows) / len(rows), *bootstrap_mean(rows)) if rows else None


def _bars(values: Values[MultiNeedleResult], places: Sequence[Place]) -> BarChart:
    series = []
    for arm in values:
        points = [accuracy(values, arm, place) for place in places]
        y, low, high = (
            [None if point is None else getattr(point, part) for point in points]
            for part in ("value", "low", "high")
        )
        series.append(BarSeries(arm, y, low, high, arm))
    lengths = sorted({place[2] for place in places})
    return BarChart(
        "multi-needle-pairs",
        f"All asked numbers right, {', '.join(f'{length:,}' for length in lengths)} tokens",
        "exact match",
        [f"{asked} of {needles}" for needles, asked, _ in places],
        series,
        "How many needles are asked, of how many in the text; all depths.",
        y_range=(0.0, 1.0),
    )


def _grid_charts(
    run: RunResults, values: Values[MultiNeedleResult], places: Sequence[Place], trained: int | None
) -> list[Chart]:
    if not places:
        return []
    needles, asked, _ = places[0]
    lengths = sorted(place[2] for place in places)
    depths = sorted({c.depth for s in values.values() for v in s.values() for c in v.cells})

    def mean(arm: str, length: int, depth: float) -> float | None:
        estimate = accuracy(values, arm, (needles, asked, length), depth) if arm in values else None
        return None if estimate is None else estimate.value

    panels = heat_panels([arm.name for arm in run.arms], lengths, depths, mean)
    what = f"{asked} of {needles} needles"
    heat = HeatMap(
        "multi-needle-heat", f"All asked numbers right, {what}", "length (tokens)", "depth", panels,
        "Mean over samples and seeds. Depth: how much of the text stands before the first asked needle.",
    )  # fmt: skip
    if len(lengths) == 1:
        return [heat]
    line = length_chart(
        "multi-needle-length", f"All asked numbers right, {what}", "exact match", list(values), lengths,
        lambda arm, length: accuracy(values, arm, (needles, asked, length)),
        trained=trained, y_range=(0.0, 1.0),
        references=[Reference("any needle", 1 / needles)] if asked == 1 and needles > 1 else [],
    )  # fmt: skip
    return [heat, line]


def _table(values: Values[MultiNeedleResult], places: Sequence[Place]) -> SectionTable:
    levels = {_place(c): c.any_needle for s in values.values() for v in s.values() for c in v.cells}
    rows: list[list[str | None]] = []
    for place in places:
        row: list[str | None] = [f"{place[1]} of {place[0]}, {place[2]:,} tokens"]
        for arm in values:
            exact, part = accuracy(values, arm, place), share(values, arm, place)
            if exact is None or part is None:
                row.append(None)
                continue
            said = f"{exact.value:.2f} ({exact.interval()}, n={exact.n})"
            row.append(
                said if place[1] == 1 else f"{said}; share {part[0]:.2f} ({part[1]:.2f} to {part[2]:.2f})"
            )
        rows.append([*row, f"{levels[place]:.2f}"])
    return SectionTable("Exact match over all depths", ["asked and length", *values, "any needle"], rows)


def _examples(values: Values[MultiNeedleResult]) -> SectionTable:
    """Right and wrong answers of each arm's first seed, word for word."""
    rows: list[list[str | None]] = []
    for arm, seeds in values.items():
        for row in next(iter(seeds.values())).examples:
            mark = "right" if all(row.found) else "wrong"
            where = f"{row.asked} of {row.needles}, {row.length:,} tokens, depth {row.depth:.0%}"
            asked = ", ".join(f"{c}: {n}" for c, n in zip(row.cities, row.numbers, strict=True))
            text = row.answer if len(row.answer) <= LONGEST else f"{row.answer[:LONGEST]}…"
            rows.append([f"{arm}, {mark}", where, asked, text])
    return SectionTable("Answers, word for word", ["arm", "cell", "asked", "answer"], rows)

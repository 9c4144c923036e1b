"""The report's section on order robustness."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace

import numpy as np

from clearhead.analysis.by_length import Values, first_values
from clearhead.analysis.comparison import Comparison
from clearhead.analysis.margins import Outcomes, margin_by_chance, margin_difference, mean_margin
from clearhead.analysis.sections import BarChart, BarSeries, Section, SectionTable
from clearhead.evals.in_context.many_shot.section import examples, forms, levels, set_of
from clearhead.evals.in_context.results import AskedSet, InContextResult, InSet, LabelledAnswer
from clearhead.runs.results import RunResults

Place = tuple[str, str]
"""(set, order)."""


class OrderedSet(AskedSet):
    """orders: by format, for each permutation one character an asked text."""

    shots: int
    tokens: int
    orders: dict[str, list[str]]


class OrderPlace(InSet):
    order: str
    permutation: int


class OrderAnswer(LabelledAnswer, OrderPlace):
    """An answer after one permutation."""


class OrderResult(InContextResult[OrderedSet, OrderAnswer]):
    n: int


def order_section(
    name: str, title: str, question: str, run: RunResults, values: Values[OrderResult]
) -> Section:
    """The mean margin over the sets and formats that all arms have decides; lower is better."""
    first = first_values(values)
    every = list(dict.fromkeys(place for s in values.values() for v in s.values() for place in _places(v)))
    shared = [
        place
        for place in every
        if all(_table_of(v, place) is not None for s in values.values() for v in s.values())
    ]
    result = None
    answer = "No set was measured for all arms."
    if shared:
        tables = {
            arm: {
                seed: [t for at in shared if (t := _table_of(v, at)) is not None] for seed, v in seeds.items()
            }
            for arm, seeds in values.items()
        }
        texts = {place[0]: table.shape[1] for place, table in zip(shared, next(_rows(tables)), strict=True)}
        result = _compared(tables, sum(texts.values()))
        kinds = ", ".join(f"{s} {order}" for s, order in shared)
        answer = f"Best minus worst order ({kinds}): {result.sentence()}"
    return Section(
        name,
        title,
        question,
        answer,
        measure="" if result is None else "best minus worst order ↓",
        headlines=[] if result is None else result.headlines(),
        charts=[_bars(values, every)],
        tables=[*(_margins(values, place) for place in every), _examples(values)],
        notes=[
            *forms(values, first),
            "The margin is the accuracy of the best permutation minus that of the worst; it is above 0 even where "
            "order does not matter. 'By chance': each text's outcomes dealt anew among the permutations; p: "
            "how often that gives as large a margin. Intervals: bootstrap over texts or "
            "Student's t over seeds, the wider. All "
            f"arms have the same demonstrations, orders and texts. All answers: {name}.jsonl beside the results.",
            "The Differential Transformer paper shows margins of TREC as a figure only; DIFF's are smaller than the "
            "Transformer's in both formats.",
            *dict.fromkeys(
                f"{where}: {why}."
                for s in values.values()
                for v in s.values()
                for where, why in v.left_out.items()
            ),
            *run.skipped(name),
        ],
    )


def _examples(values: Values[OrderResult]) -> SectionTable:
    return examples(values, lambda row: f"{row.set}, order {row.order}, permutation {row.permutation}")


def _places(value: OrderResult) -> list[Place]:
    return [(one.set, order) for one in value.sets for order in one.orders]


def _table_of(value: OrderResult, place: Place) -> Outcomes | None:
    """Outcomes (permutations, texts) of a set in a format, None where they are missing."""
    one = value.of(place[0])
    rows: Sequence[str] = [] if one is None else one.orders.get(place[1], [])
    return np.array([[float(mark) for mark in row] for row in rows]) if rows else None


def _seeds(values: Values[OrderResult], arm: str, place: Place) -> list[Outcomes]:
    return [table for v in values[arm].values() if (table := _table_of(v, place)) is not None]


def _rows(tables: Mapping[str, Mapping[int, list[Outcomes]]]) -> Iterator[list[Outcomes]]:
    """The tables of each model."""
    return (row for seeds in tables.values() for row in seeds.values())


def _compared(tables: Mapping[str, Mapping[int, list[Outcomes]]], n: int) -> Comparison:
    """`n` texts: formats of one set share theirs."""
    baseline = next(iter(tables))
    differences = {}
    for arm, seeds in tables.items():
        both = [seed for seed in seeds if seed in tables[baseline]]
        if arm != baseline and both:
            differences[arm] = margin_difference(
                [seeds[seed] for seed in both], [tables[baseline][seed] for seed in both]
            )
    estimates = {arm: replace(mean_margin(list(seeds.values())), n=n) for arm, seeds in tables.items()}
    return Comparison(baseline, "lower", 2, estimates, differences)


def _bars(values: Values[OrderResult], places: Sequence[Place]) -> BarChart:
    series = []
    for arm in values:
        found = [
            mean_margin([[t] for t in tables]) if (tables := _seeds(values, arm, at)) else None
            for at in places
        ]
        y, low, high = (
            [None if one is None else getattr(one, part) for one in found]
            for part in ("value", "low", "high")
        )
        series.append(BarSeries(arm, y, low, high, arm))
    return BarChart(
        "order-margins",
        "Best minus worst order",
        "accuracy",
        [f"{name}, {order.replace('_', ' ')}" for name, order in places],
        series,
        "The same demonstrations in different orders; lower is better.",
    )


def _margins(values: Values[OrderResult], place: Place) -> SectionTable:
    rows: list[list[str | None]] = []
    for arm in values:
        tables = _seeds(values, arm, place)
        if not tables:
            rows.append([arm, None, None, None])
            continue
        estimate = mean_margin([[table] for table in tables])
        chance = [margin_by_chance(table) for table in tables]
        accuracies = [table.mean(axis=1) for table in tables]
        means = [f"{np.mean([part(a) for a in accuracies]):.2f}" for part in (np.min, np.mean, np.max)]
        shown = [f"{one.mean:.2f} (95 % below {one.high:.2f}), p = {one.pvalue:.3f}" for one in chance]
        rows.append(
            [
                arm,
                f"{estimate.value:.2f} ({estimate.interval()}, n={estimate.n})",
                "; ".join(shown),
                f"{means[0]} / {means[1]} / {means[2]}",
            ]
        )
    name, order = place
    one = set_of(values, name)
    count = len(one.orders.get(order, [])) or "several"
    chance_level, majority = levels(values, name)
    return SectionTable(
        f"{name}, {order.replace('_', ' ')}",
        ["arm", "best minus worst", "by chance", "worst / mean / best accuracy"],
        rows,
        f"{one.shots} demonstrations in {count} orders. Accuracy by chance {chance_level:.3f}; always the most "
        f"frequent label {majority:.3f}.",
    )

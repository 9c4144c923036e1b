"""The report's section on many-shot learning in context, and what both sections on learning in context share."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from clearhead.analysis.by_length import Values, first_values
from clearhead.analysis.comparison import compare
from clearhead.analysis.sections import LineChart, Reference, Section, SectionTable, Series
from clearhead.analysis.statistics import Estimate, paired_difference, proportion, verdict
from clearhead.evals.evaluation import EvaluationResult
from clearhead.evals.in_context.results import AskedSet, E, InContextResult, InSet, LabelledAnswer, S
from clearhead.evals.in_context.scoring import Score
from clearhead.runs.results import RunResults


class Point(EvaluationResult):
    """One number of demonstrations. full: whether no more fit. correct: one character an asked text."""

    shots: int
    full: bool
    tokens: int
    n: int
    correct: str


class ManyShotSet(AskedSet):
    points: list[Point]


class ManyShotPlace(InSet):
    shots: int
    draw: int


class ManyShotAnswer(LabelledAnswer, ManyShotPlace):
    """An answer after one draw of demonstrations."""


class ManyShotResult(InContextResult[ManyShotSet, ManyShotAnswer]):
    length: int
    draws: int
    n: int


PUBLISHED = SectionTable(
    "The Differential Transformer paper, 64K tokens, models of 3B parameters",
    ["sets", "DIFF above the Transformer, mean over numbers of demonstrations"],
    [["TREC, TREC-fine, Banking-77, Clinic-150", "5.2 to 21.6 points"]],
    "Smallest and largest of the four sets' mean gains; which set has which, and the accuracies, are in a figure only. "
    "Another scale and tokenizer: for the direction only.",
)
LONGEST = 200
"""Characters of a question that the report shows."""
RULES: dict[Score, str] = {
    "greedy": "greedy decoding among the labels' tokens (the published rule), decided where labels part",
    "likelihood": "the label of the greatest log-likelihood, its end of line included, not normalised by length",
}


def many_shot_section(
    name: str, title: str, question: str, run: RunResults, values: Values[ManyShotResult]
) -> Section:
    """The most demonstrations that all arms have, of every set, decide."""
    first = first_values(values)
    sets = [s for s in names_of(first.sets) if _shared(values, s)]
    decide = [(s, max(_shared(values, s))) for s in sets]
    result = None
    answer = "No number of demonstrations was measured for all arms."
    if decide:
        samples = {
            arm: {seed: [mark for at in decide for mark in _marks(v, *at)] for seed, v in seeds.items()}
            for arm, seeds in values.items()
        }
        result = compare(samples, "higher", proportions=True)
        where = ", ".join(f"{s} with {shots} demonstrations" for s, shots in decide)
        answer = f"Labels right ({where}): {result.sentence()}"
    every = names_of([one for seeds in values.values() for v in seeds.values() for one in v.sets])
    return Section(
        name,
        title,
        question,
        answer,
        measure="" if result is None else "labels right, most demonstrations ↑",
        headlines=[] if result is None else result.headlines(),
        charts=[_chart(values, s) for s in every],
        tables=[
            *(_table(values, s) for s in every),
            examples(values, lambda row: f"{row.set}, shots {row.shots}, draw {row.draw}"),
            PUBLISHED,
        ],
        notes=[
            *(forms(values, first)),
            f"Each set has {first.draws} draws of demonstrations, among which the asked texts are dealt; a draw "
            "gives every label in turn, and fewer demonstrations are the beginning of more. All arms are asked the "
            f"same texts after the same demonstrations, of at most {first.length:,} tokens with the answer; "
            "differences are paired by text. Intervals: Wilson over texts or Student's t over seeds, the wider (texts "
            f"after one draw count as independent). All answers: {name}.jsonl beside the results.",
            *dict.fromkeys(
                f"{where}: {why}."
                for s in values.values()
                for v in s.values()
                for where, why in v.left_out.items()
            ),
            *run.skipped(name),
        ],
    )


def names_of(sets: Sequence[AskedSet]) -> list[str]:
    return list(dict.fromkeys(one.set for one in sets))


def set_of(values: Values[InContextResult[S, E]], name: str) -> S:
    """A set as any model was asked it, for what all of them share."""
    return next(one for s in values.values() for v in s.values() if (one := v.of(name)) is not None)


def levels(values: Values[InContextResult[S, E]], name: str) -> tuple[float, float]:
    """What guessing gives: 1 / labels, and always saying the label that most of the asked texts have."""
    one = set_of(values, name)
    return 1 / one.labels, one.majority


def forms(values: Values[InContextResult[S, E]], first: InContextResult[S, E]) -> list[str]:
    """How sets were asked and answered."""
    notes = []
    for name in names_of([one for seeds in values.values() for v in seeds.values() for one in v.sets]):
        one = set_of(values, name)
        left_out = f" {one.repeated} repeated and {one.ambiguous} ambiguous texts left out."
        notes.append(
            f"{name}: {one.labels} labels, {one.asked} texts asked, {one.pool} to demonstrate with; "
            f"a demonstration is {one.form!r}.{left_out if one.repeated or one.ambiguous else ''}"
        )
    bos = (
        ""
        if first.bos
        else " The tokenizer has no bos token: the prompt begins with the first demonstration."
    )
    scaling = "" if first.rope_parameters is None else f" Rotary scaling: {first.rope_parameters}."
    return [*notes, f"Rule: {RULES[first.score]}.{bos}{scaling}"]


def examples(values: Values[InContextResult[S, E]], where: Callable[[E], str]) -> SectionTable:
    """Right and wrong answers of each arm's first seed, word for word."""
    rows: list[list[str | None]] = []
    for arm, seeds in values.items():
        for row in next(iter(seeds.values())).examples:
            text = row.asked if len(row.asked) <= LONGEST else f"…{row.asked[-LONGEST:]}"
            mark = "right" if row.right else "wrong"
            rows.append([f"{arm}, {mark}", where(row), text, row.label, row.answer])
    return SectionTable("Answers, word for word", ["arm", "where", "asked", "label", "answer"], rows)


def _point(value: ManyShotResult, name: str, shots: int) -> Point | None:
    found = value.of(name)
    return None if found is None else next((p for p in found.points if p.shots == shots), None)


def _marks(value: ManyShotResult, name: str, shots: int) -> list[float]:
    point = _point(value, name, shots)
    return [] if point is None else [float(mark) for mark in point.correct]


def _numbers(values: Values[ManyShotResult], name: str) -> list[set[int]]:
    every = [v.of(name) for s in values.values() for v in s.values()]
    return [set() if one is None else {point.shots for point in one.points} for one in every]


def _shared(values: Values[ManyShotResult], name: str) -> set[int]:
    """Numbers of demonstrations that every model was measured with."""
    return set.intersection(*_numbers(values, name))


def accuracy(values: Values[ManyShotResult], arm: str, name: str, shots: int) -> Estimate | None:
    """Labels right over seeds."""
    rows = [row for v in values[arm].values() if (row := _marks(v, name, shots))]
    return proportion([(int(sum(row)), len(row)) for row in rows]) if rows else None


def _difference(values: Values[ManyShotResult], arm: str, name: str, shots: int) -> str | None:
    """`better by ...` against the first arm, paired by text and seed."""
    baseline = next(iter(values))
    seeds = [
        seed
        for seed in values[arm]
        if seed in values[baseline] and all(_marks(values[a][seed], name, shots) for a in (arm, baseline))
    ]
    if arm == baseline or not seeds:
        return None
    ours, theirs = ([_marks(values[a][seed], name, shots) for seed in seeds] for a in (arm, baseline))
    return verdict(paired_difference(ours, theirs), "higher")


def _chart(values: Values[ManyShotResult], name: str) -> LineChart:
    shots = sorted(set.union(*_numbers(values, name)))
    series = []
    for arm in values:
        points = [accuracy(values, arm, name, number) for number in shots]
        y, low, high = (
            [None if point is None else getattr(point, part) for point in points]
            for part in ("value", "low", "high")
        )
        series.append(Series(arm, list(shots), y, low, high, arm))
    chance, majority = levels(values, name)
    return LineChart(
        f"many-shot-{name}".replace(":", "-").replace("/", "-"),
        f"Labels right, {name}", "demonstrations", "labels right", series,
        log_x=shots[0] > 0, markers=True, y_range=(0.0, 1.0),
        references=[Reference("chance", chance), Reference("most frequent label", majority)],
    )  # fmt: skip


def _table(values: Values[ManyShotResult], name: str) -> SectionTable:
    chance, majority = levels(values, name)
    others = list(values)[1:]
    rows: list[list[str | None]] = []
    for shots in sorted(set.union(*_numbers(values, name))):
        point = next(p for s in values.values() for v in s.values() if (p := _point(v, name, shots)))
        row: list[str | None] = [f"{shots} (up to {point.tokens:,} tokens)"]
        for arm in values:
            found = accuracy(values, arm, name, shots)
            row.append(None if found is None else f"{found.value:.2f} ({found.interval()}, n={found.n})")
        rows.append([*row, *(_difference(values, arm, name, shots) for arm in others)])
    against = [f"{arm} against {next(iter(values))}" for arm in others]
    return SectionTable(
        f"Labels right, {name}",
        ["demonstrations", *values, *against],
        rows,
        f"Chance {chance:.3f}; always the most frequent label {majority:.3f}.",
    )

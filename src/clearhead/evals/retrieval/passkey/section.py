"""The report's section on passkey retrieval."""

from __future__ import annotations

from typing import Any

from pydantic import Field

from clearhead.analysis.by_length import (
    Values,
    every_length,
    first_values,
    left_out,
    length_chart,
    length_table,
    shared_lengths,
    times,
)
from clearhead.analysis.comparison import compare
from clearhead.analysis.published import PASSKEY
from clearhead.analysis.sections import LineChart, Reference, Section, SectionTable
from clearhead.analysis.statistics import Estimate, proportion
from clearhead.evals.evaluation import EvaluationResult
from clearhead.runs.results import RunResults


class PasskeyCell(EvaluationResult):
    """correct: by each rule one character a prompt. inside: whether its key lies in the last training-length tokens."""

    form: str
    length: int
    place: str
    n: int
    rule: str
    correct: dict[str, str]
    inside: str
    chance: float


class PasskeyResult(EvaluationResult):
    cells: list[PasskeyCell]
    skipped_cells: dict[str, str] = Field(default={})
    training_length: int | None
    rope_parameters: dict[str, Any] | None
    n: int


FORM_NAMES = {
    "coca": "CoCA's prompt",
    "mohtashami": "Mohtashami and Jaggi's prompt",
    "native": "one needle of the training's kind",
}


def passkey_section(
    name: str, title: str, question: str, run: RunResults, values: Values[PasskeyResult]
) -> Section:
    """The share of keys found past the training length decides, all those lengths together; all lengths if none is."""
    first = first_values(values)
    trained = first.training_length
    forms = list(dict.fromkeys(cell.form for cell in first.cells))
    form = forms[0]
    shared = shared_lengths(values, lambda value: _lengths(value, form))
    beyond = [length for length in shared if trained is not None and length > trained]
    past = beyond or shared
    result = None
    answer = "No length was measured for all arms."
    if past:
        samples = {
            arm: {
                seed: [hit for length in past for hit in hits(cell_of(v, form, length), inside=None)]
                for seed, v in seeds.items()
            }
            for arm, seeds in values.items()
        }
        result = compare(samples, "higher", proportions=True)
        span = times(past[0], trained) if len(past) == 1 else f"{past[0]:,} to {past[-1]:,} tokens"
        answer = f"{FORM_NAMES[form][0].upper()}{FORM_NAMES[form][1:]}, {span}: {result.sentence()}"
    charts: list[LineChart] = []
    tables: list[SectionTable] = []
    for one in forms:
        made = _form(values, one, trained)
        charts.append(made[0])
        tables += made[1:]
    chance = "; ".join(f"{FORM_NAMES[one]} {cell_of_any(first, one).chance:.1e}" for one in forms)
    rules = "; ".join(f"{FORM_NAMES[one]}: {cell_of_any(first, one).rule}" for one in forms)
    scaling = "" if first.rope_parameters is None else f" Rotary scaling: {first.rope_parameters}."
    return Section(
        name,
        title,
        question,
        answer,
        measure="" if result is None else f"passkeys found{' past the training length' if beyond else ''} ↑",
        headlines=[] if result is None else result.headlines(),
        charts=charts,
        tables=[*tables, PASSKEY],
        notes=[
            f"Match rule: {rules}. Chance (a key drawn blindly): {chance}. 'Inside' is the key within the last "
            f"{trained} tokens, the training length.{scaling} Intervals: Wilson over prompts or Student's t over "
            "seeds, the wider; differences are paired by prompt and seed. Accuracies of different forms do not "
            "compare.",
            *left_out(values),
            *run.skipped(name),
        ],
    )


def hits(cell: PasskeyCell | None, *, inside: bool | None, rule: str | None = None) -> list[float]:
    """The answers of a cell as 0 and 1 by its published rule (or `rule`), all or those with the key in or out."""
    if cell is None:
        return []
    marks = cell.correct[rule or cell.rule]
    return [
        float(mark)
        for mark, place in zip(marks, cell.inside, strict=True)
        if inside is None or (place == "1") == inside
    ]


def cell_of(value: PasskeyResult, form: str, length: int, place: str = "uniform") -> PasskeyCell | None:
    """One cell, None where it was not measured."""
    wanted = (form, length, place)
    return next((c for c in value.cells if (c.form, c.length, c.place) == wanted), None)


def cell_of_any(value: PasskeyResult, form: str) -> PasskeyCell:
    """Any cell of a form, for what all of them share."""
    return next(cell for cell in value.cells if cell.form == form)


def accuracy(
    values: Values[PasskeyResult],
    arm: str,
    form: str,
    length: int,
    *,
    inside: bool | None = None,
    rule: str | None = None,
) -> Estimate | None:
    """Right answers over prompts and seeds; cells that were drawn inside or outside on purpose count there too."""
    places = ["uniform"] if inside is None else ["uniform", "inside" if inside else "outside"]
    rows = [
        [hit for place in places for hit in hits(cell_of(v, form, length, place), inside=inside, rule=rule)]
        for v in values[arm].values()
    ]
    counts = [(int(sum(row)), len(row)) for row in rows if row]
    return proportion(counts) if counts else None


def _lengths(value: PasskeyResult, form: str) -> set[int]:
    return {cell.length for cell in value.cells if cell.form == form and cell.place == "uniform"}


def _form(
    values: Values[PasskeyResult], form: str, trained: int | None
) -> tuple[LineChart, SectionTable, SectionTable]:
    lengths = every_length(values, lambda value: _lengths(value, form))
    arms = list(values)
    example = cell_of_any(first_values(values), form)

    def read(arm: str, length: int) -> Estimate | None:
        return accuracy(values, arm, form, length)

    def cell(arm: str, length: int) -> str | None:
        rules = [rule for rule in example.correct if rule != example.rule]
        found = read(arm, length)
        other = [(rule, accuracy(values, arm, form, length, rule=rule)) for rule in rules]
        text = None if found is None else f"{found.value:.2f} ({found.interval()}, n={found.n})"
        return text and "; ".join([text, *(f"{rule} {e.value:.2f}" for rule, e in other if e is not None)])

    def parts(arm: str, length: int) -> str | None:
        both = [
            (word, accuracy(values, arm, form, length, inside=word == "inside"))
            for word in ("inside", "outside")
        ]
        said = [f"{word} {e.value:.2f} ({e.interval()}, n={e.n})" for word, e in both if e is not None]
        return "; ".join(said) or None

    title = FORM_NAMES[form]
    chart = length_chart(
        f"passkey-{form}", f"Passkey: {title}", f"right answers ({example.rule})", arms, lengths, read,
        trained=trained, y_range=(0.0, 1.0), references=[Reference("chance", example.chance)],
    )  # fmt: skip
    return (
        chart,
        length_table(f"Right answers, {title} ({example.rule})", arms, lengths, cell),
        length_table(f"Key inside and outside the last {trained} tokens, {title}", arms, lengths, parts),
    )

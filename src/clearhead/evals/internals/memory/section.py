"""What a report says of quality against the bytes of a cache."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from functools import partial

import numpy as np
from numpy.typing import NDArray

from clearhead.analysis.by_length import Values, first_values, left_out
from clearhead.analysis.comparison import compare
from clearhead.analysis.sections import LineChart, Section, SectionTable, Series
from clearhead.analysis.statistics import Estimate, paired_difference, proportion, ratio, verdict
from clearhead.evals.internals.memory.results import MemoryCell, MemoryResult
from clearhead.runs.results import RunResults

TITLE, QUESTION = "Memory", "How small may its key-value cache be?"
Seeds = Mapping[int, MemoryResult]
Read = Callable[[Seeds, str], Estimate | None]


def section(
    name: str,
    run: RunResults,
    values: Values[MemoryResult],
    missing: Callable[[RunResults, str, str], Section],
) -> Section:
    if not values:
        return missing(run, TITLE, QUESTION)
    first = first_values(values)
    form = smallest(first)
    costs = {
        arm: {s: _bits(cell) - _bits(v.cells[0]) for s, v in seeds.items() if (cell := _cell(v, form))}
        for arm, seeds in values.items()
    }
    result = compare(
        {arm: seeds for arm, seeds in costs.items() if seeds}, "lower", denominators=first.bytes, digits=3
    )
    own = "; ".join(
        f"{arm} {verdict(difference, 'lower', digits=3)}" for arm, difference in result.estimates.items()
    )
    return Section(
        name,
        TITLE,
        QUESTION,
        f"Bits per byte behind a prompt held as {form}, against its whole cache (n={first.n}): {own}."
        + (f" What that costs, compared: {result.sentence()}" if result.differences else ""),
        measure=f"bits per byte lost, {form} ↓",
        digits=3,
        headlines=result.headlines(),
        charts=_charts(values),
        tables=[_table(values)],
        notes=[
            f"Prompts of {first.prompt} of {first.length} tokens, {first.n} documents; needle documents of the same "
            "length, the question at the end of the prompt. The prompt reads itself in full; what follows reads what "
            "is held. Bytes are those of the caches behind the prompt, scales and zeros included, numbers counted as "
            "16 bits, over all tokens in 16 bits; 3 bits are held in 4. Policies choose once, by themselves in every "
            "layer and key-value head. Differences are from the same model with its whole cache, paired by document; "
            "intervals: bootstrap or Wilson over documents or Student's t over seeds, the wider.",
            *left_out(values),
            *run.skipped(name),
        ],
    )


def smallest(values: MemoryResult) -> str:
    """What the first screen shows: the fewest bits, else the smallest budget of the first policy."""
    coded = [cell for cell in values.cells if cell.bits is not None]
    if coded:
        return min(coded, key=lambda cell: cell.bits or 0).form
    return min(values.cells[1:], key=lambda cell: cell.bytes).form


def _cell(values: MemoryResult, form: str) -> MemoryCell | None:
    return next((cell for cell in values.cells if cell.form == form), None)


def _bits(cell: MemoryCell) -> NDArray[np.float64]:
    return np.asarray(cell.nats) / math.log(2)


def _pairs(seeds: Seeds, form: str) -> list[tuple[MemoryCell, MemoryCell]]:
    found = [(_cell(v, form), v.cells[0]) for v in seeds.values()]
    return [(cell, whole) for cell, whole in found if cell is not None]


def _loss(seeds: Seeds, form: str) -> Estimate | None:
    size, found = next(iter(seeds.values())).bytes, _pairs(seeds, form)
    return ratio([_bits(cell) for cell, _ in found], size) if found else None


def _accuracy(seeds: Seeds, form: str, kind: str) -> Estimate | None:
    answers = [cell.correct.get(kind, "") for cell, _ in _pairs(seeds, form)]
    counts = [(said.count("1"), len(said)) for said in answers if said]
    return proportion(counts) if counts else None


def _marks(cell: MemoryCell, kind: str) -> list[float]:
    return [float(mark) for mark in cell.correct[kind]]


def _kinds(values: Values[MemoryResult]) -> list[str]:
    return list(first_values(values).cells[0].correct)


def _curves(values: MemoryResult) -> dict[str, list[MemoryCell]]:
    """The cells of one curve by its name, each with the whole cache at its end."""
    curves: dict[str, list[MemoryCell]] = {}
    for cell in values.cells[1:]:
        name = "fewer bits" if cell.policy is None else cell.policy
        if cell.rank == "signal":
            name += " by signal"
        curves.setdefault(name, []).append(cell)
    return {name: [*sorted(cells, key=lambda c: c.bytes), values.cells[0]] for name, cells in curves.items()}


def _charts(values: Values[MemoryResult]) -> list[LineChart]:
    """For every way to save, each arm's loss and accuracy by bytes."""
    charts = []
    reads: list[tuple[str, str, Read]] = [("loss", "bits per byte", _loss)]
    for kind in _kinds(values):
        shown = f"accuracy, {kind} fact{'s' * (kind != '1')}"
        reads.append((f"needles-{kind}", shown, partial(_accuracy, kind=kind)))
    for curve in _curves(first_values(values)):
        for slug, label, read in reads:
            series = []
            for arm, seeds in values.items():
                cells = _curves(next(iter(seeds.values()))).get(curve, [])
                points = [(100 * cell.bytes, read(seeds, cell.form)) for cell in cells]
                known = [(x, y) for x, y in points if y is not None]
                if known:
                    x = [x for x, _ in known]
                    y, low, high = ([getattr(y, part) for _, y in known] for part in ("value", "low", "high"))
                    series.append(Series(arm, x, y, low, high, arm))
            if series:
                charts.append(
                    LineChart(
                        f"memory-{curve.replace(' ', '-')}-{slug}",
                        f"{label[0].upper()}{label[1:]} by bytes, {curve}",
                        "bytes of the prompt's cache, % of 16 bits",
                        label,
                        series,
                        log_x=True,
                        markers=True,
                    )
                )
    return charts


def _table(values: Values[MemoryResult]) -> SectionTable:
    """A row for each arm and cache, with the differences from the whole cache."""
    kinds = _kinds(values)
    rows: list[list[str | None]] = []
    for arm, seeds in values.items():
        first = next(iter(seeds.values()))
        for cell in first.cells:
            loss, whole, change = _loss(seeds, cell.form), cell is first.cells[0], "–"
            if not whole:
                ours, theirs = ([_bits(pair[i]) for pair in _pairs(seeds, cell.form)] for i in (0, 1))
                change = verdict(paired_difference(ours, theirs, first.bytes), "lower", digits=3)
            row = [
                f"{arm}, {cell.form}",
                f"{100 * cell.bytes:.1f}",
                None if loss is None else f"{loss.value:.3f} ({loss.interval(3)})",
                change,
            ]
            for kind in kinds:
                accuracy = _accuracy(seeds, cell.form, kind)
                said = "–"
                if accuracy is not None and not whole:
                    here, there = (
                        [_marks(pair[i], kind) for pair in _pairs(seeds, cell.form)] for i in (0, 1)
                    )
                    said = verdict(paired_difference(here, there), "higher")
                row += [None if accuracy is None else f"{accuracy.value:.2f} ({accuracy.interval()})", said]
            rows.append(row)
    asked = [
        head
        for kind in kinds
        for head in (f"accuracy, {kind} fact{'s' * (kind != '1')}", "change of accuracy")
    ]
    headers = ["arm and cache", "bytes, % of 16 bits", "bits per byte", "change", *asked]
    return SectionTable("Quality against bytes", headers, rows, "'–' marks the reference of the changes.")

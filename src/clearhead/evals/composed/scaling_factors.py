"""How much does it matter which factor a rotary scaling is given? Perplexity and passkeys of one model over factors.

A trained model is read as it is (factor 1: no scaling) and under scalings of one type with factors 2, 4 and 8, none of
which it was trained with. An earlier version of the CoCA paper (arXiv 2309.08646) shows that a rotary Transformer's
results swing with the factor and CoCA's hardly do. The swing of a document is the largest minus the smallest of its
losses in nats per token over the factors above 1, at the longest length; each arm's mean over documents has a bootstrap
interval and the arms are paired by document.

Both measurements are those of `text.perplexity` and `retrieval.passkey`, with their options.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from pydantic import Field

from clearhead.analysis.by_length import (
    T,
    Values,
    every_length,
    first_values,
    left_out,
    shared_lengths,
    times,
)
from clearhead.analysis.comparison import compare
from clearhead.analysis.published import FACTORS
from clearhead.analysis.sections import LineChart, Section, SectionTable, Series
from clearhead.data.store import TokenStore
from clearhead.evals.cells import Cell, CellEvaluation, Measured
from clearhead.evals.evaluation import EvaluationConfig, EvaluationResult
from clearhead.evals.reasons import Unmeasured
from clearhead.evals.retrieval.passkey.evaluation import Passkey, PasskeyConfig
from clearhead.evals.retrieval.passkey.section import PasskeyResult, accuracy
from clearhead.evals.subject import Subject
from clearhead.evals.text.perplexity.evaluation import Perplexity, PerplexityConfig
from clearhead.evals.text.perplexity.section import PerplexityResult, SlidingCell, perplexity_text
from clearhead.runs.results import RunResults

ScalingName = Literal["dynamic", "linear", "ntk", "yarn"]


class ScalingFactorsConfig(EvaluationConfig):
    """factors: 1 reads the model without any scaling. scaling: the type of the others.

    perplexity, passkey: options of those evaluations (passkey = null leaves it out).
    """

    factors: list[float] = Field(default=[1.0, 2.0, 4.0, 8.0], min_length=1)
    scaling: ScalingName = "dynamic"
    perplexity: PerplexityConfig = PerplexityConfig(segment=0)
    passkey: PasskeyConfig | None = PasskeyConfig()


class Measurements(EvaluationResult):
    """Under one factor; None where it could not be measured or was not asked for."""

    perplexity: PerplexityResult | None = None
    passkey: PasskeyResult | None = None


class ScalingFactorsResult(EvaluationResult):
    scaling: str
    factors: dict[str, Measurements]
    skipped_cells: dict[str, str] = Field(default={})
    training_length: int | None

    def perplexities(self, factor: str) -> list[SlidingCell]:
        found = self.factors.get(factor)
        return found.perplexity.cells if found is not None and found.perplexity is not None else []


@dataclass(frozen=True, kw_only=True)
class Factor(Cell):
    """One of the two measurements under one factor."""

    factor: float
    measured: Literal["perplexity", "passkey"]


class ScalingFactors(CellEvaluation[ScalingFactorsConfig, ScalingFactorsResult, Factor, Measurements]):
    name = "scaling_factors"
    Config = ScalingFactorsConfig
    Result = ScalingFactorsResult
    Value = Measurements

    def cells(self, subject: Subject, config: ScalingFactorsConfig) -> Iterator[Factor]:
        kinds: list[Literal["perplexity", "passkey"]] = ["perplexity"]
        if config.passkey is not None:
            kinds.append("passkey")
        for factor in sorted(set(config.factors)):
            if factor < 1:
                raise Unmeasured(f"factors has {factor:g}; a scaling stretches, so at least 1")
            for kind in kinds:
                yield Factor(name=f"{kind}, factor {factor:g}", factor=factor, measured=kind)

    def text(self, subject: Subject, config: ScalingFactorsConfig) -> TokenStore | None:
        return subject.texts(config.perplexity.texts)

    def measure(self, subject: Subject, config: ScalingFactorsConfig, cell: Factor) -> Measurements:
        scaled = {"rope_parameters": parameters(config.scaling, cell.factor)}
        if cell.measured == "perplexity" or config.passkey is None:
            wanted = config.perplexity.model_copy(update=scaled)
            return Measurements(perplexity=Perplexity().result(subject, wanted))
        asked = config.passkey.model_copy(update=scaled)
        return Measurements(passkey=Passkey().result(subject, asked))

    def gather(
        self, subject: Subject, config: ScalingFactorsConfig, measured: Measured[Factor, Measurements]
    ) -> ScalingFactorsResult:
        factors: dict[str, dict[str, Any]] = {f"{factor:g}": {} for factor in sorted(set(config.factors))}
        for cell, value in measured.pairs:
            found = value.perplexity if cell.measured == "perplexity" else value.passkey
            factors[f"{cell.factor:g}"][cell.measured] = found
        return ScalingFactorsResult(
            scaling=config.scaling,
            factors={factor: Measurements(**found) for factor, found in factors.items()},
            skipped_cells=measured.skipped,
            training_length=subject.training_length,
        )

    def section(self, run: RunResults) -> Section:
        title, question = "Scaling factors", "How much does the choice of a rotary scaling factor matter?"
        values = self.results(run)
        if not values:
            return self.missing(run, title, question)
        first = first_values(values)
        trained = first.training_length
        lengths = shared_lengths(values, _perplexity_lengths)
        result, answer, at = None, "Perplexity was not measured for all arms.", ""
        if lengths:
            at = f"{times(lengths[-1], trained)}"
            # An arm without rotary positions has no factors, and a swing needs two.
            swings = {
                arm: {seed: swing(v, lengths[-1]) for seed, v in seeds.items()}
                for arm, seeds in values.items()
                if all(swing(v, lengths[-1]) for v in seeds.values())
            }
            answer = "No arm was read under two factors above 1."
            if swings:
                result = compare(swings, "lower", digits=3)
                answer = f"Swing of the loss over factors above 1 at {at}: {result.sentence()}"
        return Section(
            self.name,
            title,
            question,
            answer,
            measure="" if result is None else "swing over factors (nats per token) ↓",
            digits=3,
            headlines=[] if result is None else result.headlines(),
            charts=_charts(values),
            tables=[*_tables(values), FACTORS],
            notes=[
                f"Scaling {first.scaling!r}, without any training; factor 1 is the model as it is. Options, "
                "intervals and chance levels: as in the sections on perplexity and passkeys.",
                *left_out(values),
                *run.skipped(self.name),
            ],
        )


def parameters(scaling: str, factor: float) -> dict[str, Any] | None:
    """`rope_parameters` of one factor; None for 1, the model as it is."""
    return None if factor == 1 else {"rope_type": scaling, "factor": float(factor)}


def swing(value: ScalingFactorsResult, length: int) -> list[float]:
    """Largest minus smallest loss in nats per token over the factors above 1, for each document."""
    losses = [
        np.array(cell.nats) / np.array(cell.tokens)
        for factor in value.factors
        if float(factor) > 1
        for cell in value.perplexities(factor)
        if cell.length == length
    ]
    return np.ptp(np.stack(losses), axis=0).tolist() if len(losses) > 1 else []  # type: ignore[no-any-return]


def _perplexity_lengths(value: ScalingFactorsResult) -> set[int]:
    """The lengths that every factor has."""
    found = [
        {cell.length for cell in by.perplexity.cells}
        for by in value.factors.values()
        if by.perplexity is not None
    ]
    return set.intersection(*found) if found else set()


def _under(
    values: Values[ScalingFactorsResult], factor: str, read: Callable[[Measurements], T | None]
) -> dict[str, dict[int, T]]:
    """The values of one measurement under one factor, in the form of that evaluation alone."""
    found = {
        arm: {
            seed: one
            for seed, v in seeds.items()
            if (one := read(v.factors.get(factor, Measurements()))) is not None
        }
        for arm, seeds in values.items()
    }
    return {arm: seeds for arm, seeds in found.items() if seeds}


def _all_factors(values: Values[ScalingFactorsResult]) -> list[str]:
    return sorted({f for seeds in values.values() for v in seeds.values() for f in v.factors}, key=float)


def _tables(values: Values[ScalingFactorsResult]) -> list[SectionTable]:
    """Perplexity and accuracy, a row for each length and factor."""
    arms = list(values)
    rows: dict[str, list[list[str | None]]] = {"perplexity": [], "passkey": []}
    for factor in _all_factors(values):
        perplexities = _under(values, factor, lambda found: found.perplexity)
        passkeys = _under(values, factor, lambda found: found.passkey)
        if perplexities:
            average = first_values(perplexities).average
            for length in every_length(perplexities, lambda v: {cell.length for cell in v.cells}):
                rows["perplexity"].append(
                    [
                        f"factor {factor}, {length:,} tokens",
                        *(
                            perplexity_text(perplexities, arm, length, average)
                            if arm in perplexities
                            else None
                            for arm in arms
                        ),
                    ]
                )
        for form, length in _asked(passkeys):
            cells = [accuracy(passkeys, arm, form, length) if arm in passkeys else None for arm in arms]
            rows["passkey"].append(
                [
                    f"factor {factor}, {form}, {length:,} tokens",
                    *(None if e is None else f"{e.value:.2f} ({e.interval()}, n={e.n})" for e in cells),
                ]
            )
    titles = {"perplexity": "Perplexity by factor", "passkey": "Passkeys found by factor"}
    return [
        SectionTable(titles[name], ["factor and length", *arms], found)
        for name, found in rows.items()
        if found
    ]


def _asked(values: Values[PasskeyResult]) -> list[tuple[str, int]]:
    """(form, length) of every passkey cell."""
    return sorted({(c.form, c.length) for s in values.values() for v in s.values() for c in v.cells})


def _charts(values: Values[ScalingFactorsResult]) -> list[LineChart]:
    """Bits per byte by length: one chart for each arm, one line for each factor; close lines mean little influence."""
    charts: list[LineChart] = []
    for arm, seeds in values.items():
        series = []
        for factor in _all_factors(values):
            cells: dict[int, list[float]] = {}
            for v in seeds.values():
                for cell in v.perplexities(factor):
                    cells.setdefault(cell.length, []).append(cell.bits_per_byte)
            if cells:
                mean = [float(np.mean(cells[length])) for length in sorted(cells)]
                series.append(Series(f"factor {factor}", sorted(cells), mean))
        if series:
            charts.append(
                LineChart(
                    f"factors-{len(charts)}", f"{arm}: bits per byte by factor", "length (tokens)", "bits per byte",
                    series, "Mean over seeds.", log_x=True, markers=True,
                )
            )  # fmt: skip
    return charts

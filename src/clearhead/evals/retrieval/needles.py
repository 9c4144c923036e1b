"""Needle retrieval: can a model find a fact in its context, over length x depth x number of needles?

A document hides `needles` facts (a key and a value) in real text; the asked one stands at a fixed depth, the others
anywhere, and the document ends with the question. Exact match: every token of the value is the most likely one given
those before it, which is exactly what greedy decoding would have to produce, so one forward pass is enough. Protocol
after LWM and the Differential Transformer's multi-needle test; keys and values are the corpus's own tokens here.

Three levels put a score into perspective: *chance* (a blind guess among all possible values, computed), *any needle*
(copying the value of a random needle of the document: 1 / needles, computed) and *untrained* (the same model before
training, measured).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np
from pydantic import Field

from clearhead.analysis.by_length import Values, first_values, left_out
from clearhead.analysis.comparison import compare
from clearhead.analysis.sections import HeatMap, LineChart, Panel, Reference, Section, SectionTable, Series
from clearhead.analysis.statistics import Estimate, proportion
from clearhead.data.needles import (
    NeedleSpec,
    chance_level,
)
from clearhead.evals.asking.needle_documents import documents, exact_match, marks, too_short
from clearhead.evals.cells import Cell, CellEvaluation, LeftOut, Measured
from clearhead.evals.evaluation import EvaluationConfig, EvaluationResult
from clearhead.evals.subject import Subject
from clearhead.runs.results import RunResults

if TYPE_CHECKING:
    from transformers import PreTrainedModel

HARDLY = 0.1
"""Below this share of right answers, differences between arms are not what a reader should take away first."""


class NeedlesConfig(EvaluationConfig):
    """lengths: tokens of a document (default: training length, twice and four times it).

    samples: documents per cell; untrained_samples: documents per cell for the untrained level (0 = not measured).
    questions: asked needles per document, counted together; the depth is that of the first.
    key_tokens, value_tokens: default as in training.
    """

    lengths: list[int] | None = Field(default=None, min_length=1)
    depths: list[float] = Field(default=[0.0, 0.25, 0.5, 0.75, 1.0], min_length=1)
    needles: list[int] = Field(default=[1, 4], min_length=1)
    questions: int = Field(default=1, ge=1)
    key_tokens: int | None = Field(default=None, ge=1)
    value_tokens: int | None = Field(default=None, ge=1)
    samples: int = Field(default=40, ge=1)
    untrained_samples: int = Field(default=4, ge=0)
    batch_tokens: int = Field(default=8192, ge=1)
    seed: int = 1000


class NeedlesCell(EvaluationResult):
    """correct: one character an answer, 1 where it is right. untrained_*: the same before training, where asked for."""

    needles: int
    length: int
    depth: float
    n: int
    hits: int
    correct: str
    untrained_n: int | None = None
    untrained_hits: int | None = None


class NeedlesResult(EvaluationResult):
    cells: list[NeedlesCell]
    skipped_cells: dict[str, str] = Field(default={})
    chance: float
    n: int


@dataclass(frozen=True, kw_only=True)
class NeedlePlace(Cell):
    """Documents of one kind with the asked fact at one depth; `untrained` answers some of them too."""

    spec: NeedleSpec
    depth: float
    untrained: PreTrainedModel | None


class Needles(CellEvaluation[NeedlesConfig, NeedlesResult, NeedlePlace, NeedlesCell]):
    name = "needles"
    Config = NeedlesConfig
    Result = NeedlesResult
    Value = NeedlesCell

    def cells(self, subject: Subject, config: NeedlesConfig) -> Iterator[NeedlePlace | LeftOut]:
        trained = subject.training_length or 256
        untrained = subject.untrained() if config.untrained_samples else None
        for needles in config.needles:
            for length in config.lengths or [trained, 2 * trained, 4 * trained]:
                spec, name = self._spec(subject, config, needles, length), f"{needles} x {length}"
                if reason := subject.too_long(length) or too_short(spec, subject.tokenizer):
                    yield LeftOut(name, reason)
                    continue
                for depth in config.depths:
                    where = f"{name}, depth {depth:.0%}"
                    yield NeedlePlace(name=where, spec=spec, depth=depth, untrained=untrained)

    def measure(self, subject: Subject, config: NeedlesConfig, cell: NeedlePlace) -> NeedlesCell:
        samples = documents(subject, cell.spec, cell.depth, config.samples, config.seed)
        hits = exact_match(subject.model, samples, subject.device, config.batch_tokens)
        levels = {}
        if cell.untrained is not None:
            few = samples[: config.untrained_samples]
            found = exact_match(cell.untrained, few, subject.device, config.batch_tokens)
            levels = {"untrained_n": len(few) * cell.spec.questions, "untrained_hits": sum(found)}
        return NeedlesCell(
            needles=cell.spec.needles,
            length=cell.spec.length,
            depth=cell.depth,
            n=len(hits),
            hits=sum(hits),
            correct=marks(hits),
            **levels,
        )

    def gather(
        self, subject: Subject, config: NeedlesConfig, measured: Measured[NeedlePlace, NeedlesCell]
    ) -> NeedlesResult:
        return NeedlesResult(
            cells=measured.values,
            skipped_cells=measured.skipped,
            chance=chance_level(self._spec(subject, config, 1, 1), subject.tokenizer, "validation"),
            n=sum(cell.n for cell in measured.values),
        )

    def _spec(self, subject: Subject, config: NeedlesConfig, needles: int, length: int) -> NeedleSpec:
        return replace(
            subject.needles.spec(length, needles, min(config.questions, needles)),
            key_tokens=config.key_tokens or subject.needles.key_tokens,
            value_tokens=config.value_tokens or subject.needles.value_tokens,
        )

    def section(self, run: RunResults) -> Section:
        title, question = "Needle retrieval", "Does it find a fact in its context?"
        values = self.results(run)
        if not values:
            return self.missing(run, title, question)
        first = first_values(values)
        pairs = sorted({(cell.needles, cell.length) for cell in first.cells})
        needles, length = headline_cell(pairs, run.training_length)
        samples = {
            arm: {seed: _correct(v, needles, length) for seed, v in seeds.items()}
            for arm, seeds in values.items()
        }
        result = compare(samples, "higher", proportions=True)
        best = max(result.estimates, key=lambda arm: result.estimates[arm].value)
        level = f"{result.estimates[best].value:.2f}"
        asked = "a single fact" if needles == 1 else f"one of {needles} facts"
        lead = f"Asked for {asked} in {length} tokens, {best} is right most often ({level})."
        if result.estimates[best].value < HARDLY:
            lead = f"Hardly: asked for {asked} in {length} tokens, no arm is right more often than {level}."
        return Section(
            self.name,
            title,
            question,
            f"{lead} {result.sentence()}" if result.differences else result.sentence(),
            measure=f"exact match, {_label(needles)} in {length} tokens ↑",
            headlines=result.headlines(),
            charts=[*_length_charts(values, pairs, run.training_length), *_heat_maps(run, values, pairs)],
            tables=[_table(run, values, pairs), PUBLISHED],
            notes=[
                f"Keys and values never occur in training. Chance: {first.chance:.1e} (a blind guess). "
                "With several needles, copying any one of them is right 1 time in that number. 'Untrained' is the same "
                "model before training. Intervals: Wilson over documents or Student's t over seeds, the wider; "
                "differences are paired by document and seed.",
                *left_out(values),
                *run.skipped(self.name),
            ],
        )


PUBLISHED = SectionTable(
    "The Differential Transformer paper's own figures (3B parameters, 4K context, for the direction only)",
    ["needles, asked", "Transformer", "DIFF V1"],
    [["1, 1", "1.00", "1.00"], ["2, 2", "0.85", "0.92"], ["4, 2", "0.62", "0.84"], ["6, 2", "0.55", "0.85"]],
    "Another scale, corpus and needle format: not comparable number by number.",
)


def headline_cell(pairs: Sequence[tuple[int, int]], trained: int | None) -> tuple[int, int]:
    """The (needles, length) of the first screen: fewest needles, at the longest length within the training length."""
    needles = min(pairs)[0]
    lengths = [length for count, length in pairs if count == needles]
    within = [length for length in lengths if trained is None or length <= trained]
    return needles, max(within) if within else min(lengths)


def _correct(values: NeedlesResult, needles: int, length: int) -> list[float]:
    """All answers of one number of needles and length, over depths, as 0 and 1."""
    cells = [c for c in values.cells if (c.needles, c.length) == (needles, length)]
    return [float(mark) for cell in cells for mark in cell.correct]


def _estimate(seeds: Mapping[int, NeedlesResult], needles: int, length: int) -> Estimate | None:
    rows = [_correct(values, needles, length) for values in seeds.values()]
    counts = [(int(sum(row)), len(row)) for row in rows if row]
    return proportion(counts) if counts else None


def _label(needles: int) -> str:
    return "1 needle" if needles == 1 else f"{needles} needles"


def _length_charts(
    values: Values[NeedlesResult], pairs: Sequence[tuple[int, int]], trained: int | None
) -> list[LineChart]:
    """Accuracy against length, one chart per number of needles."""
    charts = []
    for needles in sorted({count for count, _ in pairs}):
        lengths = [length for count, length in pairs if count == needles]
        series = []
        for arm, seeds in values.items():
            points = [_estimate(seeds, needles, length) for length in lengths]
            y, low, high = (
                [None if point is None else getattr(point, part) for point in points]
                for part in ("value", "low", "high")
            )
            series.append(Series(arm, lengths, y, low, high, arm))
        references = [] if needles == 1 else [Reference("any needle", 1 / needles)]
        if trained is not None and min(lengths) < trained < max(lengths):
            references.append(Reference("training length", trained, "x"))
        charts.append(
            LineChart(
                f"needles-{needles}-by-length",
                f"Exact match, {_label(needles)}",
                "length of the document (tokens)",
                "exact match",
                series,
                log_x=True,
                markers=True,
                y_range=(0.0, 1.0),
                references=references,
            )
        )
    return charts


def _heat_maps(
    run: RunResults, values: Values[NeedlesResult], pairs: Sequence[tuple[int, int]]
) -> list[HeatMap]:
    """Accuracy over length x depth, one map per number of needles, one panel per arm; missing arms are empty panels."""
    charts = []
    for needles in sorted({count for count, _ in pairs}):
        lengths = [length for count, length in pairs if count == needles]
        depths = sorted({c.depth for seeds in values.values() for v in seeds.values() for c in v.cells})
        panels = []
        for arm in run.arms:
            cells: dict[tuple[int, int, float], list[float]] = {}
            for result in values.get(arm.name, {}).values():
                for c in result.cells:
                    cells.setdefault((c.needles, c.length, c.depth), []).append(c.hits / c.n)
            grid = [
                [
                    float(np.mean(cells[needles, length, depth]))
                    if (needles, length, depth) in cells
                    else None
                    for length in lengths
                ]
                for depth in depths
            ]
            panels.append(
                Panel(
                    arm.name, [str(n) for n in lengths], [f"{depth:.0%}" for depth in depths], grid, arm.name
                )
            )
        charts.append(
            HeatMap(
                f"needles-{needles}-heat",
                f"Exact match by length and depth, {_label(needles)}",
                "length (tokens)",
                "depth",
                panels,
                "Mean over seeds. Depth: how far into the context the asked fact stands.",
            )
        )
    return charts


def _table(run: RunResults, values: Values[NeedlesResult], pairs: Sequence[tuple[int, int]]) -> SectionTable:
    """Accuracy with its interval for each number of needles and length, with the untrained level."""
    rows: list[list[str | None]] = []
    for needles, length in pairs:
        row: list[str | None] = [f"{_label(needles)}, {length} tokens"]
        for arm in run.arms:
            estimate = _estimate(values.get(arm.name, {}), needles, length)
            row.append(None if estimate is None else f"{estimate.value:.2f} ({estimate.interval()})")
        counts = [
            (c.untrained_hits, c.untrained_n)
            for seeds in values.values()
            for v in seeds.values()
            for c in v.cells
            if (c.needles, c.length) == (needles, length)
            and c.untrained_n is not None
            and c.untrained_hits is not None
        ]
        hits, trials = sum(k for k, _ in counts), sum(n for _, n in counts)
        row.append(f"{hits / trials:.2f} (n={trials})" if trials else None)
        rows.append(row)
    headers = ["needles and length", *(arm.name for arm in run.arms), "untrained"]
    return SectionTable("Exact match over all depths", headers, rows)

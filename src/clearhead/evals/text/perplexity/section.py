"""The report's section on perplexity by length."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Literal

import numpy as np
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
from clearhead.analysis.published import PERPLEXITY
from clearhead.analysis.sections import Chart, Section, SectionTable
from clearhead.analysis.statistics import Estimate, count, ratio
from clearhead.evals.evaluation import EvaluationResult
from clearhead.runs.results import RunResults

Bos = Literal["window", "document", "none"]
FirstWindow = Literal["all", "stride"]
Average = Literal["token", "document"]


class Figures(EvaluationResult):
    """Perplexity with its interval, and what it is made of: one number a document."""

    perplexity: float
    low: float
    high: float
    bits_per_byte: float
    nats: list[float]
    tokens: list[int]
    bytes: list[int]


class AtLength(EvaluationResult):
    length: int


class Windows(AtLength):
    stride: int
    windows: int


class SlidingCell(Figures, Windows):
    """Sliding windows of one length."""


class SegmentCell(Figures, AtLength):
    """The last tokens of every document, read in texts of one length."""


class Segment(EvaluationResult):
    tokens: int
    cells: list[SegmentCell]


class PerplexityResult(EvaluationResult):
    cells: list[SlidingCell]
    segment: Segment
    skipped_cells: dict[str, str] = Field(default={})
    training_length: int | None
    bos: Bos
    first_window: FirstWindow
    average: Average
    rope_parameters: dict[str, Any] | None
    texts: list[str] | None
    n: int
    documents: list[str]


BOS: dict[Bos, str] = {
    "window": "a bos in front of every window",
    "document": "a bos in front of the first window",
    "none": "no bos",
}
FIRST: dict[FirstWindow, str] = {
    "all": "all tokens of the first window count",
    "stride": "the first window counts its last tokens alone",
}
AVERAGE: dict[Average, str] = {
    "token": "averaged over tokens",
    "document": "averaged over documents' perplexities",
}


def perplexity_section(
    name: str, title: str, question: str, run: RunResults, values: Values[PerplexityResult]
) -> Section:
    """Bits per byte decide, for they compare across tokenizers; perplexities are tabled."""
    first = first_values(values)
    trained = first.training_length
    shared = shared_lengths(values, _sliding_lengths)
    longest = shared[-1] if shared else None
    if longest is None:
        answer, result = "No length was measured for all arms.", None
    else:
        bits = {
            arm: {seed: np.array(figures_at(v, longest).nats) / math.log(2) for seed, v in seeds.items()}
            for arm, seeds in values.items()
        }
        result = compare(bits, "lower", denominators=figures_at(first, longest).bytes, digits=3)
        answer = f"In windows of {times(longest, trained)}: {result.sentence()}"
    charts, tables = _drawn(values)
    strides = ", ".join(f"{cell.stride} at {cell.length:,}" for cell in first.cells)
    source = "validation documents" if first.texts is None else f"documents of {', '.join(first.texts)}"
    scaling = "" if first.rope_parameters is None else f" Rotary scaling: {first.rope_parameters}."
    notes = [
        f"{count(first.n, 'document')} ({source}), the same at every length; tokens that a window counts: "
        f"{strides}; {BOS[first.bos]}; {FIRST[first.first_window]}; {AVERAGE[first.average]}.{scaling} "
        "Intervals: bootstrap over documents or Student's t over seeds, the wider; differences are paired by document "
        "and seed. Perplexities of different tokenizers do not compare, bits per byte do.",
        *left_out(values, " tokens"),
        *run.skipped(name),
    ]
    return Section(
        name,
        title,
        question,
        answer,
        measure="" if longest is None else f"bits per byte at {longest:,} tokens ↓",
        digits=3,
        headlines=[] if result is None else result.headlines(),
        charts=charts,
        tables=[*tables, PERPLEXITY],
        notes=notes,
    )


def _drawn(values: Values[PerplexityResult]) -> tuple[list[Chart], list[SectionTable]]:
    """By length, and the last segment where it was measured."""
    first, arms = first_values(values), list(values)
    trained = first.training_length
    lengths = every_length(values, _sliding_lengths)
    charts: list[Chart] = [
        length_chart(
            "perplexity-by-length", "Sliding window", "bits per byte", arms, lengths,
            lambda arm, length: _bits(values, arm, length, _cell), trained=trained,
            caption="Bits per byte are the logarithm of perplexity, per byte of text.",
        )
    ]  # fmt: skip
    tables = [
        length_table(
            f"Perplexity in sliding windows ({first.average} average)", arms, lengths,
            lambda arm, length: _perplexity(values, arm, length, _cell, first.average),
        )
    ]  # fmt: skip
    ends = every_length(values, _segment_lengths)
    if ends:
        size = first.segment.tokens
        charts.append(
            length_chart(
                "perplexity-last-segment", f"The same last {size} tokens", "bits per byte", arms, ends,
                lambda arm, length: _bits(values, arm, length, _end), trained=trained,
                caption="Each length predicts the same tokens, with more text before them.",
            )
        )  # fmt: skip
        tables.append(
            length_table(
                f"Perplexity of the same last {size} tokens of every document", arms, ends,
                lambda arm, length: _perplexity(values, arm, length, _end, first.average),
            )
        )  # fmt: skip
    return charts, tables


def figures_at(value: PerplexityResult, length: int) -> SlidingCell:
    """The sliding windows of a length that was measured."""
    return next(cell for cell in value.cells if cell.length == length)


def perplexity_text(values: Values[PerplexityResult], arm: str, length: int, average: Average) -> str | None:
    """An arm's perplexity in windows of a length, with its interval."""
    return _perplexity(values, arm, length, _cell, average)


def _sliding_lengths(value: PerplexityResult) -> set[int]:
    return {cell.length for cell in value.cells}


def _segment_lengths(value: PerplexityResult) -> set[int]:
    return {cell.length for cell in value.segment.cells}


Read = Callable[[PerplexityResult, int], Figures | None]


def _cell(value: PerplexityResult, length: int) -> SlidingCell | None:
    return next((cell for cell in value.cells if cell.length == length), None)


def _end(value: PerplexityResult, length: int) -> SegmentCell | None:
    return next((cell for cell in value.segment.cells if cell.length == length), None)


def _found(values: Values[PerplexityResult], arm: str, length: int, read: Read) -> list[Figures]:
    return [cell for value in values[arm].values() if (cell := read(value, length)) is not None]


def _bits(values: Values[PerplexityResult], arm: str, length: int, read: Read) -> Estimate | None:
    cells = _found(values, arm, length, read)
    return ratio([np.array(cell.nats) / math.log(2) for cell in cells], cells[0].bytes) if cells else None


def _perplexity(
    values: Values[PerplexityResult], arm: str, length: int, read: Read, average: Average
) -> str | None:
    cells = _found(values, arm, length, read)
    if not cells:
        return None
    if average == "token":
        found = ratio([cell.nats for cell in cells], cells[0].tokens)
        value, low, high = (math.exp(bound) for bound in (found.value, found.low, found.high))
    else:
        each = [np.exp(np.array(cell.nats) / np.array(cell.tokens)) for cell in cells]
        found = ratio(each, np.ones(each[0].size))
        value, low, high = found.value, found.low, found.high
    return f"{value:,.2f} ({low:,.2f} to {high:,.2f})"

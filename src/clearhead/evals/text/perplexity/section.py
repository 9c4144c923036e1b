"""The report's section on perplexity by length."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

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
from clearhead.analysis.sections import Section
from clearhead.analysis.statistics import Estimate, count, ratio
from clearhead.runs.results import RunResults

BOS = {
    "window": "a bos in front of every window",
    "document": "a bos in front of the first window",
    "none": "no bos",
}
FIRST = {
    "all": "all tokens of the first window count",
    "stride": "the first window counts its last tokens alone",
}
AVERAGE = {"token": "averaged over tokens", "document": "averaged over documents' perplexities"}


def perplexity_section(name: str, title: str, question: str, run: RunResults, values: Values) -> Section:
    """Bits per byte decide, for they compare across tokenizers; perplexities are tabled."""
    first = first_values(values)
    trained = first["training_length"]
    arms = list(values)
    shared = shared_lengths(values, _sliding_lengths)
    longest = shared[-1] if shared else None
    if longest is None:
        answer, result = "No length was measured for all arms.", None
    else:
        bits = {
            arm: {seed: np.array(_cell(v, longest)["nats"]) / math.log(2) for seed, v in seeds.items()}
            for arm, seeds in values.items()
        }
        result = compare(bits, "lower", denominators=_cell(first, longest)["bytes"], digits=3)
        answer = f"In windows of {times(longest, trained)}: {result.sentence()}"
    lengths = every_length(values, _sliding_lengths)
    charts = [
        length_chart(
            "perplexity-by-length", "Sliding window", "bits per byte", arms, lengths,
            lambda arm, length: _bits(values, arm, length, _cell), trained=trained,
            caption="Bits per byte are the logarithm of perplexity, per byte of text.",
        )
    ]  # fmt: skip
    tables = [
        length_table(
            f"Perplexity in sliding windows ({first['average']} average)", arms, lengths,
            lambda arm, length: _perplexity(values, arm, length, _cell, first["average"]),
        )
    ]  # fmt: skip
    ends = every_length(values, _segment_lengths)
    if ends:
        size = first["segment"]["tokens"]
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
                lambda arm, length: _perplexity(values, arm, length, _end, first["average"]),
            )
        )  # fmt: skip
    strides = ", ".join(f"{cell['stride']} at {cell['length']:,}" for cell in first["cells"])
    source = "validation documents" if first["texts"] is None else f"documents of {', '.join(first['texts'])}"
    scaling = "" if first["rope_parameters"] is None else f" Rotary scaling: {first['rope_parameters']}."
    notes = [
        f"{count(first['n'], 'document')} ({source}), the same at every length; tokens that a window counts: "
        f"{strides}; {BOS[first['bos']]}; {FIRST[first['first_window']]}; {AVERAGE[first['average']]}.{scaling} "
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


def perplexity_text(values: Values, arm: str, length: int, average: str) -> str | None:
    """An arm's perplexity in windows of a length, with its interval."""
    return _perplexity(values, arm, length, _cell, average)


def _sliding_lengths(value: Mapping[str, Any]) -> set[int]:
    return {cell["length"] for cell in value["cells"]}


def _segment_lengths(value: Mapping[str, Any]) -> set[int]:
    return {cell["length"] for cell in value["segment"]["cells"]}


def _cell(value: Mapping[str, Any], length: int) -> Mapping[str, Any]:
    return next((cell for cell in value["cells"] if cell["length"] == length), {})


def _end(value: Mapping[str, Any], length: int) -> Mapping[str, Any]:
    return next((cell for cell in value["segment"]["cells"] if cell["length"] == length), {})


def _found(values: Values, arm: str, length: int, read: Any) -> list[Mapping[str, Any]]:
    return [cell for value in values[arm].values() if (cell := read(value, length))]


def _bits(values: Values, arm: str, length: int, read: Any) -> Estimate | None:
    cells = _found(values, arm, length, read)
    return (
        ratio([np.array(cell["nats"]) / math.log(2) for cell in cells], cells[0]["bytes"]) if cells else None
    )


def _perplexity(values: Values, arm: str, length: int, read: Any, average: str) -> str | None:
    cells = _found(values, arm, length, read)
    if not cells:
        return None
    if average == "token":
        found = ratio([cell["nats"] for cell in cells], cells[0]["tokens"])
        value, low, high = (math.exp(bound) for bound in (found.value, found.low, found.high))
    else:
        each = [np.exp(np.array(cell["nats"]) / np.array(cell["tokens"])) for cell in cells]
        found = ratio(each, np.ones(each[0].size))
        value, low, high = found.value, found.low, found.high
    return f"{value:,.2f} ({low:,.2f} to {high:,.2f})"

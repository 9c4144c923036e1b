"""Loss by position in the context, and its cumulative average: does a longer context help, and does it stay usable?

One window of `length` tokens per document that is long enough, from the document's start, read in a single pass;
the bos token, if `bos` says so and the tokenizer has one, is the first of them, and nothing is padded. The loss at
position p is that of the token with p tokens before it; a first token without a bos is predicted by nothing and does
not count. The cumulative average up to p, `1/p Σ_{q <= p} NLL_q`, is the curve of the Differential Transformer
paper's long-context figure. Cumulative *bits per byte*, `Σ_{q <= p} NLL_q / (ln 2 · bytes of these tokens)` over
all documents, stand beside it: only they compare across tokenizers. `length` may exceed the training length.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from itertools import pairwise
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from clearhead.analysis.by_length import Values, bucket_edges, first_values
from clearhead.analysis.comparison import compare
from clearhead.analysis.sections import LineChart, Reference, Section, Series
from clearhead.analysis.statistics import bootstrap_mean, bootstrap_ratio, decimal
from clearhead.data.store import TokenStore
from clearhead.evals.asking.losses import row_losses
from clearhead.evals.asking.texts import openings, utf8_size
from clearhead.evals.cells import LengthEvaluation, TextLength
from clearhead.evals.evaluation import EvaluationConfig, EvaluationResult
from clearhead.evals.subject import Subject
from clearhead.runs.results import RunResults

FEWEST_DOCUMENTS = 4
LONGEST = 4096
"""Tokens of a window of a model from elsewhere, unless the length is named: its own training may have had far more."""


class LossByPositionConfig(EvaluationConfig):
    """length: tokens of a window (default: twice the training length, of a model from elsewhere at most 4,096).

    buckets: points of the curve. bos: whether a bos token opens the window.
    texts: files, directories or corpora instead of the run's validation documents.
    """

    length: int | None = Field(default=None, ge=8)
    max_documents: int = Field(default=128, ge=1)
    buckets: int = Field(default=32, ge=2)
    bos: Literal["document", "none"] = "document"
    texts: list[str] | None = Field(default=None, min_length=1)
    batch_tokens: int = Field(default=8192, ge=1)
    seed: int = 0


class Curve(EvaluationResult):
    """A number for each point, with its interval."""

    mean: list[float]
    low: list[float]
    high: list[float]


class LossByPositionResult(EvaluationResult):
    """within, beyond: mean loss of each document inside and past the training length, None where nothing lies past."""

    length: int
    n: int
    positions: list[int]
    loss: Curve
    cumulative: Curve
    # Results of earlier versions have neither of these two.
    bits_per_byte: Curve | None = None
    bos: bool = True
    documents: list[str]
    within: list[float]
    beyond: list[float] | None


class LossByPosition(LengthEvaluation[LossByPositionConfig, LossByPositionResult]):
    name = "loss_by_position"
    Config = LossByPositionConfig
    Result = LossByPositionResult
    tells_overflow = True

    def length(self, subject: Subject, config: LossByPositionConfig) -> int:
        length = config.length or 2 * (subject.training_length or 256)
        return min(length, LONGEST) if config.length is None and subject.external else length

    def text(self, subject: Subject, config: LossByPositionConfig) -> TokenStore | None:
        return subject.texts(config.texts)

    def measure(
        self, subject: Subject, config: LossByPositionConfig, cell: TextLength
    ) -> LossByPositionResult:
        length = cell.tokens
        read = openings(
            subject,
            length,
            config.max_documents,
            config.seed,
            f"{self.name}.length",
            store=subject.texts(config.texts),
            bos=config.bos == "document",
            least=FEWEST_DOCUMENTS,
        )
        table = row_losses(subject, read.rows, config.batch_tokens)
        edges = bucket_edges(length - 1, config.buckets)
        cumulative = np.cumsum(table, axis=1) / np.arange(1, length)
        predicted = [read.predicted(i) for i in range(len(read.texts))]
        # A character that an edge cuts counts as the sign that stands for it.
        sizes = [np.array([utf8_size(subject.tokenizer, text[:b]) for text in predicted]) for b in edges[1:]]
        within = min(length, subject.training_length or length) - 1
        beyond = table[:, within:].mean(axis=1) if within < length - 1 else None
        return LossByPositionResult(
            length=length,
            n=len(read.rows),
            # A bucket is named by its last position: tokens of context its last prediction had.
            positions=[int(b) for b in edges[1:]],
            loss=_curve([table[:, a:b].mean(axis=1) for a, b in pairwise(edges)]),
            cumulative=_curve([cumulative[:, b - 1] for b in edges[1:]]),
            bits_per_byte=_ratios([table[:, :b].sum(axis=1) / math.log(2) for b in edges[1:]], sizes),
            bos=len(read.texts[0]) < length,
            documents=read.documents,
            within=[round(float(v), 5) for v in table[:, :within].mean(axis=1)],
            beyond=None if beyond is None else [round(float(v), 5) for v in beyond],
        )

    def section(self, run: RunResults) -> Section:
        title, question = "Loss by position", "Does it keep working past its training length?"
        values = self.results(run)
        if not values:
            return self.missing(run, title, question)
        first = first_values(values)
        trained = run.training_length
        charts = [
            _chart(values, "loss", lambda v: v.loss, "Loss by position", trained),
            _chart(values, "cumulative", lambda v: v.cumulative, "Cumulative average of the loss", trained),
        ]
        # Results of earlier versions have none.
        if all(v.bits_per_byte is not None for seeds in values.values() for v in seeds.values()):
            title_of, unit = "Cumulative bits per byte", "bits per byte"
            charts.append(_chart(values, "bits-per-byte", lambda v: v.bits_per_byte, title_of, trained, unit))
        part = "beyond" if first.beyond is not None else "within"
        samples = {
            arm: {s: v.within if v.beyond is None or part == "within" else v.beyond for s, v in seeds.items()}
            for arm, seeds in values.items()
        }
        result = compare(samples, "lower", digits=3)
        changes = []
        if part == "beyond":
            answer = result.sentence()
            measure = f"nats per token past {trained} tokens ↓"
            change = "; ".join(f"{arm} {decimal(_change(seeds), 3)}" for arm, seeds in values.items())
            changes = [f"Mean loss past the training length minus mean loss within it: {change}."]
        else:
            answer = f"Measured within the training length only. {result.sentence()}"
            measure = "nats per token ↓"
        opened = ", a bos token among them," if first.bos else ""
        notes = [
            f"The first {first.length} tokens{opened} of {first.n} documents in one pass, loss in nats per "
            "token. A point is the mean over a range of positions that ends there. Bands: bootstrap over documents, "
            "mean over seeds; differences are paired by document.",
            "The Differential Transformer paper shows the cumulative average on books of up to 64K tokens in a figure "
            "without numbers: DIFF V1 lies below the Transformer at every position.",
            *changes,
            *run.skipped(self.name),
        ]
        return Section(
            self.name,
            title,
            question,
            answer,
            measure=measure,
            digits=3,
            headlines=result.headlines(),
            charts=charts,
            notes=notes,
        )


def _curve(columns: list[NDArray[np.float64]]) -> Curve:
    """Mean over documents with its bootstrap interval, for each bucket."""
    bounds = [bootstrap_mean(column, resamples=500) for column in columns]
    return Curve(
        mean=[round(float(column.mean()), 5) for column in columns],
        low=[round(low, 5) for low, _ in bounds],
        high=[round(high, 5) for _, high in bounds],
    )


def _ratios(tops: list[NDArray[np.float64]], bottoms: list[NDArray[np.int64]]) -> Curve:
    """Σ top / Σ bottom over documents with its bootstrap interval, for each bucket."""
    # A first token may be no text at all.
    pairs = [(top, bottom.clip(min=1).astype(np.float64)) for top, bottom in zip(tops, bottoms, strict=True)]
    bounds = [bootstrap_ratio(top, bottom, resamples=500) for top, bottom in pairs]
    return Curve(
        mean=[round(float(top.sum() / bottom.sum()), 5) for top, bottom in pairs],
        low=[round(low, 5) for low, _ in bounds],
        high=[round(high, 5) for _, high in bounds],
    )


def _change(seeds: Mapping[int, LossByPositionResult]) -> float:
    """Mean loss beyond minus within the training length, over documents and seeds."""
    return float(
        np.mean([np.mean(v.beyond) - np.mean(v.within) for v in seeds.values() if v.beyond is not None])
    )


def _chart(
    values: Values[LossByPositionResult],
    slug: str,
    read: Callable[[LossByPositionResult], Curve | None],
    title: str,
    trained: int | None,
    y_label: str = "nats per token",
) -> LineChart:
    series = []
    for arm, seeds in values.items():
        positions = next(iter(seeds.values())).positions
        curves = [curve for v in seeds.values() if (curve := read(v)) is not None]
        mean, low, high = (
            np.mean(part, axis=0).tolist()
            for part in ([c.mean for c in curves], [c.low for c in curves], [c.high for c in curves])
        )
        series.append(Series(arm, positions, mean, low, high, arm))
    references = [] if trained is None else [Reference("training length", trained, "x")]
    return LineChart(
        slug=f"loss-by-position-{slug}",
        title=title,
        x_label="position in the context (tokens)",
        y_label=y_label,
        series=series,
        log_x=True,
        references=references,
    )

"""Loss by position in the context, and its cumulative average: does a longer context help, and does it stay usable?

One window of ``length`` tokens (bos and the start of a validation document) per document that is long enough. The
loss at position p is that of the token with p tokens before it. The cumulative average up to p,
``1/p Σ_{q <= p} NLL_q``, is the curve of the Differential Transformer paper's long-context figure. ``length`` may
exceed the training length.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from clearhead.evals.base import (
    Evaluation,
    EvaluationConfig,
    LineChart,
    Reference,
    RunResults,
    Section,
    Series,
    Subject,
    batches,
    inference,
    to_batch,
    token_losses,
)
from clearhead.evals.compare import compare
from clearhead.evals.language_modelling import choose
from clearhead.evals.statistics import bootstrap_mean, decimal

FEWEST_DOCUMENTS = 4


class LossByPositionConfig(EvaluationConfig):
    """length: tokens of a window (default: twice the training length). buckets: points of the curve."""

    length: int | None = Field(default=None, ge=8)
    max_documents: int = Field(default=128, ge=1)
    buckets: int = Field(default=32, ge=2)
    batch_tokens: int = Field(default=8192, ge=1)
    seed: int = 0


class LossByPosition(Evaluation[LossByPositionConfig]):
    name = "loss_by_position"
    Config = LossByPositionConfig

    def run(self, subject: Subject, config: LossByPositionConfig) -> dict[str, Any]:
        length = config.length or 2 * (subject.training_length or 256)
        if reason := subject.too_long(length):
            return {"skipped": reason}
        store = subject.data.validation
        bos = subject.tokenizer.bos_token_id
        head = np.array([] if bos is None else [bos], dtype=np.int64)
        long_enough = [i for i in range(len(store)) if len(store.document(i)) + len(head) >= length]
        if len(long_enough) < FEWEST_DOCUMENTS:
            return {
                "skipped": f"only {len(long_enough)} validation documents have {length} tokens, at least "
                f"{FEWEST_DOCUMENTS} are needed; lower evaluate.{self.name}.length"
            }
        chosen = [long_enough[k] for k in choose(len(long_enough), config.max_documents, config.seed)]
        rows = [
            np.concatenate([head, store.document(i)[: length - len(head)]]).astype(np.int64) for i in chosen
        ]
        losses = []
        with inference(subject.model):
            for span in batches(len(rows), config.batch_tokens // length):
                batch = to_batch([rows[i] for i in span], subject.device)
                losses.append(token_losses(subject.model, batch).double().cpu().numpy())
        table = np.concatenate(losses)
        edges = bucket_edges(length - 1, config.buckets)
        cumulative = np.cumsum(table, axis=1) / np.arange(1, length)
        means = [table[:, a:b].mean(axis=1) for a, b in pairwise(edges)]
        averages = [cumulative[:, b - 1] for b in edges[1:]]
        within = min(length, subject.training_length or length) - 1
        return {
            "length": length,
            "n": len(rows),
            # A bucket is named by its last position: tokens of context its last prediction had.
            "positions": [int(b) for b in edges[1:]],
            "loss": _curve(means),
            "cumulative": _curve(averages),
            "documents": [store.ids[i] for i in chosen],
            "within": [round(float(v), 5) for v in table[:, :within].mean(axis=1)],
            "beyond": [round(float(v), 5) for v in table[:, within:].mean(axis=1)]
            if within < length - 1
            else None,
        }

    def section(self, run: RunResults) -> Section:
        title, question = "Loss by position", "Does it keep working past its training length?"
        values = run.values(self.name)
        if not values:
            return self.missing(run, title, question)
        first = next(iter(next(iter(values.values())).values()))
        trained = run.training_length
        charts = [
            _chart(values, "loss", "Loss by position", trained),
            _chart(values, "cumulative", "Cumulative average of the loss", trained),
        ]
        part = "beyond" if first["beyond"] is not None else "within"
        samples = {arm: {s: v[part] for s, v in seeds.items()} for arm, seeds in values.items()}
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
        notes = [
            f"The first {first['length']} tokens of {first['n']} validation documents, loss in nats per token; a point "
            "is the mean over a range of positions that ends there. Bands: bootstrap over documents, mean over seeds.",
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


def bucket_edges(positions: int, buckets: int) -> list[int]:
    """Edges of at most ``buckets`` ranges over 0..positions, as even as possible in log position."""
    raw = np.geomspace(1, positions, min(buckets, positions)).round().astype(int)
    return [0, *sorted(set(raw.tolist()))]


def _curve(columns: list[NDArray[np.float64]]) -> dict[str, list[float]]:
    """Mean over documents with its bootstrap interval, for each bucket."""
    bounds = [bootstrap_mean(column, resamples=500) for column in columns]
    return {
        "mean": [round(float(column.mean()), 5) for column in columns],
        "low": [round(low, 5) for low, _ in bounds],
        "high": [round(high, 5) for _, high in bounds],
    }


def _change(seeds: dict[int, dict[str, Any]]) -> float:
    """Mean loss beyond minus within the training length, over documents and seeds."""
    return float(np.mean([np.mean(v["beyond"]) - np.mean(v["within"]) for v in seeds.values()]))


def _chart(
    values: dict[str, dict[int, dict[str, Any]]], key: str, title: str, trained: int | None
) -> LineChart:
    series = []
    for arm, seeds in values.items():
        positions = next(iter(seeds.values()))["positions"]
        mean, low, high = (
            np.mean([v[key][part] for v in seeds.values()], axis=0).tolist()
            for part in ("mean", "low", "high")
        )
        series.append(Series(arm, positions, mean, low, high, arm))
    references = [] if trained is None else [Reference("training length", trained, "x")]
    return LineChart(
        slug=f"loss-by-position-{key}",
        title=title,
        x_label="position in the context (tokens)",
        y_label="nats per token",
        series=series,
        log_x=True,
        references=references,
    )

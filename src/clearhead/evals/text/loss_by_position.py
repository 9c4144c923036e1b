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
from itertools import pairwise
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import Field

from clearhead.analysis.by_length import bucket_edges
from clearhead.analysis.comparison import compare
from clearhead.analysis.sections import LineChart, Reference, Section, Series
from clearhead.analysis.statistics import bootstrap_mean, bootstrap_ratio, decimal
from clearhead.evals.asking.losses import suffix_losses
from clearhead.evals.asking.running import batches, inference
from clearhead.evals.asking.texts import long_documents, utf8_size
from clearhead.evals.evaluation import Evaluation, EvaluationConfig
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


class LossByPosition(Evaluation[LossByPositionConfig]):
    name = "loss_by_position"
    Config = LossByPositionConfig
    tells_overflow = True

    def run(self, subject: Subject, config: LossByPositionConfig) -> dict[str, Any]:
        length = config.length or 2 * (subject.training_length or 256)
        if config.length is None and subject.external:
            length = min(length, LONGEST)
        if reason := subject.too_long(length):
            return {"skipped": reason}
        store = subject.texts(config.texts)
        bos = None if config.bos == "none" else subject.tokenizer.bos_token_id
        head = np.array([] if bos is None else [bos], dtype=np.int64)
        size = length - len(head)
        chosen, texts = long_documents(store, size, size, config.max_documents, config.seed)
        if len(texts) < FEWEST_DOCUMENTS:
            return {
                "skipped": f"only {len(texts)} documents have {length} tokens, at least "
                f"{FEWEST_DOCUMENTS} are needed; lower evaluate.{self.name}.length"
            }
        rows = np.stack([np.concatenate([head, text]) for text in texts])
        losses = []
        with inference(subject.model, length=length):
            for span in batches(len(rows), config.batch_tokens // length):
                ids = torch.from_numpy(rows[span.start : span.stop]).to(subject.device)
                losses.append(suffix_losses(subject.model, ids, 1).double().cpu().numpy())
        table = np.concatenate(losses)
        if not np.isfinite(table).all():
            return {"skipped": "the losses are not numbers"}
        edges = bucket_edges(length - 1, config.buckets)
        cumulative = np.cumsum(table, axis=1) / np.arange(1, length)
        means = [table[:, a:b].mean(axis=1) for a, b in pairwise(edges)]
        averages = [cumulative[:, b - 1] for b in edges[1:]]
        # A character that an edge cuts counts as the sign that stands for it.
        sizes = [
            np.array([utf8_size(subject.tokenizer, text[1 - len(head) :][:b]) for text in texts])
            for b in edges[1:]
        ]
        sums = [table[:, :b].sum(axis=1) / math.log(2) for b in edges[1:]]
        within = min(length, subject.training_length or length) - 1
        return {
            "length": length,
            "n": len(rows),
            # A bucket is named by its last position: tokens of context its last prediction had.
            "positions": [int(b) for b in edges[1:]],
            "loss": _curve(means),
            "cumulative": _curve(averages),
            "bits_per_byte": _ratios(sums, sizes),
            "bos": bos is not None,
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
        # Results of earlier versions have none.
        if all("bits_per_byte" in v for seeds in values.values() for v in seeds.values()):
            charts.append(
                _chart(values, "bits_per_byte", "Cumulative bits per byte", trained, "bits per byte")
            )
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
        opened = ", a bos token among them," if first.get("bos", True) else ""
        notes = [
            f"The first {first['length']} tokens{opened} of {first['n']} documents in one pass, loss in nats per "
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


def _curve(columns: list[NDArray[np.float64]]) -> dict[str, list[float]]:
    """Mean over documents with its bootstrap interval, for each bucket."""
    bounds = [bootstrap_mean(column, resamples=500) for column in columns]
    return {
        "mean": [round(float(column.mean()), 5) for column in columns],
        "low": [round(low, 5) for low, _ in bounds],
        "high": [round(high, 5) for _, high in bounds],
    }


def _ratios(tops: list[NDArray[np.float64]], bottoms: list[NDArray[np.int64]]) -> dict[str, list[float]]:
    """Σ top / Σ bottom over documents with its bootstrap interval, for each bucket."""
    # A first token may be no text at all.
    pairs = [(top, bottom.clip(min=1).astype(np.float64)) for top, bottom in zip(tops, bottoms, strict=True)]
    bounds = [bootstrap_ratio(top, bottom, resamples=500) for top, bottom in pairs]
    return {
        "mean": [round(float(top.sum() / bottom.sum()), 5) for top, bottom in pairs],
        "low": [round(low, 5) for low, _ in bounds],
        "high": [round(high, 5) for _, high in bounds],
    }


def _change(seeds: dict[int, dict[str, Any]]) -> float:
    """Mean loss beyond minus within the training length, over documents and seeds."""
    return float(np.mean([np.mean(v["beyond"]) - np.mean(v["within"]) for v in seeds.values()]))


def _chart(
    values: dict[str, dict[int, dict[str, Any]]],
    key: str,
    title: str,
    trained: int | None,
    y_label: str = "nats per token",
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
        slug=f"loss-by-position-{key.replace('_', '-')}",
        title=title,
        x_label="position in the context (tokens)",
        y_label=y_label,
        series=series,
        log_x=True,
        references=references,
    )

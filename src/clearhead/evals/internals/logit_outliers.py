"""Attention logits far past the training length: where do they leave the range that training knew?

The CoCA paper's earlier version (arXiv 2309.08646) looks at one text of about four training lengths: a rotary
Transformer has a few logits 10 to 20 times the others, without NTK its last layer scores the nearest tokens close to 0,
with NTK far too high. Its reduction is not stated; here it is this: for each chosen layer the scaled logits q · k / √d
of the last `queries` tokens of a text against all keys that they see, before the softmax, pooled over heads, both
streams of a differential layer and documents. They are shown by distance (how far the key lies behind the query;
of neighbouring queries these are the keys that correspond), with and without dynamic NTK. Numbers of a document:

* `outlier`: max |logit| beyond the training length / mean |logit| within it;
* `near`: (mean logit of the nearest 16 keys − mean of the rest) / standard deviation of the rest: near-token failure
  is a value around 0 or below, where a model within its training length has a clearly positive one;
* mean and largest |logit| within and beyond.

ALiBi's slopes are part of a logit. Memory grows with the length of the text, not with its square: one head's logits of
the last queries at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import Field
from torch import Tensor

from clearhead.analysis.by_length import Values, bucket_edges, first_values, left_out, times
from clearhead.analysis.comparison import compare
from clearhead.analysis.sections import LineChart, Reference, Section, SectionTable, Series
from clearhead.analysis.statistics import ratio
from clearhead.evals.asking.running import inference
from clearhead.evals.asking.texts import Openings, openings
from clearhead.evals.cells import Cell, CellEvaluation, Measured
from clearhead.evals.evaluation import EvaluationConfig, EvaluationResult
from clearhead.evals.probing.recorder import Recorded, recorded
from clearhead.evals.probing.rescaling import rescaled
from clearhead.evals.probing.windows import windows
from clearhead.evals.reasons import Unmeasured, unless
from clearhead.evals.subject import Subject
from clearhead.runs.results import RunResults

NEAR = 16
"""Keys, the query's own among them, that count as near."""
NUMBERS: dict[str, Callable[[LayerLogits], list[float]]] = {
    "outlier": lambda one: one.outlier,
    "near": lambda one: one.near,
    "mean_within": lambda one: one.mean_within,
    "max_within": lambda one: one.max_within,
    "mean_beyond": lambda one: one.mean_beyond,
    "max_beyond": lambda one: one.max_beyond,
}
Scaling = dict[str, Any]


class LogitOutliersConfig(EvaluationConfig):
    """length: tokens of a text (default: four training lengths). queries: the last so many of them.

    layers: counted from 0 (default: at a quarter, half, three quarters and the end of the stack, as in the paper).
    scalings: `rope_parameters` to look under besides the model as it is; one it cannot take is left out.
    """

    length: int | None = Field(default=None, ge=32)
    queries: int = Field(default=64, ge=1)
    layers: list[int] | None = Field(default=None, min_length=1)
    scalings: list[Scaling] = Field(default=[{"rope_type": "dynamic", "factor": 4.0}])
    documents: int = Field(default=8, ge=1)
    buckets: int = Field(default=40, ge=2)
    seed: int = 0


class LayerLogits(EvaluationResult):
    """One layer: logits by distance, and the numbers of each document."""

    layer: int
    distance: list[int]
    mean: list[float]
    largest: list[float]
    outlier: list[float]
    near: list[float]
    mean_within: list[float]
    max_within: list[float]
    mean_beyond: list[float]
    max_beyond: list[float]


class ScaledLogits(EvaluationResult):
    scaling: str
    layers: list[LayerLogits]


class LogitOutliersResult(EvaluationResult):
    length: int
    queries: int
    training_length: int
    n: int
    documents: list[str]
    scalings: list[ScaledLogits]
    skipped_cells: dict[str, str] = Field(default={})


@dataclass(frozen=True, kw_only=True)
class LogitReading(Cell):
    """The same texts under one rotary scaling, looked at in some layers."""

    scaling: Scaling | None
    read: Openings
    layers: list[int]
    trained: int


class LogitOutliers(CellEvaluation[LogitOutliersConfig, LogitOutliersResult, LogitReading, ScaledLogits]):
    name = "logit_outliers"
    Config = LogitOutliersConfig
    Result = LogitOutliersResult
    Value = ScaledLogits

    def cells(self, subject: Subject, config: LogitOutliersConfig) -> list[LogitReading]:
        trained = subject.training_length or 256
        length = config.length or 4 * trained
        unless(subject.too_long(length))
        if length - config.queries <= trained:
            raise Unmeasured(
                f"the last {config.queries} of {length} tokens do not lie beyond the training length "
                f"{trained}; raise evaluate.{self.name}.length"
            )
        read = openings(subject, length, config.documents, config.seed, f"{self.name}.length")
        count = int(subject.model.config.get_text_config().num_hidden_layers)
        if unknown := [layer for layer in config.layers or () if not 0 <= layer < count]:
            raise ValueError(
                f"logit_outliers.layers: the model has layers 0 to {count - 1}, not {unknown[0]}"
            )
        seen = [None if window is None or window >= length else window for window in windows(subject.model)]
        layers = far_layers(seen, config.layers)
        return [
            LogitReading(name=named(scaling), scaling=scaling, read=read, layers=layers, trained=trained)
            for scaling in (None, *config.scalings)
        ]

    def measure(self, subject: Subject, config: LogitOutliersConfig, cell: LogitReading) -> ScaledLogits:
        length = cell.read.rows.shape[1]
        tallies = {
            layer: LogitTally(length, config.queries, cell.trained, config.buckets) for layer in cell.layers
        }

        def record(streams: Recorded) -> None:
            if streams.layer in tallies:
                tallies[streams.layer].add(streams)

        trained = subject.training_length
        with (
            inference(subject.model),
            rescaled(subject.model, cell.scaling, trained=trained, length=length),
            recorded(subject.model, record),
        ):
            for row in cell.read.rows:
                ids = torch.from_numpy(row)[None].to(subject.device)
                subject.model.base_model(input_ids=ids, use_cache=False)
        return ScaledLogits(scaling=cell.name, layers=[tallies[layer].result(layer) for layer in cell.layers])

    def gather(
        self, subject: Subject, config: LogitOutliersConfig, measured: Measured[LogitReading, ScaledLogits]
    ) -> LogitOutliersResult:
        one = measured.pairs[0][0]
        return LogitOutliersResult(
            length=one.read.rows.shape[1],
            queries=config.queries,
            training_length=one.trained,
            n=len(one.read.rows),
            documents=one.read.documents,
            scalings=measured.values,
            skipped_cells=measured.skipped,
        )

    def section(self, run: RunResults) -> Section:
        title, question = (
            "Attention logits past training",
            "Do attention logits stay in the range of training?",
        )
        values = self.results(run)
        if not values:
            return self.missing(run, title, question)
        first = first_values(values)
        samples = {
            arm: {s: mean_over_layers(v.scalings[0], lambda one: one.outlier) for s, v in seeds.items()}
            for arm, seeds in values.items()
        }
        result = compare(samples, "lower", digits=1)
        where = times(first.length, first.training_length)
        return Section(
            self.name,
            title,
            question,
            f"Largest logit beyond the training length over the mean within it, {first.scalings[0].scaling}, "
            f"in {where}: {result.sentence()}",
            measure="logit outliers past training ↓",
            digits=1,
            headlines=result.headlines(),
            charts=_charts(values),
            tables=[_table(values)],
            notes=[
                f"Scaled logits of the last {first.queries} tokens of {first.n} documents, pooled over heads and "
                f"streams, before the softmax. 'near': mean logit of the nearest {NEAR} keys less that of the rest, in "
                "standard deviations of the rest; 0 is a query that cannot tell near from far. Intervals: bootstrap "
                "over documents or Student's t over seeds, the wider; differences are paired by document.",
                *left_out(values),
                *run.skipped(self.name),
            ],
        )


def named(scaling: Mapping[str, Any] | None) -> str:
    """`dynamic, factor 4`."""
    if scaling is None:
        return "as trained"
    factor = scaling.get("factor")
    return str(scaling.get("rope_type", "default")) + ("" if factor is None else f", factor {factor:g}")


class LogitTally:
    """One layer's logits, added up by distance, and the numbers of each document."""

    def __init__(self, length: int, queries: int, trained: int, buckets: int) -> None:
        self.queries = min(queries, length)
        self.trained = trained
        positions = torch.arange(length - self.queries, length)[:, None]
        self.distance = positions - torch.arange(length)[None]
        # Bucket i holds the distances edges[i] <= d < edges[i + 1]: even ranges of the logarithm.
        edges = torch.tensor(bucket_edges(length, buckets))
        self.names = edges[1:].tolist()
        self.bucket = torch.bucketize(self.distance.clamp(min=0), edges[1:], right=True)
        self.sums = torch.zeros(len(self.names), dtype=torch.float64)
        self.counts = torch.zeros_like(self.sums)
        self.largest = torch.zeros_like(self.sums)
        self.numbers: dict[str, list[float]] = {name: [] for name in NUMBERS}

    def add(self, streams: Recorded) -> None:
        """One document (a batch of 1)."""
        # Per region: number, sum, sum of squares, sum of |.|, largest |.|.
        totals = {part: torch.zeros(5, dtype=torch.float64) for part in ("near", "rest", "within", "beyond")}
        seen = self.distance >= 0
        parts = {
            "near": seen & (self.distance < NEAR),
            "rest": self.distance >= NEAR,
            "within": seen & (self.distance < self.trained),
            "beyond": self.distance >= self.trained,
        }
        for logits in one_head_at_a_time(streams, self.queries, self.distance):
            for part, inside in parts.items():
                some = logits[inside].double()
                size = some.abs()
                more = torch.stack(
                    [torch.tensor(float(some.numel())), some.sum(), some.square().sum(), size.sum()]
                )
                totals[part][:4] += more
                totals[part][4] = max(totals[part][4], size.max())
            places, flat = self.bucket[seen], logits[seen].double()
            self.sums.index_add_(0, places, flat)
            self.counts.index_add_(0, places, torch.ones_like(flat))
            self.largest.scatter_reduce_(0, places, flat.abs(), "amax")
        mean = {part: float(total[1] / total[0]) for part, total in totals.items()}
        size_of = {part: float(total[3] / total[0]) for part, total in totals.items()}
        spread = float((totals["rest"][2] / totals["rest"][0] - mean["rest"] ** 2).clamp(min=0).sqrt())
        made = {
            "outlier": float(totals["beyond"][4]) / max(size_of["within"], 1e-12),
            "near": (mean["near"] - mean["rest"]) / max(spread, 1e-12),
            "mean_within": size_of["within"],
            "max_within": float(totals["within"][4]),
            "mean_beyond": size_of["beyond"],
            "max_beyond": float(totals["beyond"][4]),
        }
        for name, value in made.items():
            self.numbers[name].append(round(value, 6))

    def result(self, layer: int) -> LayerLogits:
        """A bucket is named by its end, so the query's own key is in "1"; empty ones are left out."""
        kept = [i for i, count in enumerate(self.counts.tolist()) if count]
        return LayerLogits(
            layer=layer,
            distance=[self.names[i] for i in kept],
            mean=[round(float(self.sums[i] / self.counts[i]), 6) for i in kept],
            largest=[round(float(self.largest[i]), 6) for i in kept],
            **self.numbers,
        )


def one_head_at_a_time(streams: Recorded, queries: int, distance: Tensor) -> Any:
    """(queries, S) logits of the last queries, of each stream and head in turn, in float32 or wider, on the CPU."""
    for q, k in zip(streams.q, streams.k, strict=True):
        heads, groups = q.shape[1], k.shape[1]
        for head in range(heads):
            last, keys = q[0, head, -queries:], k[0, head // (heads // groups)]
            wide = torch.float64 if last.dtype == torch.float64 else torch.float32
            logits = (last.to(wide) @ keys.to(wide).T * streams.scale).cpu()
            if streams.slopes is not None:
                logits = logits - streams.slopes[head].cpu() * distance
            yield logits


def far_layers(seen: Sequence[int | None], named: Sequence[int] | None) -> list[int]:
    """The layers to look at: those named, or some at even steps; a layer with a window takes no logits beyond it.

    Raises ValueError for a named layer with a window, Unmeasured where every layer has one.
    """
    if narrow := [layer for layer in named or () if seen[layer] is not None]:
        raise ValueError(
            f"logit_outliers.layers: layer {narrow[0]} sees {seen[narrow[0]]} tokens, so it takes no logits beyond "
            "the training length; name layers that see all tokens"
        )
    if named:
        return list(named)
    wide = [layer for layer, window in enumerate(seen) if window is None]
    if not wide:
        raise Unmeasured(
            "every layer sees a window of the tokens, so none takes logits beyond the training length"
        )
    return sorted({wide[max(0, round(len(wide) * part / 4) - 1)] for part in (1, 2, 3, 4)})


def mean_over_layers(
    found: ScaledLogits, number: Callable[[LayerLogits], list[float]]
) -> NDArray[np.float64]:
    """One number of each document, mean over layers."""
    return np.mean([number(one) for one in found.layers], axis=0)  # type: ignore[no-any-return]


KINDS: tuple[tuple[str, str, Callable[[LayerLogits], list[float]]], ...] = (
    ("mean", "mean logit", lambda layer: layer.mean),
    ("largest", "largest |logit|", lambda layer: layer.largest),
)


def _charts(values: Values[LogitOutliersResult]) -> list[LineChart]:
    """Mean logit by distance in the last layer, one chart a scaling."""
    first = first_values(values)
    charts = []
    for index, scaling in enumerate(one.scaling for one in first.scalings):
        for kind, label, read in KINDS:
            series = []
            for arm, seeds in values.items():
                layers = [
                    one.layers[-1] for v in seeds.values() for one in v.scalings if one.scaling == scaling
                ]
                if layers:
                    y = np.mean([read(layer) for layer in layers], axis=0).tolist()
                    series.append(Series(arm, layers[0].distance, y, arm=arm))
            layer = first.scalings[index].layers[-1].layer
            charts.append(
                LineChart(
                    f"logits-{index}-{kind}", f"{label[0].upper()}{label[1:]} by distance, {scaling}",
                    "distance behind the query (tokens)", label, series, f"Layer {layer}, mean over seeds.", log_x=True,
                    references=[Reference("training length", first.training_length, "x")],
                )
            )  # fmt: skip
    return charts


def _table(values: Values[LogitOutliersResult]) -> SectionTable:
    rows: list[list[str | None]] = []
    for arm, seeds in values.items():
        for index, scaling in enumerate(one.scaling for one in next(iter(seeds.values())).scalings):
            found = [v.scalings[index] for v in seeds.values() if len(v.scalings) > index]
            for place, layer in enumerate(one.layer for one in found[0].layers):
                row: list[str | None] = [f"{arm}, {scaling}, layer {layer}"]
                for read in NUMBERS.values():
                    numbers = [read(one.layers[place]) for one in found]
                    estimate = ratio(numbers, np.ones(len(numbers[0])))
                    row.append(f"{estimate.value:.2f} ({estimate.interval()})")
                rows.append(row)
    headers = [
        "arm, scaling and layer",
        "outlier",
        "near",
        "mean within",
        "max within",
        "mean beyond",
        "max beyond",
    ]
    return SectionTable("Logits within and beyond the training length", headers, rows)

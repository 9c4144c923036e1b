"""The initial angle between queries and keys: how far from collinear is a trained model?

The logit of a rotary head is Σ_j |q_j||k_j| cos(Θ_j + (m − n) θ_j). Θ_j, the *initial angle* from k_j to q_j before any
rotation, decides how it begins to change with distance: in a causal model an angle in (π, 2π) makes it rise over the
nearest tokens, which the CoCA paper (arXiv 2309.08646, section 2.2, case d) calls the anomaly. Measured here: Θ_j of
queries and keys at the same position, weighted by |q_j||k_j|, over all pairs and heads of a layer;

* plain attention: the histogram of Θ, the share of the anomaly (1/2 for random vectors) and the *collinearity*, the
  weighted mean of cos Θ: 1 if all angles are 0, 0 for random vectors;
* collinear attention in its slack form: per pair the relative part of its logit is
  ½ t_j |q_j|² (cos Δ + cos(Δ − 2φ_j)) with φ_j = π/4 − arg q_j, which counts modulo π: the histogram is of 2φ, weighted
  by t_j |q_j|², and the collinearity the weighted mean of cos 2φ. A slack model that has learned to be collinear has 1;
* exact and strict: Θ = 0 by construction, collinearity 1; nothing to measure but the keys.

For collinear models also how many t_j are exactly 0, and how many keys have no other: to those every query is blind,
and no gradient reaches them (ReLU; softplus has none).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import Field
from torch import Tensor

from clearhead.analysis.by_length import Values, first_values
from clearhead.analysis.comparison import compare
from clearhead.analysis.sections import LineChart, Section, SectionTable, Series
from clearhead.analysis.statistics import ratio
from clearhead.core.streams import repeat_kv
from clearhead.evals.asking.running import inference
from clearhead.evals.asking.texts import openings
from clearhead.evals.cells import LengthEvaluation, TextLength
from clearhead.evals.evaluation import EvaluationConfig, EvaluationResult
from clearhead.evals.probing.recorder import Recorded, recorded
from clearhead.evals.reasons import Unmeasured
from clearhead.evals.subject import Subject
from clearhead.runs.results import RunResults


class InitialAnglesConfig(EvaluationConfig):
    """length: tokens of a text (default: the training length). positions: how many of them count, evenly spaced."""

    length: int | None = Field(default=None, ge=8)
    documents: int = Field(default=16, ge=1)
    positions: int = Field(default=128, ge=1)
    bins: int = Field(default=36, ge=4)
    seed: int = 0


@dataclass
class AngleTally:
    """What one layer adds up to over documents. kind: of angle, "Θ", "2φ" or "0" (by construction)."""

    kind: str
    histogram: NDArray[np.float64]
    cosine: list[float] = field(default_factory=list)
    anomaly: list[float] = field(default_factory=list)
    zeros: list[float] = field(default_factory=list)
    dead: list[float] = field(default_factory=list)

    def result(self, layer: int) -> LayerAngles:
        shares = self.histogram / (self.histogram.sum() or 1.0)
        return LayerAngles(
            layer=layer,
            kind=self.kind,
            histogram=[round(float(share), 6) for share in shares],
            cosine=self.cosine,
            anomaly=self.anomaly,
            zeros=self.zeros,
            dead=self.dead,
        )


class LayerAngles(EvaluationResult):
    """cosine, anomaly, zeros, dead: one number a document; the last two of collinear layers alone."""

    layer: int
    kind: str
    histogram: list[float]
    cosine: list[float]
    anomaly: list[float]
    zeros: list[float]
    dead: list[float]


class InitialAnglesResult(EvaluationResult):
    length: int
    n: int
    documents: list[str]
    layers: list[LayerAngles]


class InitialAngles(LengthEvaluation[InitialAnglesConfig, InitialAnglesResult]):
    name = "initial_angles"
    Config = InitialAnglesConfig
    Result = InitialAnglesResult

    def length(self, subject: Subject, config: InitialAnglesConfig) -> int:
        return config.length or subject.training_length or 256

    def measure(self, subject: Subject, config: InitialAnglesConfig, cell: TextLength) -> InitialAnglesResult:
        length = cell.tokens
        read = openings(subject, length, config.documents, config.seed, f"{self.name}.length")
        at = torch.linspace(0, length - 1, min(config.positions, length)).round().long()
        layers: dict[int, AngleTally] = {}

        def record(streams: Recorded) -> None:
            if streams.pairs is not None:
                tally(layers, streams, at, config.bins)

        with inference(subject.model, length=length), recorded(subject.model, record):
            for row in read.rows:
                ids = torch.from_numpy(row)[None].to(subject.device)
                subject.model.base_model(input_ids=ids, use_cache=False)
        if not layers:
            raise Unmeasured("no rotary position embedding for all layers, so there is no initial angle")
        return InitialAnglesResult(
            length=length,
            n=len(read.rows),
            documents=read.documents,
            layers=[found.result(layer) for layer, found in sorted(layers.items())],
        )

    def section(self, run: RunResults) -> Section:
        title, question = "Initial angles", "How far from collinear are queries and keys?"
        values = self.results(run)
        if not values:
            return self.missing(run, title, question)
        first = first_values(values)
        samples = {
            arm: {s: np.mean([one.cosine for one in v.layers], axis=0) for s, v in seeds.items()}
            for arm, seeds in values.items()
        }
        result = compare(samples, "higher")
        best = ", ".join(f"{arm} {estimate.value:.2f}" for arm, estimate in result.estimates.items())
        return Section(
            self.name,
            title,
            question,
            f"Collinearity (1: all initial angles are 0; 0: random), mean over layers: {best}. "
            f"{neutral(result.sentence())}",
            measure="collinearity",
            headlines=[replace(one, verdict=neutral(one.verdict)) for one in result.headlines()],
            charts=_charts(values),
            tables=[_table(values)],
            notes=[
                f"{first.n} documents of {first.length} tokens; angles weighted by what they weigh in the logit. "
                "Chance, for random vectors: collinearity 0, anomaly 0.50. Intervals: bootstrap over documents or "
                "Student's t over seeds, the wider; differences are paired by document.",
                *run.skipped(self.name),
            ],
        )


def tally(layers: dict[int, AngleTally], streams: Recorded, at: Tensor, bins: int) -> None:
    """Add one document's angles of one layer, both streams of a differential head together."""
    kind, angles, weights = measured(streams, at)
    found = layers.setdefault(streams.layer, AngleTally(kind, np.zeros(bins)))
    total = float(weights.sum()) or 1.0
    found.histogram += torch.histogram(
        angles.cpu(), bins, range=(0.0, 2 * math.pi), weight=weights.cpu()
    ).hist.numpy()
    found.cosine.append(round(float((weights * angles.cos()).sum()) / total, 6))
    found.anomaly.append(round(float(weights[angles > math.pi].sum()) / total, 6))
    if streams.placement is not None:
        assert streams.before is not None
        t = torch.stack([strengths(streams, key) for key in streams.before.k])
        found.zeros.append(round(float((t == 0).double().mean()), 6))
        found.dead.append(round(float((t == 0).all(dim=-1).double().mean()), 6))


def measured(streams: Recorded, at: Tensor) -> tuple[str, Tensor, Tensor]:
    """(kind, angles in [0, 2π), weights), flat and in float64, at the positions `at`."""
    assert streams.pairs is not None
    angles, weights = [], []
    placement = streams.placement
    # A common rotation of a query and a key at one position changes no angle between them: placed ones will do.
    queries, keys = streams.q, streams.k
    if placement is not None:
        assert streams.before is not None
        queries = streams.before.q
        keys = streams.before.k * (len(queries) // len(streams.before.k))
    for q, k in zip(queries, keys, strict=True):
        heads = q.shape[1]
        x, y = (part[:, :, at].double() for part in streams.pairs(q))
        if placement is None:
            a, b = (repeat_kv(part[:, :, at].double(), heads) for part in streams.pairs(k))
            angles.append(torch.atan2(y, x) - torch.atan2(b, a))
            weights.append(torch.hypot(x, y) * torch.hypot(a, b))
            continue
        t = repeat_kv(strengths(streams, k)[:, :, at], heads)
        slack = placement.mode == "slack"
        angles.append(2 * (math.pi / 4 - torch.atan2(y, x)) if slack else torch.zeros_like(x))
        weights.append(t * (x.square() + y.square()))
    kind = "Θ" if placement is None else "2φ" if placement.mode == "slack" else "0"
    # Just below a full turn is no angle of its own: rounding put it there.
    flat = torch.cat([angle.flatten() for angle in angles]).remainder(2 * math.pi)
    return kind, flat.where(flat < 2 * math.pi, 0.0), torch.cat([weight.flatten() for weight in weights])


def strengths(streams: Recorded, k: Tensor) -> Tensor:
    """t (B, G, N, D/2) of a key projection in float64."""
    assert streams.pairs is not None and streams.placement is not None
    first, second = streams.pairs(k)
    return streams.placement.strength(first.double(), second.double())


def neutral(sentence: str) -> str:
    """A comparison in words that do not say that collinear is better."""
    for word, instead in (
        ("is better than", "is closer to collinear than"),
        ("is worse than", "is further from collinear than"),
        ("better by", "closer by"),
        ("worse by", "further by"),
    ):
        sentence = sentence.replace(word, instead)
    return sentence


def _charts(values: Values[InitialAnglesResult]) -> list[LineChart]:
    """The histogram over all layers, one line an arm; angles that are 0 by construction would dwarf the others."""
    series = []
    for arm, seeds in values.items():
        if all(one.kind == "0" for one in first_of(seeds).layers):
            continue
        tables = [np.array([one.histogram for one in v.layers]) for v in seeds.values()]
        mean = np.mean([table.mean(axis=0) for table in tables], axis=0)
        centres = (np.arange(len(mean)) + 0.5) * 360 / len(mean)
        series.append(Series(arm, centres.tolist(), mean.tolist(), arm=arm))
    chart = LineChart(
        "initial-angles", "Initial angles, all layers", "angle from key to query (degrees)", "share of the weight",
        series,
        "2φ for slack collinear attention; arms with angle 0 by construction are not drawn. A flat line is what random "
        "vectors give; beyond 180° lies the anomaly.",
    )  # fmt: skip
    return [chart] if series else []


def _table(values: Values[InitialAnglesResult]) -> SectionTable:
    rows: list[list[str | None]] = []
    for arm, seeds in values.items():
        for index, one in enumerate(first_of(seeds).layers):
            cells = [v.layers[index] for v in seeds.values()]
            numbers = (
                [cell.cosine for cell in cells],
                [cell.anomaly for cell in cells],
                [cell.zeros for cell in cells],
                [cell.dead for cell in cells],
            )
            shown = [_mean(rows_of) for rows_of in numbers]
            rows.append([f"{arm}, layer {one.layer}", one.kind, *shown])
    headers = ["arm and layer", "angle", "collinearity", "anomaly", "t = 0", "keys with all t = 0"]
    return SectionTable("By layer", headers, rows, "Angle 0: by construction, not measured.")


def first_of(seeds: Mapping[int, InitialAnglesResult]) -> InitialAnglesResult:
    """The values of the first seed."""
    return next(iter(seeds.values()))


def _mean(by_seed: list[list[float]]) -> str | None:
    rows = [row for row in by_seed if row]
    if not rows:
        return None
    found = ratio(rows, np.ones(len(rows[0])))
    return f"{found.value:.3f} ({found.interval(3)})"

"""The four cases of the CoCA paper, counted in a trained model: does a score rise with distance near the token?

A rotary pair j adds |q_j||k_j| cos(Θ_j + (m − n) θ_j) to the score of query m and key n, where Θ_j in [0, 2π) is the
angle from k_j to q_j before any rotation (arXiv 2309.08646, section 2.2). Moving the key away from the token makes it

    (a) rise for later keys (m < n) with Θ_j ≤ π       (b) fall for earlier keys (m > n) with Θ_j ≤ π
    (c) fall for later keys with Θ_j > π               (d) rise for earlier keys with Θ_j > π

until the angle comes to 0 or π; (a) and (d) are the anomalous ones, and a causal model has (b) and (d) alone. The same
two vectors looked at from both sides always rise to one of them, unless Θ_j = 0: collinear attention, whose angles are
0 by construction, has neither case.

Measured on queries and keys of a text that stand at most `near` tokens apart:
* the weight |q_j||k_j| of pairs in each of the four cases, and the anomalous share (a) + (d), 1/2 for random vectors;
* how often the *whole score* Σ_j rises when the same key is moved one token further away: what the attention feels, as
  the paper's argument is about one pair. This is the headline.

Both streams of a differential head count. Layers without rotary pairs have no such cases; slack collinear attention has
no score that depends on the distance alone.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from clearhead.analysis.by_length import Values, first_values
from clearhead.analysis.comparison import compare
from clearhead.analysis.sections import LineChart, Section, SectionTable, Series
from clearhead.core.streams import repeat_kv
from clearhead.evals.asking.running import inference
from clearhead.evals.asking.texts import openings
from clearhead.evals.cells import LengthEvaluation, TextLength
from clearhead.evals.evaluation import EvaluationConfig, EvaluationResult
from clearhead.evals.probing.recorder import Recorded, recorded
from clearhead.evals.probing.windows import windows
from clearhead.evals.reasons import Unmeasured
from clearhead.evals.subject import Subject
from clearhead.runs.results import RunResults

CASES = ("a", "b", "c", "d")


class AnomalousCasesConfig(EvaluationConfig):
    """length: tokens of a text (default: the training length). near: the largest distance. positions: of queries."""

    length: int | None = Field(default=None, ge=8)
    documents: int = Field(default=16, ge=1)
    positions: int = Field(default=32, ge=1)
    near: int = Field(default=16, ge=1)
    seed: int = 0


class LayerCases(EvaluationResult):
    """shares: of the weight in the cases a, b, c, d, by document. rises: how often a score rises, by document.

    by_distance: how often a score rises from distance d to d + 1, for d = 1, 2, ..., over all documents.
    """

    layer: int
    shares: list[list[float]]
    rises: list[float]
    by_distance: list[float]


class AnomalousCasesResult(EvaluationResult):
    length: int
    near: int
    sides: int
    n: int
    documents: list[str]
    layers: list[LayerCases]


@dataclass
class CaseTally:
    """What one layer adds up to over documents."""

    shares: list[list[float]] = field(default_factory=list)
    rises: list[float] = field(default_factory=list)
    by_distance: list[list[float]] = field(default_factory=list)

    def result(self, layer: int) -> LayerCases:
        return LayerCases(
            layer=layer,
            shares=self.shares,
            rises=self.rises,
            by_distance=[round(float(share), 6) for share in np.mean(self.by_distance, axis=0)],
        )


class AnomalousCases(LengthEvaluation[AnomalousCasesConfig, AnomalousCasesResult]):
    name = "anomalous_cases"
    tasks = ("causal", "masked", "classify")
    Config = AnomalousCasesConfig
    Result = AnomalousCasesResult

    def length(self, subject: Subject, config: AnomalousCasesConfig) -> int:
        return config.length or subject.training_length or 256

    def measure(
        self, subject: Subject, config: AnomalousCasesConfig, cell: TextLength
    ) -> AnomalousCasesResult:
        length, both = cell.tokens, subject.task != "causal"
        read = openings(subject, length, config.documents, config.seed, f"{self.name}.length")
        near = min(config.near, (length - 1) // 2)
        at = torch.linspace(near, length - 1 - near, min(config.positions, length - 2 * near)).round().long()
        layers: dict[int, CaseTally] = {}
        wide = [window is None or window > near + 1 for window in windows(subject.model)]
        if not any(wide):
            raise Unmeasured(
                f"no layer sees {near + 2} tokens, as scores of keys up to {near} tokens away need"
            )

        def record(streams: Recorded) -> None:
            # Of what a layer does not see it takes no score.
            if streams.pairs is None or not wide[streams.layer]:
                return
            if streams.placement is not None and streams.placement.mode == "slack":
                raise Unmeasured("slack collinear attention has no score that depends on the distance alone")
            tally(layers.setdefault(streams.layer, CaseTally()), streams, at, near, both)

        with inference(subject.model, length=length), recorded(subject.model, record):
            for row in read.rows:
                ids = torch.from_numpy(row)[None].to(subject.device)
                subject.model.base_model(input_ids=ids)
        if not layers:
            raise Unmeasured("no layer turns queries and keys by their positions, so there are no cases")
        return AnomalousCasesResult(
            length=length,
            near=near,
            sides=2 if both else 1,
            n=len(read.rows),
            documents=read.documents,
            layers=[found.result(layer) for layer, found in sorted(layers.items())],
        )

    def section(self, run: RunResults) -> Section:
        title, question = "Scores near the token", "How often does a score rise with distance near the token?"
        values = self.results(run)
        if not values:
            return self.missing(run, title, question)
        first = first_values(values)
        samples = {
            arm: {s: np.mean([one.rises for one in v.layers], axis=0) for s, v in seeds.items()}
            for arm, seeds in values.items()
        }
        result = compare(samples, "lower", shares=True, digits=3)
        sides = "to either side" if first.sides == 2 else "before it"
        return Section(
            self.name,
            title,
            question,
            result.sentence(),
            measure="scores that rise with distance ↓",
            digits=3,
            headlines=result.headlines(),
            charts=[_chart(values)],
            tables=[_table(values)],
            notes=[
                f"{first.n} documents of {first.length} tokens, keys up to {first.near} tokens {sides}; a key is "
                "moved one token further away and the score compared. (a) and (d) are the anomalous cases of the CoCA "
                "paper, shares of the weight |q||k| of rotary pairs; random vectors give 1/2 for their sum and for "
                "rising scores. Layers whose window has no room for that are left out. "
                "Intervals: bootstrap over documents or Student's t over seeds, the wider.",
                *run.skipped(self.name),
            ],
        )


def tally(found: CaseTally, streams: Recorded, at: Tensor, near: int, both: bool) -> None:
    """Add one document's cases of one layer, all streams together."""
    assert streams.pairs is not None
    angles = turns(streams)
    distances = torch.arange(1, near + 1)
    offsets = torch.cat([-distances, distances]) if both else -distances
    weights, rises = torch.zeros(4, dtype=torch.float64), []
    keys = streams.k * (len(streams.q) // len(streams.k))
    for q, k in zip(streams.q, keys, strict=True):
        x, y = (part[0][:, at].double().cpu() for part in streams.pairs(q))
        near_keys = at[:, None] + offsets
        a, b = (repeat_kv(part, q.shape[1])[0][:, near_keys].double().cpu() for part in streams.pairs(k))
        # Angle from the key to the query at their places: Θ + (m − n) θ, with m − n = −offset.
        apart = torch.atan2(y, x)[:, :, None] - torch.atan2(b, a)
        weight = torch.hypot(x, y)[:, :, None] * torch.hypot(a, b)
        away = -offsets.sign()[:, None] * angles
        rises.append((weight * ((apart + away).cos() - apart.cos())).sum(-1) > 0)
        if streams.placement is None:
            theta = (apart + offsets[:, None] * angles).remainder(2 * math.pi)
        else:
            theta = torch.zeros_like(apart)
        weights += four(theta, weight, offsets)
    rising = torch.stack(rises).double()
    by_offset = rising.mean(dim=(0, 1, 2))
    found.shares.append([round(float(share), 6) for share in weights / weights.sum()])
    found.rises.append(round(float(rising.mean()), 6))
    found.by_distance.append(by_offset.view(-1, near).mean(dim=0).tolist())


def four(theta: Tensor, weight: Tensor, offsets: Tensor) -> Tensor:
    """(4,) the weight in the cases a, b, c, d of pairs (H, M, offsets, pairs); an angle of 0 falls to both sides."""
    later = (offsets > 0)[:, None].expand_as(theta)
    wide = theta > math.pi
    # By construction: to later keys it falls as case c does.
    level = theta == 0
    masks = (later & ~wide & ~level, ~later & ~wide, later & (wide | level), ~later & wide)
    return torch.stack([weight[mask].sum() for mask in masks])


def turns(streams: Recorded) -> Tensor:
    """(pairs,) how far a pair is turned from one position to the next, in radians."""
    assert streams.pairs is not None and streams.turned is not None
    units = torch.zeros_like(streams.q[0][:1, :1])
    first, second = streams.pairs(streams.turned(torch.ones_like(units)))
    whole = torch.atan2(second[0, 0].double(), first[0, 0].double())
    found: Tensor = (whole[1] - whole[0]).remainder(2 * math.pi).cpu()
    return found


def _chart(values: Values[AnomalousCasesResult]) -> LineChart:
    series = []
    for arm, seeds in values.items():
        table = np.mean([[one.by_distance for one in v.layers] for v in seeds.values()], axis=(0, 1))
        series.append(Series(arm, list(range(1, len(table) + 1)), table.tolist(), arm=arm))
    return LineChart(
        "anomalous-cases", "Scores that rise when a key moves one token away", "distance (tokens)",
        "share of scores that rise", series, "All layers, heads and streams; mean over seeds.", markers=True,
        y_range=(0.0, 1.0),
    )  # fmt: skip


def _table(values: Values[AnomalousCasesResult]) -> SectionTable:
    rows: list[list[str | None]] = []
    for arm, seeds in values.items():
        for index, one in enumerate(_first(seeds).layers):
            cells = [v.layers[index] for v in seeds.values()]
            shares = np.mean([cell.shares for cell in cells], axis=(0, 1))
            rises = np.mean([cell.rises for cell in cells])
            anomalous = shares[0] + shares[3]
            rows.append(
                [f"{arm}, layer {one.layer}", *(f"{share:.3f}" for share in (*shares, anomalous, rises))]
            )
    headers = ["arm and layer", *(f"case {case}" for case in CASES), "anomalous (a + d)", "scores that rise"]
    return SectionTable("By layer", headers, rows, "Means over documents and seeds.")


def _first(seeds: Mapping[int, AnomalousCasesResult]) -> AnomalousCasesResult:
    return next(iter(seeds.values()))

"""How many parameters, tokens or FLOPs an arm needs for the loss of the first one, as functions of size.

    parameters   N / N′   where L′(N′, D) = L(N, D)
    tokens       D / D′   where L′(N, D′) = L(N, D)
    flops        (f(N)·D) / (f′(N′)·D)   at the N′ of the first line; f: training FLOPs a token at a size

Unprimed is the arm, primed the baseline. A ratio below 1 is an arm that needs less. The first two match parameters:
V2's larger layers count as parameters. The third counts what the parameters cost, attention included.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from clearhead.analysis.scaling.law import ScalingLaw
from clearhead.analysis.scaling.points import Refused, ScalingPoint
from clearhead.analysis.scaling.resampling import interval

Currency = Literal["parameters", "tokens", "flops"]
SLACK = 1e-9


@dataclass(frozen=True)
class FittedArm:
    """An arm's joint law, its refits on redrawn data, and the points behind them."""

    name: str
    law: ScalingLaw
    refits: Sequence[ScalingLaw]
    points: Sequence[ScalingPoint]

    def span(self, axis: Currency) -> tuple[float, float]:
        values = [getattr(point, axis) for point in self.points]
        return min(values), max(values)

    def flops_per_token(self, parameters: float) -> float:
        """Training FLOPs a token at a size between those measured: straight lines in log-log."""
        known = sorted({(math.log(p.parameters), math.log(p.flops / p.tokens)) for p in self.points})
        x, y = zip(*known, strict=True)
        return float(np.exp(np.interp(math.log(parameters), x, y)))


@dataclass(frozen=True)
class Equivalence:
    """`value` of `currency` is what the arm needs of what the baseline does for its loss at (parameters, tokens).

    baseline:  the parameters, tokens or FLOPs that the baseline needs.
    beyond:    whether an end of the interval lies where the baseline has no data.
    """

    arm: str
    currency: Currency
    parameters: float
    tokens: float
    baseline: float
    value: float
    low: float
    high: float
    beyond: bool


def equivalence(
    arm: FittedArm, baseline: FittedArm, currency: Currency, parameters: float, tokens: float
) -> Equivalence | Refused:
    """The ratio at one size and budget of the arm.

    Refused outside the sizes and budgets of the arm, and where the baseline's answer lies outside its own.
    """
    for one in (arm, baseline):
        for axis, value in (("parameters", parameters), ("tokens", tokens)):
            if one is baseline and (axis == "parameters") == (currency != "tokens"):
                # This is what the baseline is asked for.
                continue
            low, high = one.span(axis)  # type: ignore[arg-type]
            if not low * (1 - SLACK) <= value <= high * (1 + SLACK):
                return Refused(
                    f"{axis} of {value:.3g} lie outside {one.name}'s data ({low:.3g} to {high:.3g})"
                )
    answer, ratio = _ratio(arm, arm.law, baseline, baseline.law, currency, parameters, tokens)
    axis = "tokens" if currency == "tokens" else "parameters"
    low, high = baseline.span(axis)  # type: ignore[arg-type]
    if not low * (1 - SLACK) <= answer <= high * (1 + SLACK):
        needs = "more than any number of" if math.isinf(answer) else f"{answer:.3g}"
        return Refused(
            f"{baseline.name} would need {needs} {axis} for this loss, outside its data ({low:.3g} to {high:.3g})"
        )
    logs = []
    for own, other in zip(arm.refits, baseline.refits, strict=False):
        drawn = _ratio(arm, own, baseline, other, currency, parameters, tokens)[1]
        logs.append(math.log(drawn) if drawn > 0 else -math.inf)
    draws = np.array(logs)
    draws[~np.isfinite(draws)] = math.log(1e-6)
    clusters = len({point.cluster for point in arm.points})
    bounds = interval(math.log(ratio), draws, clusters, len(arm.law.theta))
    wanted = (parameters if axis == "parameters" else tokens) / np.exp(bounds)
    return Equivalence(
        arm.name,
        currency,
        parameters,
        tokens,
        baseline.flops_per_token(answer) * tokens if currency == "flops" else answer,
        ratio,
        math.exp(bounds[0]),
        math.exp(bounds[1]),
        bool(currency != "flops" and (wanted.min() < low or wanted.max() > high)),
    )


def curve(
    arm: FittedArm, baseline: FittedArm, currency: Currency, tokens: float, count: int = 12
) -> list[Equivalence | Refused]:
    """The ratio at sizes from the arm's smallest to its largest, even in their logarithm."""
    low, high = arm.span("parameters")
    return [
        equivalence(arm, baseline, currency, float(size), tokens) for size in np.geomspace(low, high, count)
    ]


def _ratio(
    arm: FittedArm,
    law: ScalingLaw,
    baseline: FittedArm,
    other: ScalingLaw,
    currency: Currency,
    parameters: float,
    tokens: float,
) -> tuple[float, float]:
    """(what the baseline needs, the ratio); (∞, 0) where it never gets there."""
    loss = law.loss(parameters=parameters, tokens=tokens)
    if currency == "tokens":
        answer = other.solve("tokens", loss, parameters=parameters)
        return answer, 0.0 if math.isinf(answer) else tokens / answer
    answer = other.solve("parameters", loss, tokens=tokens)
    if math.isinf(answer):
        return answer, 0.0
    if currency == "parameters":
        return answer, parameters / answer
    return answer, arm.flops_per_token(parameters) / baseline.flops_per_token(answer)

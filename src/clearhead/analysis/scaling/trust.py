"""Whether a law fits: its residuals against what seeds alone do, and what it predicts of models it has not seen."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from clearhead.analysis.scaling.law import Axis, ScalingLaw, fit_law, logs_of
from clearhead.analysis.scaling.points import Array, NoiseFloor, Refused, ScalingPoint

DRAWS = 2000
LEVEL = 0.01
"""A law whose residuals are so rare under noise alone is refused."""


@dataclass(frozen=True)
class Residuals:
    """log L − log L̂ of the fitted points, and the lack-of-fit test.

    ratio:   mean square of the cell means about the law over that of the seeds about their cell (F).
    pvalue:  how often noise with the seeds' covariance within a run gives as large a ratio.
    """

    values: Array
    ratio: float
    pvalue: float

    @property
    def deviation(self) -> float:
        """Root mean square."""
        return float(np.sqrt((self.values**2).mean()))


def residuals(
    law: ScalingLaw, points: Sequence[ScalingPoint], noise: NoiseFloor, seed: int = 0
) -> Residuals | Refused:
    """The residuals and how likely noise alone leaves them; Refused where there are no more cells than constants."""
    logs = logs_of(points, law.axes)
    values = np.log([point.loss for point in points]) - law.log_loss(logs)
    gradient = law.gradient(logs)
    members = _membership(points)
    cells, constants = members.shape[0], gradient.shape[1]
    if cells <= constants or len(points) <= cells:
        return Refused(
            f"{cells} cells and {len(points)} models leave nothing to judge {constants} constants by"
        )

    def ratio(table: Array) -> Array:
        means = table @ members.T
        lack = ((means**2) * members.astype(bool).sum(axis=1)).sum(axis=1) / (cells - constants)
        spread = table - means @ members.astype(bool)
        pure = (spread**2).sum(axis=1) / (len(points) - cells)
        return lack / np.maximum(pure, 1e-300)

    observed = float(ratio(values[None])[0])
    drawn = _noise(points, noise, np.random.default_rng(seed), DRAWS)
    # What a fit to noise would take away of it, to first order.
    basis = np.linalg.qr(gradient)[0]
    drawn = drawn - (drawn @ basis) @ basis.T
    pvalue = float((ratio(drawn) >= observed).mean()) if noise.deviation > 0 else 1.0
    return Residuals(values, observed, pvalue)


def misfit(found: Residuals, noise: NoiseFloor) -> Refused | None:
    """Why a law is not used; None when its residuals are what seeds do."""
    if found.pvalue >= LEVEL:
        return None
    return Refused(
        f"the law does not fit: its residuals are {found.deviation / noise.deviation:.1f} times the seeds' deviation "
        f"(lack of fit F = {found.ratio:.1f}, p = {max(found.pvalue, 1 / DRAWS):.2g})"
    )


@dataclass(frozen=True)
class HeldOut:
    """A model that the fit did not see: measured (mean over seeds) and predicted loss in nats, and the interval."""

    arm: str
    size: str
    tokens: float
    measured: float
    predicted: float
    low: float
    high: float

    @property
    def inside(self) -> bool:
        return self.low <= self.measured <= self.high


Draws = Callable[[ScalingLaw, Sequence[ScalingPoint]], list[ScalingLaw]]


def held_out(
    points: Sequence[ScalingPoint], axes: tuple[Axis, ...], noise: NoiseFloor, draws: Draws
) -> list[HeldOut] | Refused:
    """Fit one arm without its largest size, predict it.

    The interval is of the mean over the seeds: the law's own uncertainty and the seeds' deviation.
    """
    largest = max(point.parameters for point in points)
    kept = [point for point in points if point.parameters < largest]
    law = fit_law(kept, axes, noise.deviation)
    if isinstance(law, Refused):
        return Refused(f"without the largest size: {law.reason}")
    laws = draws(law, kept)
    found = []
    for tokens in sorted({point.tokens for point in points}):
        cell = [point for point in points if point.parameters == largest and point.tokens == tokens]
        if not cell:
            continue
        at = {axis: getattr(cell[0], axis) for axis in axes}
        spread = float(np.var([math.log(one.loss(**at)) for one in laws])) + noise.deviation**2 / len(cell)
        predicted, half = law.loss(**at), 1.96 * math.sqrt(spread)
        measured = float(np.exp(np.mean([math.log(point.loss) for point in cell])))
        found.append(
            HeldOut(
                cell[0].arm,
                cell[0].size,
                tokens,
                measured,
                predicted,
                predicted * math.exp(-half),
                predicted * math.exp(half),
            )
        )
    return found


def _membership(points: Sequence[ScalingPoint]) -> Array:
    """(cells, points): 1/n where a point is one of the cell's n."""
    cells = list(dict.fromkeys(point.cell for point in points))
    table = np.array([[point.cell == cell for point in points] for cell in cells], dtype=np.float64)
    scaled: Array = table / table.sum(axis=1, keepdims=True)
    return scaled


def _noise(points: Sequence[ScalingPoint], noise: NoiseFloor, rng: np.random.Generator, count: int) -> Array:
    """(draws, points) with the seeds' covariance between the budgets of a run, and none between runs."""
    values, vectors = np.linalg.eigh(noise.covariance)
    root = vectors * np.sqrt(np.maximum(values, 0.0))
    place = {tokens: index for index, tokens in enumerate(noise.tokens)}
    runs: dict[tuple[str, str, int], list[int]] = {}
    for index, point in enumerate(points):
        runs.setdefault((point.arm, point.size, point.seed), []).append(index)
    out = np.zeros((count, len(points)))
    for members in runs.values():
        rows = root[[place[points[index].tokens] for index in members]]
        out[:, members] = rng.standard_normal((count, rows.shape[1])) @ rows.T
    return out

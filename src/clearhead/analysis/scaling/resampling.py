"""Uncertainty of a fitted law: a wild bootstrap over runs.

A run, not a point, is what repeats: budgets of one trunk err together. So all residuals of a cluster (the runs of one
size and seed, which saw the same rows) get one random factor of mean 0 and variance 1, the sizes stay as they were
designed, and the law is fitted again (Cameron, Gelbach and Miller 2008; Webb's six factors, for few clusters).
Residuals are first made as large as errors are, by (I − H)^(−1/2) of their cluster (Bell and McCaffrey 2002), since a
fit leaves residuals smaller than the errors. The same factors for all arms: what a seed does to both of a pair cancels
in their ratio.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence

import numpy as np
from scipy import stats

from clearhead.analysis.scaling.law import (
    EFFICIENT,
    LEAST_DELTA,
    ScalingLaw,
    bounds_of,
    logs_of,
    shares_of,
)
from clearhead.analysis.scaling.points import Array, ScalingPoint

FACTORS = np.sqrt([0.5, 1.0, 1.5])
STEPS = 80


def draw_factors(clusters: Sequence[Hashable], draws: int, seed: int) -> dict[Hashable, Array]:
    """One factor a cluster and draw."""
    rng = np.random.default_rng(seed)
    found = {}
    for cluster in sorted(set(clusters), key=str):
        sign = rng.choice([-1.0, 1.0], draws)
        found[cluster] = sign * rng.choice(FACTORS, draws)
    return found


def refits(
    law: ScalingLaw, points: Sequence[ScalingPoint], factors: Mapping[Hashable, Array], noise: float
) -> list[ScalingLaw]:
    """The law fitted to each redrawn data set."""
    logs = logs_of(points, law.axes)
    fitted = law.log_loss(logs)
    errors = _as_errors(np.log([point.loss for point in points]) - fitted, law.gradient(logs), points)
    table = np.stack([factors[point.cluster] for point in points], axis=1)
    delta = max(LEAST_DELTA, EFFICIENT * noise)
    thetas = refine(law.theta, logs - law.centre, fitted + table * errors, delta)
    return [ScalingLaw(law.axes, law.centre, theta) for theta in thetas]


def refine(start: Array, shifts: Array, losses: Array, delta: float) -> Array:
    """The fit's minimum near `start` for many data sets at once: log-losses (draws, points) -> (draws, constants).

    Levenberg-Marquardt steps with Huber's weights, each kept where it lowers the robust error; far cheaper than a
    search from many starts, which redrawn data do not need.
    """
    limits = np.array([bounds_of(row, shifts.shape[1]) for row in losses])
    theta = np.clip(np.tile(start, (len(losses), 1)), limits[..., 0], limits[..., 1])
    damping = np.full(len(losses), 1e-3)
    error = _robust(theta, shifts, losses, delta)
    for _ in range(STEPS):
        predicted, gradient = shares_of(theta, shifts)
        residual = losses - predicted
        weights = np.minimum(1.0, delta / np.maximum(np.abs(residual), 1e-300))
        weighted = gradient * weights[..., None]
        square = np.swapaxes(weighted, 1, 2) @ gradient
        diagonal = np.einsum("dii->di", square)
        square = square + np.einsum("di,ij->dij", damping[:, None] * diagonal + 1e-12, np.eye(len(start)))
        step = np.linalg.solve(square, np.einsum("dnp,dn->dp", weighted, residual)[..., None])[..., 0]
        tried = np.clip(theta + step, limits[..., 0], limits[..., 1])
        found = _robust(tried, shifts, losses, delta)
        better = found < error
        theta = np.where(better[:, None], tried, theta)
        gained = np.where(better, error - found, 0.0)
        error = np.where(better, found, error)
        damping = np.clip(np.where(better, damping / 5, damping * 4), 1e-9, 1e9)
        if not (gained > 1e-9 * error).any() and damping.min() > 1e3:
            break
    return theta


def _robust(theta: Array, shifts: Array, losses: Array, delta: float) -> Array:
    residual = shares_of(theta, shifts)[0] - losses
    inside = np.clip(residual, -delta, delta)
    found: Array = (inside * (residual - inside / 2)).sum(axis=-1)
    return found


def interval(value: float, draws: Array, clusters: int, constants: int) -> tuple[float, float]:
    """95 % of the draws, stretched about `value` as Student's t is to the normal: the clusters are few."""
    finite = np.where(np.isfinite(draws), draws, np.inf)
    low, high = np.quantile(finite, [0.025, 0.975])
    stretch = float(stats.t.ppf(0.975, max(2, clusters - constants)) / stats.norm.ppf(0.975))
    return value + stretch * (low - value), value + stretch * (high - value)


def _as_errors(values: Array, gradient: Array, points: Sequence[ScalingPoint]) -> Array:
    basis = np.linalg.qr(gradient)[0]
    found: dict[Hashable, list[int]] = {}
    for index, point in enumerate(points):
        found.setdefault(point.cluster, []).append(index)
    out = values.copy()
    for members in found.values():
        block = np.eye(len(members)) - basis[members] @ basis[members].T
        sizes, vectors = np.linalg.eigh(block)
        # A cluster that decides a constant alone has no residual along it.
        root = np.where(sizes > 1e-2, 1.0 / np.sqrt(np.maximum(sizes, 1e-2)), 0.0)
        out[members] = (vectors * root) @ vectors.T @ values[members]
    return out

"""Uncertainty of a fitted law: a wild bootstrap over runs.

A run, not a point, is what repeats: budgets of one trunk err together. So all residuals of a cluster (the runs of one
size and seed, which saw the same rows) get one random factor of mean 0 and variance 1, the sizes stay as they were
designed, and the law is fitted again (Cameron, Gelbach and Miller 2008; Webb's six factors, for few clusters). Residuals are
first made as large as errors are, by (I − H)^(−1/2) of their cluster (Bell and McCaffrey 2002), since a fit leaves residuals
smaller than the errors. The same factors for all arms: what a seed does to both of a pair cancels in their ratio.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence

import numpy as np
from scipy import stats

from clearhead.analysis.scaling.law import EFFICIENT, LEAST_DELTA, ScalingLaw, descend, logs_of
from clearhead.analysis.scaling.points import Array, ScalingPoint

FACTORS = np.sqrt([0.5, 1.0, 1.5])


def draw_factors(
    clusters: Sequence[Hashable], draws: int, seed: int
) -> dict[Hashable, Array]:
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
    laws = []
    for row in table:
        found = descend(law.theta, logs - law.centre, fitted + row * errors, delta)
        if found is not None:
            laws.append(ScalingLaw(law.axes, law.centre, found[0]))
    return laws


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

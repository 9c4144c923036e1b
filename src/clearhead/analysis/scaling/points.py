"""The measurements that a scaling law is fitted to, and how far seeds alone move them.

Legend: N parameters without embeddings, D training tokens, C training FLOPs, L loss in nats a token.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]


@dataclass(frozen=True)
class Refused:
    """What is not said, and why in a sentence: a fit that does not hold, a ratio outside the data."""

    reason: str


@dataclass(frozen=True)
class ScalingPoint:
    """The loss of one trained model.

    A run is one arm, size and seed: the budgets of a run share its trunk, so they are no independent measurements.
    """

    arm: str
    size: str
    seed: int
    parameters: float
    tokens: float
    flops: float
    loss: float

    def __post_init__(self) -> None:
        for name in ("parameters", "tokens", "flops", "loss"):
            value = getattr(self, name)
            if not (math.isfinite(value) and value > 0):
                raise ValueError(
                    f"{name} of {self.arm}, size {self.size}, seed {self.seed} must be a positive number, not {value}"
                )

    @property
    def cell(self) -> tuple[str, str, float]:
        """What repeats with another seed."""
        return self.arm, self.size, self.tokens

    @property
    def cluster(self) -> tuple[str, int]:
        """Runs of one size and seed: all budgets and all arms saw the same rows in the same order."""
        return self.size, self.seed


@dataclass(frozen=True)
class NoiseFloor:
    """How far another seed moves a loss: deviations of log-loss from the mean of their cell.

    deviation:  standard deviation of log-loss, about the relative deviation of the loss.
    tokens:     the budgets; covariance (budgets, budgets) of log-loss within a run, from the deviations.
    freedom:    degrees of freedom of `deviation`, as if budgets were independent.
    """

    deviation: float
    tokens: tuple[float, ...]
    covariance: Array
    freedom: int


def noise_floor(points: Sequence[ScalingPoint]) -> NoiseFloor | Refused:
    """The spread over seeds, pooled over all arms and sizes: one of them alone has two or three seeds."""
    deviations = _deviations(points)
    cells = {point.cell for point in points}
    freedom = len(points) - len(cells)
    if freedom < 2:
        return Refused(
            "hardly any cell was trained with two seeds, so nothing says how much of a difference is noise"
        )
    budgets = tuple(sorted({point.tokens for point in points}))
    runs: dict[Hashable, dict[float, float]] = defaultdict(dict)
    sizes: dict[Hashable, int] = defaultdict(int)
    for point, deviation in zip(points, deviations, strict=True):
        runs[point.arm, point.size, point.seed][point.tokens] = float(deviation)
        sizes[point.cell] += 1
    covariance = np.zeros((len(budgets), len(budgets)))
    for i, first in enumerate(budgets):
        for j, second in enumerate(budgets):
            both = [(run[first], run[second]) for run in runs.values() if first in run and second in run]
            cells_here = sum(1 for cell in cells if cell[2] == first)
            lost = max(1, len(both) - cells_here)
            covariance[i, j] = sum(a * b for a, b in both) / lost
    # Pairs of budgets with different numbers of runs need not give a covariance: keep what is one.
    values, vectors = np.linalg.eigh((covariance + covariance.T) / 2)
    covariance = (vectors * np.maximum(values, 0.0)) @ vectors.T
    return NoiseFloor(math.sqrt(float(deviations @ deviations) / freedom), budgets, covariance, freedom)


def _deviations(points: Sequence[ScalingPoint]) -> Array:
    """Log-loss minus its mean over the seeds of the cell."""
    losses = np.log([point.loss for point in points])
    found: dict[Hashable, list[int]] = defaultdict(list)
    for index, point in enumerate(points):
        found[point.cell].append(index)
    out = np.zeros(len(points))
    for members in found.values():
        out[members] = losses[members] - losses[members].mean()
    return out

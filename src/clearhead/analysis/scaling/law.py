"""The parametric laws and their robust fit.

    one axis     L(x)    = E + A / x^α                 x = N, D or C
    joint        L(N, D) = E + A / N^α + B / D^β

The fit minimises Σ huber_δ(log L̂ − log L) with L-BFGS from many starts, as Hoffmann et al. (arXiv 2203.15556, section
3.3) do; no parabolas through points of equal compute, whose minima are biased even without noise. Difference from
Hoffmann et al.: δ is not always 10⁻³ but at least 1.345 times the seeds' deviation (Huber's 95 % efficiency), and the
amplitudes are taken at the geometric centre of the data, which conditions the fit.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from scipy.optimize import minimize

from clearhead.analysis.scaling.points import Array, Refused, ScalingPoint

Axis = Literal["parameters", "tokens", "flops"]
NAMES = {"parameters": ("A", "α"), "tokens": ("B", "β"), "flops": ("A", "γ")}
LEAST_DELTA = 1e-3
EFFICIENT = 1.345
EXPONENTS = (0.02, 3.0)
STARTS = tuple(itertools.product((0.15, 0.5, 0.85), (0.15, 0.4, 1.0)))


@dataclass(frozen=True)
class ScalingLaw:
    """A fitted law. theta = [log E, (log amplitude at the centre, exponent) for each axis]."""

    axes: tuple[Axis, ...]
    centre: Array
    theta: Array

    def log_loss(self, logs: Array) -> Array:
        """log L̂ at log x, shape (points, axes)."""
        return shares_of(self.theta, logs - self.centre)[0]

    def loss(self, **values: float) -> float:
        """L̂ in nats at one value for each axis, by its name."""
        logs = np.log([[values[axis] for axis in self.axes]])
        return float(np.exp(self.log_loss(logs)[0]))

    def solve(self, axis: Axis, loss: float, **others: float) -> float:
        """The value on `axis` with this loss, the other axes given; infinite where the law never gets so low."""
        index = self.axes.index(axis)
        known = math.exp(self.theta[0])
        for place, name in enumerate(self.axes):
            if name != axis:
                shift = math.log(others[name]) - self.centre[place]
                known += math.exp(self.theta[1 + 2 * place] - self.theta[2 + 2 * place] * shift)
        rest = loss - known
        if rest <= 0:
            return math.inf
        amplitude, exponent = self.theta[1 + 2 * index], self.theta[2 + 2 * index]
        power = self.centre[index] + (amplitude - math.log(rest)) / exponent
        return math.inf if power > 700 else math.exp(power)

    def constants(self) -> dict[str, float]:
        """E in nats, and amplitude and exponent of each axis: {"E": ..., "A": ..., "α": ...}."""
        found = {"E": math.exp(self.theta[0])}
        for index, axis in enumerate(self.axes):
            amplitude, exponent = self.theta[1 + 2 * index : 3 + 2 * index]
            power = amplitude + exponent * self.centre[index]
            name, letter = NAMES[axis]
            found[name] = math.exp(power) if power < 700 else math.inf
            found[letter] = float(exponent)
        return found

    def gradient(self, logs: Array) -> Array:
        """∂ log L̂ / ∂ theta, shape (points, constants)."""
        return shares_of(self.theta, logs - self.centre)[1]


def logs_of(points: Sequence[ScalingPoint], axes: Sequence[Axis]) -> Array:
    """log x of the points, shape (points, axes)."""
    return np.log([[getattr(point, axis) for axis in axes] for point in points])


def fit_law(
    points: Sequence[ScalingPoint], axes: tuple[Axis, ...], noise: float = 0.0
) -> ScalingLaw | Refused:
    """The law over `axes` with the least robust error among all starts.

    noise: the seeds' deviation of log-loss, for δ.
    Refused when the axes have too few distinct values for the constants, or no start converges.
    """
    for axis in axes:
        found = len({getattr(point, axis) for point in points})
        if found < 4 and len(axes) == 1:
            return Refused(
                f"{found} values of {axis} for a law of three constants leave nothing that could contradict it; "
                "4 are needed"
            )
        if found < 3:
            return Refused(f"{found} values of {axis} do not show how fast its term falls; 3 are needed")
    logs = logs_of(points, axes)
    centre = (logs.min(axis=0) + logs.max(axis=0)) / 2
    losses = np.log([point.loss for point in points])
    delta = max(LEAST_DELTA, EFFICIENT * noise)
    best = None
    for start in _starts(losses, len(axes)):
        found_here = descend(start, logs - centre, losses, delta)
        if found_here is not None and (best is None or found_here[1] < best[1] - 1e-12):
            best = found_here
    if best is None:
        return Refused("no start of the fit converged")
    return ScalingLaw(axes, centre, best[0])


def descend(start: Array, shifts: Array, losses: Array, delta: float) -> tuple[Array, float] | None:
    """(theta, robust error) at the minimum that L-BFGS reaches from `start`; None if it diverges."""
    bounds = bounds_of(losses, shifts.shape[1])
    scale = 1.0 / (delta * delta * len(losses))

    def objective(theta: Array) -> tuple[float, Array]:
        predicted, gradient = shares_of(theta, shifts)
        residual = predicted - losses
        inside = np.clip(residual, -delta, delta)
        value = float((inside * (residual - inside / 2)).sum())
        return scale * value, scale * (inside @ gradient)

    result = minimize(
        objective,
        start,
        jac=True,
        method="L-BFGS-B",
        bounds=bounds,
        options={"maxiter": 2000, "maxfun": 4000, "ftol": 1e-10, "gtol": 1e-7, "maxcor": 20},
    )
    return (result.x, float(result.fun)) if np.isfinite(result.fun) else None


def bounds_of(losses: Array, axes: int) -> list[tuple[float, float]]:
    """Lowest and highest of each constant: E from e⁻⁵ of the lowest loss to that loss, exponents 0.02 to 3."""
    low, high = float(losses.min()), float(losses.max())
    return [(low - 5.0, low), *[(low - 9.0, high + 1.0), EXPONENTS] * axes]


def _starts(losses: Array, axes: int) -> list[Array]:
    middle = float(np.median(losses))
    starts = []
    for shares in STARTS:
        irreducible, exponent = shares
        term = math.log((1 - irreducible) / axes) + middle
        for slower in (1.0, 0.4) if axes > 1 else (1.0,):
            exponents = [exponent, exponent * slower][:axes]
            starts.append(
                np.array([math.log(irreducible) + middle, *(part for e in exponents for part in (term, e))])
            )
    return starts


def _terms(theta: Array, shifts: Array) -> Array:
    falling = theta[..., None, 1::2] - theta[..., None, 2::2] * shifts
    irreducible = np.broadcast_to(theta[..., None, :1], (*falling.shape[:-1], 1))
    return np.concatenate([irreducible, falling], axis=-1)


def shares_of(theta: Array, shifts: Array) -> tuple[Array, Array]:
    """log L̂ (..., points) and its derivatives (..., points, constants) for theta (..., constants).

    A derivative is its term's share of the loss, times what the constant does to the term.
    """
    terms = _terms(theta, shifts)
    top = terms.max(axis=-1, keepdims=True)
    powers = np.exp(terms - top)
    total = powers.sum(axis=-1, keepdims=True)
    shares = powers / total
    gradient = np.empty((*terms.shape[:-1], theta.shape[-1]))
    gradient[..., 0] = shares[..., 0]
    gradient[..., 1::2] = shares[..., 1:]
    gradient[..., 2::2] = -shares[..., 1:] * shifts
    return (top + np.log(total))[..., 0], gradient

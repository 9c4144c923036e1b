"""Intervals, paired differences and survival curves: what turns counts and losses into sentences with uncertainty.

Every interval is two-sided at 95 % unless `confidence` says otherwise. Two sources of chance are kept apart:
the *samples* (documents, needles) of one trained model, and the *seeds* (another initialisation and data order).
Samples are resampled or counted (`bootstrap_ratio`, `wilson`), seeds get Student's t
(`student_interval`); an `Estimate` over both carries the wider of the two bounds on either side.
With one seed only the samples speak, and `seeds_clause` says that one seed proves nothing about a method.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from scipy import stats

Floats = Sequence[float] | NDArray[np.float64]
Better = Literal["higher", "lower"]


@dataclass(frozen=True)
class Estimate:
    """A value with its interval, the number of samples per seed behind it and the number of seeds."""

    value: float
    low: float
    high: float
    n: int
    seeds: int = 1

    @property
    def unknown(self) -> bool:
        """Whether one sample is all there is: it has a value, and nothing that tells how far it may be off."""
        return self.n * self.seeds == 1 and self.low == self.high

    @property
    def contains_zero(self) -> bool:
        return self.unknown or self.low <= 0.0 <= self.high

    def text(self, digits: int = 2) -> str:
        """`0.98 (0.95 to 0.99, n=400, 3 seeds)`."""
        return f"{decimal(self.value, digits)} ({self.interval(digits)}, n={self.n}, {count(self.seeds, 'seed')})"

    def interval(self, digits: int = 2) -> str:
        if self.unknown:
            return "one sample has no interval"
        return f"{decimal(self.low, digits)} to {decimal(self.high, digits)}"


def decimal(value: float, digits: int = 2) -> str:
    """A fixed number of decimals, with a typographic minus."""
    return f"{value:.{digits}f}".replace("-", "−")


def count(number: int, noun: str) -> str:
    """`1 seed`, `3 seeds`."""
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def wilson(successes: int, trials: int, confidence: float = 0.95) -> tuple[float, float]:
    """Wilson score interval of a proportion (Wilson 1927); `(0, 1)` when nothing was tried."""
    if trials < 0 or not 0 <= successes <= max(trials, 0):
        raise ValueError(f"{successes} successes of {trials} trials is not a proportion")
    if trials == 0:
        return 0.0, 1.0
    z = float(stats.norm.ppf(0.5 + confidence / 2))
    p = successes / trials
    centre = (p + z * z / (2 * trials)) / (1 + z * z / trials)
    half = z / (1 + z * z / trials) * math.sqrt(p * (1 - p) / trials + z * z / (4 * trials * trials))
    # At the ends the formula gives exactly 0 and 1 but for rounding.
    low = 0.0 if successes == 0 else max(0.0, centre - half)
    high = 1.0 if successes == trials else min(1.0, centre + half)
    return low, high


def bootstrap_mean(
    values: Floats, seed: int = 0, *, confidence: float = 0.95, resamples: int = 2000
) -> tuple[float, float]:
    """Percentile bootstrap interval of the mean over samples (Efron 1979), deterministic in `seed`."""
    return bootstrap_ratio(values, np.ones(len(values)), seed, confidence=confidence, resamples=resamples)


def bootstrap_ratio(
    numerators: Floats,
    denominators: Floats,
    seed: int = 0,
    *,
    confidence: float = 0.95,
    resamples: int = 2000,
) -> tuple[float, float]:
    """Percentile bootstrap of Σ numerator / Σ denominator over samples, e.g. bits over bytes of documents.

    A sample is drawn whole (both of its numbers), so long documents weigh what they weigh in the ratio. Draws whose
    denominators are all 0 have no ratio and do not count.
    Raises ValueError for numbers that are none, and where no sample has a denominator.
    """
    top = np.asarray(numerators, dtype=np.float64)
    bottom = np.asarray(denominators, dtype=np.float64)
    if top.ndim != 1 or top.shape != bottom.shape:
        raise ValueError(f"expected two vectors of one length, got shapes {top.shape} and {bottom.shape}")
    if top.size == 0:
        raise ValueError("a bootstrap needs at least one sample")
    if not (np.isfinite(top).all() and np.isfinite(bottom).all()):
        raise ValueError("the samples of a bootstrap hold NaN or infinities")
    if not (bottom >= 0).all() or not bottom.any():
        raise ValueError("the denominators of a ratio must be at least 0, and not all of them 0")
    # Counts of a resample are multinomial: one matrix product instead of an index table of resamples x samples.
    counts = np.random.default_rng(seed).multinomial(
        top.size, np.full(top.size, 1 / top.size), size=resamples
    )
    sums = counts @ bottom
    ratios = (counts @ top)[sums > 0] / sums[sums > 0]
    tail = (1 - confidence) / 2
    low, high = np.quantile(ratios, [tail, 1 - tail])
    return float(low), float(high)


def student_interval(values: Floats, confidence: float = 0.95) -> tuple[float, float] | None:
    """Student's t interval of the mean over seeds; `None` with fewer than two, which say nothing about spread."""
    data = np.asarray(values, dtype=np.float64)
    if data.size < 2:
        return None
    mean = float(data.mean())
    half = float(stats.t.ppf(0.5 + confidence / 2, data.size - 1) * data.std(ddof=1) / math.sqrt(data.size))
    return mean - half, mean + half


def _wider(first: tuple[float, float], second: tuple[float, float] | None) -> tuple[float, float]:
    return first if second is None else (min(first[0], second[0]), max(first[1], second[1]))


def proportion(counts: Sequence[tuple[int, int]], confidence: float = 0.95) -> Estimate:
    """Accuracy over seeds from `(successes, trials)` of each: pooled Wilson or Student's t, whichever is wider."""
    if not counts:
        raise ValueError("a proportion needs at least one seed")
    successes, trials = sum(k for k, _ in counts), sum(n for _, n in counts)
    if trials == 0:
        raise ValueError("a proportion needs at least one trial")
    spread = student_interval([k / n for k, n in counts if n], confidence)
    low, high = _wider(wilson(successes, trials, confidence), spread)
    return Estimate(successes / trials, max(0.0, low), min(1.0, high), trials // len(counts), len(counts))


def ratio(
    numerators: Sequence[Floats], denominators: Floats, seed: int = 0, *, confidence: float = 0.95
) -> Estimate:
    """Σ numerator / Σ denominator, averaged over seeds. `numerators[s][i]`: sample i under seed s."""
    table = _table(numerators)
    bottom = np.asarray(denominators, dtype=np.float64)
    samples = bootstrap_ratio(table.mean(axis=0), bottom, seed, confidence=confidence)
    spread = student_interval(table.sum(axis=1) / bottom.sum(), confidence)
    low, high = _wider(samples, spread)
    return Estimate(float(table.mean(axis=0).sum() / bottom.sum()), low, high, bottom.size, len(table))


def paired_difference(
    ours: Sequence[Floats],
    theirs: Sequence[Floats],
    denominators: Floats | None = None,
    seed: int = 0,
    *,
    confidence: float = 0.95,
) -> Estimate:
    """Ours minus theirs on the same samples and seeds (`ours[s][i]`: sample i under seed s).

    Without `denominators` the difference of means, with them the difference of ratios. Pairing removes what
    both arms share: hard documents, the order of the data.
    """
    first, second = _table(ours), _table(theirs)
    if first.shape != second.shape:
        raise ValueError(f"pairs need the same seeds and samples, got {first.shape} and {second.shape}")
    bottom = np.ones(first.shape[1]) if denominators is None else np.asarray(denominators, dtype=np.float64)
    return ratio(list(first - second), bottom, seed, confidence=confidence)


def _table(rows: Sequence[Floats]) -> NDArray[np.float64]:
    if not rows or len({len(row) for row in rows}) != 1:
        raise ValueError("every seed needs the same samples")
    return np.asarray(rows, dtype=np.float64)


def verdict(difference: Estimate, better: Better, *, digits: int = 2) -> str:
    """`better by 0.12 (0.05 to 0.20)`, `worse by ...` or `no difference detected (-0.02 to 0.04)`.

    It is "no difference detected" exactly when the interval of the difference contains 0.
    """
    if difference.contains_zero:
        return f"no difference detected ({difference.interval(digits)})"
    wins = (difference.value > 0) == (better == "higher")
    low, high = sorted((abs(difference.low), abs(difference.high)))
    # A bound that is not 0 must not read as 0.
    digits = max(digits, min(6, math.ceil(-math.log10(low))))
    span = f"{low:.{digits}f} to {high:.{digits}f}"
    return f"{'better' if wins else 'worse'} by {abs(difference.value):.{digits}f} ({span})"


def seeds_clause(seeds: int) -> str:
    """What the number of seeds allows one to say, as a sentence."""
    return "One seed proves nothing about the methods." if seeds == 1 else f"{seeds} seeds per arm."


@dataclass(frozen=True)
class Survival:
    """A Kaplan-Meier curve: P(T > time) after each time, with pointwise bounds (log-log)."""

    times: tuple[float, ...]
    probability: tuple[float, ...]
    low: tuple[float, ...]
    high: tuple[float, ...]
    median: float | None
    events: int
    n: int


def kaplan_meier(times: Floats, observed: Sequence[bool], confidence: float = 0.95) -> Survival:
    """Kaplan-Meier estimate from times and whether the event was seen (else right-censored there).

    The curve starts at (0, 1). Bounds are the log-log ones of Kalbfleisch and Prentice; where scipy has none
    (before the first event, or once the curve is at 0) they are the curve itself.
    """
    data = _censored(times, observed)
    curve = stats.ecdf(data).sf
    if any(observed):
        # Bounds do not exist at 0 and 1: scipy says so and gives NaN, which is handled below.
        with np.errstate(all="ignore"), warnings.catch_warnings():
            warnings.simplefilter("ignore", RuntimeWarning)
            bounds = curve.confidence_interval(confidence_level=confidence, method="log-log")
        low, high = bounds.low.probabilities, bounds.high.probabilities
    else:
        low = high = np.full(len(curve.quantiles), np.nan)
    centre = curve.probabilities
    low, high = np.where(np.isnan(low), centre, low), np.where(np.isnan(high), centre, high)
    below = np.nonzero(centre <= 0.5)[0]
    return Survival(
        times=(0.0, *map(float, curve.quantiles)),
        probability=(1.0, *map(float, centre)),
        low=(1.0, *map(float, low)),
        high=(1.0, *map(float, high)),
        median=float(curve.quantiles[below[0]]) if below.size else None,
        events=int(sum(observed)),
        n=len(observed),
    )


def logrank(
    times: Floats, observed: Sequence[bool], other_times: Floats, other_observed: Sequence[bool]
) -> float:
    """Two-sided p-value of the log-rank test; 1.0 where there is nothing to compare.

    That is where no event was seen, and where none could have fallen to either group: all of both at one time, say.
    """
    if not any(observed) and not any(other_observed):
        return 1.0
    with np.errstate(all="ignore"):
        pvalue = stats.logrank(_censored(times, observed), _censored(other_times, other_observed)).pvalue
    return 1.0 if math.isnan(pvalue) else float(pvalue)


def _censored(times: Floats, observed: Sequence[bool]) -> stats.CensoredData:
    values = np.asarray(times, dtype=np.float64)
    seen = np.asarray(observed, dtype=bool)
    if values.shape != seen.shape or values.size == 0:
        raise ValueError(
            f"expected as many times as events, at least one, got {values.shape} and {seen.shape}"
        )
    return stats.CensoredData.right_censored(values, ~seen)


def holm(pvalues: Sequence[float]) -> list[float]:
    """Holm's step-down adjustment (1979): family-wise error without assuming independence; order is kept.

    Raises ValueError for what is no probability.
    """
    if not all(0 <= p <= 1 for p in pvalues):
        raise ValueError(f"p-values lie between 0 and 1, not {list(pvalues)}")
    adjusted = [0.0] * len(pvalues)
    running = 0.0
    for rank, index in enumerate(sorted(range(len(pvalues)), key=lambda i: pvalues[i])):
        running = max(running, min(1.0, (len(pvalues) - rank) * pvalues[index]))
        adjusted[index] = running
    return adjusted

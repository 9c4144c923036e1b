"""Best minus worst of several orders of the same thing, and how much of that is chance.

Outcomes are a table of 0 and 1, (orders P, items n): the same items under every order. The margin max − min of the
accuracies is biased upwards: of equally good orders some one is always best on n items, and a bootstrap of the margin
adds that bias once more. So

* the interval is margin ± d, d the 95 % quantile of the range max − min of (resampled − observed accuracies), items
  resampled whole: no margin can be off by more than the range of the errors of its accuracies;
* beside it stands the margin that noise alone gives: each item's outcomes dealt anew among the orders, which leaves the
  items as hard as they are and makes all orders equal;
* a difference of two arms has the percentile or the basic bootstrap interval, the wider on either side, the same items
  drawn for both. Noise lifts a small margin more than a large one, so differences look smaller than they are.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from clearhead.analysis.statistics import Estimate, student_interval

Outcomes = NDArray[np.float64]
RESAMPLES = 2000
DEALT_AT_ONCE = 2**22
"""Outcomes that are dealt together: 32 MB."""


@dataclass(frozen=True)
class Chance:
    """The margin if order did not matter: its mean, what it stays below in 95 %, and how often it is as large."""

    mean: float
    high: float
    pvalue: float


def margin(outcomes: Outcomes) -> float:
    accuracies = outcomes.mean(axis=1)
    return float(accuracies.max() - accuracies.min())


def margin_by_chance(outcomes: Outcomes, seed: int = 0, resamples: int = RESAMPLES) -> Chance:
    """The margins of `outcomes` with each item's dealt anew among the orders; the observed one counts among them."""
    rng = np.random.default_rng(seed)
    found: list[NDArray[np.float64]] = []
    left, at_once = resamples, max(1, DEALT_AT_ONCE // outcomes.size)
    while left:
        count = min(left, at_once)
        dealt = rng.permuted(np.broadcast_to(outcomes, (count, *outcomes.shape)), axis=1).mean(axis=2)
        found.append(dealt.max(axis=1) - dealt.min(axis=1))
        left -= count
    margins = np.concatenate(found)
    # Margins are whole numbers of items, but for rounding.
    as_large = int((margins > margin(outcomes) - 0.5 / outcomes.shape[1]).sum())
    return Chance(float(margins.mean()), float(np.quantile(margins, 0.95)), (1 + as_large) / (1 + resamples))


def resampled(outcomes: Outcomes, seed: int = 0, resamples: int = RESAMPLES) -> Outcomes:
    """Accuracies (resamples, P) of draws of the items, each with all its outcomes; one n has the same draws."""
    items = outcomes.shape[1]
    counts = np.random.default_rng([seed, items]).multinomial(
        items, np.full(items, 1 / items), size=resamples
    )
    accuracies: Outcomes = counts @ outcomes.T / items
    return accuracies


def mean_margin(seeds: Sequence[Sequence[Outcomes]]) -> Estimate:
    """The mean margin of several tables, `seeds[s][t]`, over the seeds of an arm; never below 0."""
    values = [_mean(tables) for tables in seeds]
    errors = [np.ptp(resampled(t) - t.mean(axis=1), axis=1) for tables in seeds for t in tables]
    value, reach = float(np.mean(values)), float(np.quantile(np.mean(errors, axis=0), 0.95))
    low, high = _widened(value - reach, value + reach, values)
    return Estimate(value, max(0.0, low), min(1.0, high), _items(seeds[0]), len(seeds))


def margin_difference(ours: Sequence[Sequence[Outcomes]], theirs: Sequence[Sequence[Outcomes]]) -> Estimate:
    """Our mean margin minus theirs, seed by seed."""
    values = [_mean(a) - _mean(b) for a, b in zip(ours, theirs, strict=True)]
    draws = np.mean([_draws(a) - _draws(b) for a, b in zip(ours, theirs, strict=True)], axis=0)
    value, (below, above) = float(np.mean(values)), np.quantile(draws, [0.025, 0.975])
    low = min(float(below), 2 * value - float(above))
    high = max(float(above), 2 * value - float(below))
    return Estimate(value, *_widened(low, high, values), _items(ours[0]), len(ours))


def _mean(tables: Sequence[Outcomes]) -> float:
    return float(np.mean([margin(table) for table in tables]))


def _draws(tables: Sequence[Outcomes]) -> Outcomes:
    mean: Outcomes = np.mean([np.ptp(resampled(table), axis=1) for table in tables], axis=0)
    return mean


def _items(tables: Sequence[Outcomes]) -> int:
    return sum(table.shape[1] for table in tables)


def _widened(low: float, high: float, values: Sequence[float]) -> tuple[float, float]:
    """Student's t over seeds where it is wider."""
    spread = student_interval(values)
    return (low, high) if spread is None else (min(low, spread[0]), max(high, spread[1]))

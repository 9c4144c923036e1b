"""Statistics where there is next to nothing: one sample, no variance, denominators of 0, numbers that are none."""

from __future__ import annotations

import math
import warnings

import numpy as np
import pytest

from clearhead.analysis.comparison import compare
from clearhead.analysis.statistics import (
    Estimate,
    bootstrap_ratio,
    holm,
    logrank,
    paired_difference,
    proportion,
    ratio,
    verdict,
)


def test_all_events_at_one_time_compare_nothing_and_spoil_no_other_test() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert logrank([8, 8], [True, True], [8, 8], [True, True]) == 1.0
    assert holm([1.0, 0.01]) == [1.0, 0.02]
    with pytest.raises(ValueError, match="between 0 and 1"):
        holm([math.nan, 0.01])


def test_logrank_is_mantels_formula_where_it_says_something() -> None:
    # By hand: at risk 2 + 2 when the first group's first event falls, 1 + 2 at its second, then only the second's.
    observed, expected = 2, 2 / 4 + 1 / 3
    variance = (2 * 2) / 16 + (1 * 2) / 9
    z = (observed - expected) / math.sqrt(variance)
    found = logrank([1, 2], [True, True], [3, 4], [True, True])
    assert found == pytest.approx(math.erfc(abs(z) / math.sqrt(2)), abs=1e-12)


def test_one_sample_decides_nothing() -> None:
    one = paired_difference([[1.0]], [[2.0]])
    assert one.value == -1.0 and one.contains_zero
    assert verdict(one, "lower") == "no difference detected (one sample has no interval)"
    found = compare({"A": {0: [1.0]}, "B": {0: [2.0]}}, "lower")
    assert "No difference from A detected for B" in found.sentence()
    # A proportion has Wilson's interval, two seeds Student's, and equal samples are many.
    assert not proportion([(1, 1)]).unknown
    assert not paired_difference([[1.0], [1.5]], [[2.0], [2.6]]).unknown
    assert not Estimate(0.5, 0.5, 0.5, 3).contains_zero


def test_draws_without_a_denominator_do_not_count() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        low, high = bootstrap_ratio([2.0, 0.0, 6.0], [1.0, 0.0, 2.0])
    assert 2.0 <= low <= high <= 3.0
    for bottom in ([0.0, 0.0], [1.0, -1.0]):
        with pytest.raises(ValueError, match="not all of them 0"):
            ratio([[1.0, 2.0]], bottom)


@pytest.mark.parametrize("odd", [math.nan, math.inf, None])
def test_samples_that_are_no_numbers_are_refused(odd: float) -> None:
    with pytest.raises(ValueError, match="NaN or infinities"):
        ratio([[1.0, odd]], np.ones(2))
    with pytest.raises(ValueError, match="NaN or infinities"):
        compare({"A": {0: [1.0, 2.0]}, "B": {0: [1.0, odd]}}, "lower")

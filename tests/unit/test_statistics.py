"""Intervals and survival curves against scipy, textbook values and their own coverage."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

from clearhead.analysis import statistics as st


@pytest.mark.parametrize(("k", "n"), [(0, 10), (3, 10), (10, 10), (392, 400), (1, 1)])
def test_wilson_equals_scipy(k: int, n: int) -> None:
    expected = stats.binomtest(k, n).proportion_ci(method="wilson")
    assert st.wilson(k, n) == pytest.approx((expected.low, expected.high), abs=1e-12)


def test_wilson_of_nothing_is_everything_and_nonsense_is_refused() -> None:
    assert st.wilson(0, 0) == (0.0, 1.0)
    with pytest.raises(ValueError, match="5 successes of 4 trials"):
        st.wilson(5, 4)


def test_bootstrap_is_seeded_and_close_to_the_normal_interval() -> None:
    values = np.random.default_rng(3).normal(2.0, 1.0, 400)
    first = st.bootstrap_mean(values, 7)
    assert first == st.bootstrap_mean(values, 7) != st.bootstrap_mean(values, 8)
    half = 1.96 * values.std() / 20
    assert first == pytest.approx((values.mean() - half, values.mean() + half), abs=0.02)


def test_bootstrap_ratio_weights_documents_by_their_size() -> None:
    bits, size = [10.0, 100.0], [10.0, 50.0]
    low, high = st.bootstrap_ratio(bits, size)
    assert (low, high) == (pytest.approx(1.0), pytest.approx(2.0))


def test_bootstrap_refuses_mismatched_and_empty_samples() -> None:
    with pytest.raises(ValueError, match="one length"):
        st.bootstrap_ratio([1.0], [1.0, 2.0])
    with pytest.raises(ValueError, match="at least one"):
        st.bootstrap_mean([])


def test_student_interval_equals_scipy() -> None:
    values = [0.2, 0.5, 0.9, 0.4]
    expected = stats.ttest_1samp(values, 0.0).confidence_interval()
    assert st.student_interval(values) == pytest.approx((expected.low, expected.high))
    assert st.student_interval([0.3]) is None


def test_seeds_that_disagree_widen_the_interval() -> None:
    agree = st.proportion([(90, 100), (90, 100), (90, 100)])
    differ = st.proportion([(100, 100), (100, 100), (70, 100)])
    assert agree.value == differ.value == pytest.approx(0.9)
    assert (agree.low, agree.high) == pytest.approx(st.wilson(270, 300))
    assert differ.low < agree.low and differ.high == 1.0


def test_seeds_that_disagree_widen_a_difference_until_nothing_is_detected() -> None:
    hard = np.random.default_rng(2).normal(3.0, 0.5, 80)
    theirs = [hard, hard, hard]
    agree = st.paired_difference([hard - 0.1, hard - 0.11, hard - 0.09], theirs)
    differ = st.paired_difference([hard - 0.5, hard + 0.3, hard - 0.1], theirs)
    assert agree.value == pytest.approx(differ.value) and not agree.contains_zero and differ.contains_zero
    assert (differ.low, differ.high) == pytest.approx(st.student_interval([-0.5, 0.3, -0.1]))


def test_estimate_reads_as_a_sentence() -> None:
    assert st.Estimate(0.981, 0.9512, 0.993, 400, 3).text() == "0.98 (0.95 to 0.99, n=400, 3 seeds)"
    assert st.Estimate(0.5, 0.2, 0.8, 10).text().endswith("n=10, 1 seed)")


def test_pairing_finds_what_unpaired_intervals_hide() -> None:
    rng = np.random.default_rng(0)
    hard = rng.normal(3.0, 1.0, 200)
    ours = [hard - 0.05 + rng.normal(0, 0.01, 200) for _ in range(3)]
    theirs = [hard + rng.normal(0, 0.01, 200) for _ in range(3)]
    a, b = st.ratio(ours, np.ones(200)), st.ratio(theirs, np.ones(200))
    assert a.high > b.low, "the intervals of the two arms overlap"
    difference = st.paired_difference(ours, theirs)
    assert difference.high < 0 and not difference.contains_zero
    assert st.verdict(difference, "lower").startswith("better by 0.05 (0.0")
    assert st.verdict(difference, "higher").startswith("worse")


def test_no_difference_is_said_when_the_interval_contains_zero() -> None:
    rng = np.random.default_rng(1)
    ours, theirs = [rng.normal(size=50) for _ in range(2)], [rng.normal(size=50) for _ in range(2)]
    assert st.verdict(st.paired_difference(ours, theirs), "higher").startswith("no difference detected (−0.")


def test_a_tiny_difference_never_reads_as_none() -> None:
    tiny = st.Estimate(-0.00042, -0.0008, -0.00004, 50, 3)
    assert st.verdict(tiny, "lower") == "better by 0.00042 (0.00004 to 0.00080)"


def test_one_seed_is_named_as_one() -> None:
    assert st.paired_difference([[1.0] * 50], [[0.0] * 50]).seeds == 1
    assert "proves nothing" in st.seeds_clause(1)
    assert st.seeds_clause(3) == "3 seeds per arm."


def test_paired_difference_refuses_unpaired_samples() -> None:
    with pytest.raises(ValueError, match="same seeds and samples"):
        st.paired_difference([[1.0, 2.0]], [[1.0]])


def test_kaplan_meier_equals_the_hand_calculation() -> None:
    # Deaths at 1 and 3, censored at 2 and 4: S = 3/4 after 1, 3/4 * 1/2 after 3.
    curve = st.kaplan_meier([1, 2, 3, 4], [True, False, True, False])
    assert curve.times == (0.0, 1.0, 2.0, 3.0, 4.0)
    assert curve.probability == pytest.approx((1.0, 0.75, 0.75, 0.375, 0.375))
    assert curve.median == 3.0 and curve.events == 2 and curve.n == 4
    assert all(lo <= p <= hi for lo, p, hi in zip(curve.low, curve.probability, curve.high, strict=True))


def test_kaplan_meier_without_events_stays_at_one() -> None:
    curve = st.kaplan_meier([5.0, 5.0], [False, False])
    assert set(curve.probability) == {1.0} and curve.median is None


def test_logrank_equals_observed_minus_expected_by_hand() -> None:
    ours, seen = [6, 13, 21, 30, 31, 37, 47, 98], [True, True, True, True, False, True, False, True]
    theirs, theirs_seen = [4, 5, 10, 10, 12, 13, 20, 34], [True] * 7 + [False]
    excess = variance = 0.0
    for time in sorted({t for t, s in zip(ours + theirs, seen + theirs_seen, strict=True) if s}):
        risk, other_risk = sum(t >= time for t in ours), sum(t >= time for t in theirs)
        events = sum(t == time and s for t, s in zip(ours, seen, strict=True))
        both = events + sum(t == time and s for t, s in zip(theirs, theirs_seen, strict=True))
        total = risk + other_risk
        excess += events - both * risk / total
        if total > 1:
            variance += both * risk * other_risk * (total - both) / (total**2 * (total - 1))
    expected = stats.chi2.sf(excess**2 / variance, 1)
    assert st.logrank(ours, seen, theirs, theirs_seen) == pytest.approx(expected)
    assert expected < 0.05


def test_logrank_without_events_has_nothing_to_say() -> None:
    assert st.logrank([5.0], [False], [5.0], [False]) == 1.0


def test_holm_steps_down_and_keeps_order() -> None:
    assert st.holm([0.04, 0.01, 0.03]) == pytest.approx([0.06, 0.03, 0.06])
    assert st.holm([0.9, 0.8]) == [1.0, 1.0]
    assert st.holm([]) == []

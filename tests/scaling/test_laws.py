"""Fits find the law behind the losses, their intervals hold what is true, and what the data do not say is refused.

CLEARHEAD_SCALING_DRAWS=100 repeats the self-test as often as its bar asks: 90 to 99 of 100 intervals hold the truth.
"""

import math
import os
from dataclasses import replace

import numpy as np
import pytest
from scipy.optimize import brentq

from clearhead.analysis.scaling import resampling
from clearhead.analysis.scaling.equivalence import Equivalence, FittedArm, curve, equivalence
from clearhead.analysis.scaling.law import ScalingLaw, descend, fit_law, logs_of, shares_of
from clearhead.analysis.scaling.points import Refused, ScalingPoint, noise_floor
from clearhead.analysis.scaling.resampling import draw_factors, refits
from clearhead.analysis.scaling.study import FittedLaw, analyse
from clearhead.analysis.scaling.trust import held_out, misfit, residuals
from tests.scaling.synthetic import ALPHA, BETA, BUDGETS, SIZES, A, B, E, study, true_loss

JOINT = ("parameters", "tokens")
DRAWS = int(os.environ.get("CLEARHEAD_SCALING_DRAWS", "3"))


def fitted(points: list[ScalingPoint], draws: int) -> dict[str, FittedArm]:
    noise = noise_floor(points)
    assert not isinstance(noise, Refused)
    factors = draw_factors([point.cluster for point in points], draws, 0)
    arms = {}
    for name in ("base", "arm"):
        own = [point for point in points if point.arm == name]
        law = fit_law(own, JOINT, noise.deviation)
        assert isinstance(law, ScalingLaw)
        arms[name] = FittedArm(name, law, refits(law, own, factors, noise.deviation), own)
    return arms


def test_constants_come_back_from_losses_without_noise() -> None:
    found = fitted(study(0, noise=0.0), 1)["base"].law.constants()
    expected = {"E": E, "A": A, "α": ALPHA, "B": B, "β": BETA}
    assert found == pytest.approx(expected, rel=1e-2)


def test_the_gradient_is_that_of_the_law() -> None:
    theta, shifts = np.array([0.3, 0.1, 0.4, -0.5, 0.7]), np.array([[0.3, -0.2], [-1.0, 0.5], [0.0, 0.0]])
    gradient = shares_of(theta, shifts)[1]
    for index in range(5):
        step = np.eye(5)[index] * 1e-6
        slope = (shares_of(theta + step, shifts)[0] - shares_of(theta - step, shifts)[0]) / 2e-6
        np.testing.assert_allclose(gradient[:, index], slope, atol=1e-8)
    # The law itself, written out.
    x, y = shifts[1]
    plain = math.exp(0.3) + math.exp(0.1 - 0.4 * x) + math.exp(-0.5 - 0.7 * y)
    assert shares_of(theta, shifts)[0][1] == pytest.approx(math.log(plain))


def test_refits_end_where_the_search_would() -> None:
    points = [point for point in study(3) if point.arm == "base"]
    law = fit_law(points, JOINT, 0.004)
    assert isinstance(law, ScalingLaw)
    shifts = logs_of(points, JOINT) - law.centre
    losses = np.log([point.loss for point in points])
    rows = losses + np.random.default_rng(0).normal(0, 0.003, (3, len(points)))
    thetas = resampling.refine(law.theta, shifts, rows, 0.005)
    for row, theta in zip(rows, thetas, strict=True):
        searched = descend(law.theta, shifts, row, 0.005)
        assert searched is not None
        np.testing.assert_allclose(shares_of(theta, shifts)[0], shares_of(searched[0], shifts)[0], atol=1e-5)


@pytest.mark.long
def test_the_true_ratios_lie_in_their_intervals() -> None:
    needs, size, budget = 0.65, SIZES[3], BUDGETS[2]
    wanted = true_loss(size, budget, needs)
    tokens = budget / brentq(lambda d: true_loss(size, d) - wanted, budget / 10, budget * 10)
    held = {"parameters": 0, "tokens": 0}
    for seed in range(DRAWS):
        arms = fitted(study(seed, needs), 200)
        for currency, true in (("parameters", needs), ("tokens", tokens)):
            found = equivalence(arms["arm"], arms["base"], currency, size, budget)  # type: ignore[arg-type]
            assert isinstance(found, Equivalence), found
            assert 1.02 < found.high / found.low < 1.5
            held[currency] += found.low <= true <= found.high
    least, most = (0.9 * DRAWS, 0.99 * DRAWS) if DRAWS >= 100 else (DRAWS - 1, DRAWS)
    assert all(least <= count <= most for count in held.values()), held


def test_budgets_of_one_run_are_no_independent_points() -> None:
    points = study(1)
    arms = fitted(points, 200)
    # The same losses, said to be runs of their own.
    apart = [replace(point, seed=index) for index, point in enumerate(points)]
    factors = draw_factors([point.cluster for point in apart], 200, 0)
    wide = equivalence(arms["arm"], arms["base"], "parameters", SIZES[3], BUDGETS[2])
    narrower = {
        name: replace(arm, refits=refits(arm.law, [p for p in apart if p.arm == name], factors, 0.004))
        for name, arm in arms.items()
    }
    narrow = equivalence(narrower["arm"], narrower["base"], "parameters", SIZES[3], BUDGETS[2])
    assert isinstance(wide, Equivalence) and isinstance(narrow, Equivalence)
    assert wide.high / wide.low > narrow.high / narrow.low


def test_flops_are_what_the_parameters_cost() -> None:
    arms = fitted(study(2, noise=1e-4), 2)
    costly = [replace(point, flops=1.5 * point.flops) for point in arms["arm"].points]
    plain = equivalence(arms["arm"], arms["base"], "flops", SIZES[2], BUDGETS[1])
    dear = equivalence(replace(arms["arm"], points=costly), arms["base"], "flops", SIZES[2], BUDGETS[1])
    matched = equivalence(arms["arm"], arms["base"], "parameters", SIZES[2], BUDGETS[1])
    assert (
        isinstance(plain, Equivalence) and isinstance(dear, Equivalence) and isinstance(matched, Equivalence)
    )
    assert dear.value == pytest.approx(1.5 * plain.value)
    # Here a parameter costs 6 FLOPs a token at every size.
    assert plain.value == pytest.approx(matched.value, rel=1e-3) == pytest.approx(0.65, rel=0.05)


def test_no_ratio_outside_the_data() -> None:
    arms = fitted(study(4), 20)
    beyond = equivalence(arms["arm"], arms["base"], "parameters", SIZES[-1], BUDGETS[0])
    assert (
        isinstance(beyond, Refused)
        and "base would need" in beyond.reason
        and "outside its data" in beyond.reason
    )
    below = equivalence(arms["arm"], arms["base"], "parameters", SIZES[0] / 2, BUDGETS[0])
    assert isinstance(below, Refused) and "outside arm's data" in below.reason
    late = equivalence(arms["arm"], arms["base"], "tokens", SIZES[2], BUDGETS[-1])
    assert isinstance(late, Refused) and "tokens for this loss" in late.reason
    whole = curve(arms["arm"], arms["base"], "parameters", BUDGETS[-1])
    kinds = [isinstance(one, Equivalence) for one in whole]
    assert kinds[0] and not kinds[-1] and kinds == sorted(kinds, reverse=True)


def test_a_law_that_does_not_fit_is_refused() -> None:
    found = analyse(study(5, bump=0.03), draws=20)
    base, arm = found.arms
    assert isinstance(base.joint, FittedLaw)
    assert isinstance(arm.joint, Refused) and "does not fit" in arm.joint.reason
    refused = arm.quoted("tokens")
    assert isinstance(refused, Refused) and refused.reason.startswith("arm: the law does not fit")


@pytest.mark.long
def test_fits_that_fit_are_seldom_refused() -> None:
    rejected = 0
    for seed in range(4):
        points = study(seed)
        noise = noise_floor(points)
        own = [point for point in points if point.arm == "base"]
        assert not isinstance(noise, Refused)
        law = fit_law(own, JOINT, noise.deviation)
        assert isinstance(law, ScalingLaw)
        found = residuals(law, own, noise)
        assert not isinstance(found, Refused)
        rejected += misfit(found, noise) is not None
    assert rejected <= 1


def test_one_seed_says_nothing_about_noise() -> None:
    found = analyse(study(6, seeds=1), draws=20)
    assert isinstance(found.noise, Refused)
    refused = found.arms[1].quoted("parameters")
    assert isinstance(refused, Refused) and "two seeds" in refused.reason


def test_as_many_values_as_constants_are_no_fit() -> None:
    points = [point for point in study(7) if point.arm == "base" and point.size in ("n0", "n1", "n2")]
    found = fit_law([point for point in points if point.tokens == BUDGETS[0]], ("parameters",))
    assert isinstance(found, Refused) and "3 values of parameters" in found.reason


def test_the_largest_size_is_predicted() -> None:
    points = [point for point in study(8) if point.arm == "base"]
    noise = noise_floor(points)
    assert not isinstance(noise, Refused)
    factors = draw_factors([point.cluster for point in points], 100, 0)
    found = held_out(points, JOINT, noise, lambda law, own: refits(law, own, factors, noise.deviation))
    assert not isinstance(found, Refused)
    assert [one.tokens for one in found] == list(BUDGETS) and {one.size for one in found} == {"n5"}
    for one in found:
        assert one.inside and one.predicted == pytest.approx(true_loss(SIZES[-1], one.tokens), rel=0.02)
        assert 1.002 < one.high / one.low < 1.1


@pytest.mark.parametrize("name", ["parameters", "tokens", "flops", "loss"])
@pytest.mark.parametrize("value", [0.0, -1.0, math.nan, math.inf])
def test_what_is_no_measurement(name: str, value: float) -> None:
    point = study(0)[0]
    with pytest.raises(ValueError, match=f"{name} of base, size n0, seed 0 must be a positive number"):
        replace(point, **{name: value})

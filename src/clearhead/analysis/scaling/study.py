"""The analysis of a scaling study: for each arm its laws, how far to trust them, and its ratios to the first arm."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from clearhead.analysis.scaling.equivalence import Currency, Equivalence, FittedArm, curve
from clearhead.analysis.scaling.law import Axis, ScalingLaw, fit_law
from clearhead.analysis.scaling.points import NoiseFloor, Refused, ScalingPoint, noise_floor
from clearhead.analysis.scaling.resampling import draw_factors, interval, refits
from clearhead.analysis.scaling.trust import HeldOut, Residuals, held_out, misfit, residuals

CURRENCIES: tuple[Currency, ...] = ("parameters", "tokens", "flops")
JOINT: tuple[Axis, ...] = ("parameters", "tokens")
DRAWS = 400


@dataclass(frozen=True)
class FittedLaw:
    """A law that fits, its residuals, and each constant with its interval (name -> value, low, high)."""

    law: ScalingLaw
    refits: Sequence[ScalingLaw]
    points: Sequence[ScalingPoint]
    residuals: Residuals
    constants: dict[str, tuple[float, float, float]]


@dataclass(frozen=True)
class ArmScaling:
    """One arm of a study.

    joint:  L(N, D) over all points.     single: L(N) and L(C) at the largest budget, L(D) at the largest size.
    curves: its ratios to the first arm from its smallest size to its largest, by currency: at the largest budget, for
        tokens at the one before it; empty for the first arm.
    """

    name: str
    joint: FittedLaw | Refused
    single: dict[Axis, FittedLaw | Refused]
    held_out: list[HeldOut] | Refused
    curves: dict[Currency, list[Equivalence | Refused]]

    def quoted(self, currency: Currency) -> Equivalence | Refused:
        """The ratio at the largest size that has one, or why there is none."""
        found = self.curves[currency]
        ratios = [one for one in found if isinstance(one, Equivalence)]
        refused = [one for one in found if isinstance(one, Refused)]
        return ratios[-1] if ratios else refused[0]


@dataclass(frozen=True)
class ScalingAnalysis:
    noise: NoiseFloor | Refused
    arms: list[ArmScaling]


def analyse(points: Sequence[ScalingPoint], draws: int = DRAWS, seed: int = 0) -> ScalingAnalysis:
    """All fits and ratios of a study; the arm of the first point is the baseline."""
    names = list(dict.fromkeys(point.arm for point in points))
    noise = noise_floor(points) if points else Refused("nothing has been trained yet")
    if isinstance(noise, Refused):
        nothing: dict[Axis, FittedLaw | Refused] = dict.fromkeys(("parameters", "tokens", "flops"), noise)
        curves: dict[Currency, list[Equivalence | Refused]] = {name: [noise] for name in CURRENCIES}
        return ScalingAnalysis(
            noise,
            [ArmScaling(name, noise, nothing, noise, curves if name != names[0] else {}) for name in names],
        )
    factors = draw_factors([point.cluster for point in points], draws, seed)
    budgets = sorted({point.tokens for point in points})

    def fitted(chosen: Sequence[ScalingPoint], axes: tuple[Axis, ...]) -> FittedLaw | Refused:
        law = fit_law(chosen, axes, noise.deviation)
        if isinstance(law, Refused):
            return law
        found = residuals(law, chosen, noise)
        if isinstance(found, Refused):
            return found
        if (reason := misfit(found, noise)) is not None:
            return reason
        others = refits(law, chosen, factors, noise.deviation)
        return FittedLaw(law, others, chosen, found, _constants(law, others, chosen))

    def redrawn(law: ScalingLaw, chosen: Sequence[ScalingPoint]) -> list[ScalingLaw]:
        return refits(law, chosen, factors, noise.deviation)

    arms: list[ArmScaling] = []
    for name in names:
        own = [point for point in points if point.arm == name]
        top = [point for point in own if point.tokens == budgets[-1]]
        largest = max(point.parameters for point in own)
        joint = fitted(own, JOINT)
        single: dict[Axis, FittedLaw | Refused] = {
            "parameters": fitted(top, ("parameters",)),
            "tokens": fitted([point for point in own if point.parameters == largest], ("tokens",)),
            "flops": fitted(top, ("flops",)),
        }
        unseen = joint if isinstance(joint, Refused) else held_out(own, JOINT, noise, redrawn)
        made = ArmScaling(name, joint, single, unseen, {})
        if arms:
            made = ArmScaling(
                name, joint, single, unseen, {one: _curve(made, arms[0], one, budgets) for one in CURRENCIES}
            )
        arms.append(made)
    return ScalingAnalysis(noise, arms)


def _curve(
    arm: ArmScaling, baseline: ArmScaling, currency: Currency, budgets: Sequence[float]
) -> list[Equivalence | Refused]:
    """By the joint laws; where one of them does not fit, by L(N) at the largest budget, which knows no tokens."""
    tokens = budgets[-2] if currency == "tokens" and len(budgets) > 1 else budgets[-1]
    reason = Refused("")
    for own, other in (
        (arm.joint, baseline.joint),
        (arm.single["parameters"], baseline.single["parameters"]),
    ):
        if isinstance(own, FittedLaw) and isinstance(other, FittedLaw):
            return curve(_named(arm.name, own), _named(baseline.name, other), currency, tokens)
        if not reason.reason:
            name, refused = (arm.name, own) if isinstance(own, Refused) else (baseline.name, other)
            assert isinstance(refused, Refused)
            reason = Refused(f"{name}: {refused.reason}")
        if currency == "tokens":
            break
    return [reason]


def _named(name: str, fit: FittedLaw) -> FittedArm:
    return FittedArm(name, fit.law, fit.refits, fit.points)


def _constants(
    law: ScalingLaw, others: Sequence[ScalingLaw], points: Sequence[ScalingPoint]
) -> dict[str, tuple[float, float, float]]:
    clusters = len({point.cluster for point in points})
    drawn = [other.constants() for other in others]
    found = {}
    for name, value in law.constants().items():
        # Amplitudes go over orders of magnitude, so their logarithm is stretched.
        table = np.log(np.maximum([one[name] for one in drawn], 1e-300))
        low, high = interval(float(np.log(value)), table, clusters, len(law.theta))
        found[name] = (value, float(np.exp(low)), float(np.exp(min(high, 700.0))))
    return found

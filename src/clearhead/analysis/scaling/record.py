"""An analysis as plain values, for `scaling.json`: the numbers for programs, refusals with their reasons."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from clearhead.analysis.scaling.points import Refused
from clearhead.analysis.scaling.study import FittedLaw, ScalingAnalysis

REFUSED = "refused"
"""The key of a value that is not there, whose text says why."""


def record(analysis: ScalingAnalysis) -> dict[str, Any]:
    """The noise floor, and for each arm its laws, its held-out predictions and its ratios to the first arm."""
    noise = analysis.noise
    return {
        "noise": _refused(noise)
        if isinstance(noise, Refused)
        else {"deviation_of_log_loss": noise.deviation, "degrees_of_freedom": noise.freedom},
        "arms": [
            {
                "arm": arm.name,
                "joint": _law(arm.joint),
                "single": {axis: _law(fit) for axis, fit in arm.single.items()},
                "held_out": _refused(arm.held_out)
                if isinstance(arm.held_out, Refused)
                else [{**asdict(one), "inside": one.inside} for one in arm.held_out],
                "ratios": {
                    currency: [_refused(one) if isinstance(one, Refused) else asdict(one) for one in found]
                    for currency, found in arm.curves.items()
                },
            }
            for arm in analysis.arms
        ],
    }


def _law(fit: FittedLaw | Refused) -> dict[str, Any]:
    if isinstance(fit, Refused):
        return _refused(fit)
    return {
        "constants": {
            name: {"value": value, "low": low, "high": high}
            for name, (value, low, high) in fit.constants.items()
        },
        "models": len(fit.points),
        "residual_deviation": fit.residuals.deviation,
        "lack_of_fit": {"F": fit.residuals.ratio, "p": fit.residuals.pvalue},
    }


def _refused(refused: Refused) -> dict[str, Any]:
    return {REFUSED: refused.reason}

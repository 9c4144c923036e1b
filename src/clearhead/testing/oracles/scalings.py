"""Rope scalings in plain numbers: θ'_j and the factor on cos and sin, from the formulas of their sources.

linear:   arXiv 2306.15595, equation 3: positions divided by s
ntk:      bloc97 2023: base · s^(D/(D−2))
dynamic:  emozilla 2023: base · (s L/L0 − (s − 1))^(D/(D−2)) where L > L0
yarn:     arXiv 2309.00071, section 3, with the released ramp, which is linear in j
llama3:   Meta's release: by wavelength 2π/θ_j against L0/low and L0/high
longrope: arXiv 2402.13753: θ_j over short_j or long_j; sqrt(1 + ln s / ln L0)
"""

import math
from typing import Any

from .rotary import Turning


def turning(D: int, parameters: dict[str, Any], L0: int, L: int) -> Turning:
    """For a request of L tokens of a model trained with L0; parameters as in transformers."""
    kind = parameters.get("rope_type", "default")
    base = parameters.get("rope_theta", 10_000.0)
    s = parameters.get("factor", 1.0)
    plain = [base ** (-2 * j / D) for j in range(D // 2)]
    if kind == "default":
        return Turning(plain)
    if kind == "linear":
        return Turning([theta / s for theta in plain])
    if kind in ("ntk", "dynamic"):
        growth = s if kind == "ntk" else max(1.0, s * L / L0 - (s - 1))
        changed = base * growth ** (D / (D - 2))
        return Turning([changed ** (-2 * j / D) for j in range(D // 2)])
    if kind == "yarn":
        return _yarn(D, parameters, L0, base, s, plain)
    if kind == "llama3":
        return Turning([_llama3(theta, parameters, L0, s) for theta in plain])
    assert kind == "longrope"
    factors = parameters["long_factor"] if L > L0 else parameters["short_factor"]
    magnitude = math.sqrt(1 + math.log(s) / math.log(L0)) if s > 1 else 1.0
    return Turning(
        [theta / by for theta, by in zip(plain, factors, strict=True)],
        parameters.get("attention_factor", magnitude),
    )


def _yarn(D: int, parameters: dict[str, Any], L0: int, base: float, s: float, plain: list[float]) -> Turning:
    def pair(turns: float) -> float:
        return D * math.log(L0 / (2 * math.pi * turns)) / (2 * math.log(base))

    low, high = pair(parameters.get("beta_fast", 32)), pair(parameters.get("beta_slow", 1))
    if parameters.get("truncate", True):
        low, high = float(math.floor(low)), float(math.ceil(high))
    low, high = max(low, 0.0), min(high, D - 1.0)
    found = []
    for j, theta in enumerate(plain):
        if j <= low:
            interpolated = 0.0
        elif j >= high:
            interpolated = 1.0
        else:
            interpolated = (j - low) / (high - low)
        found.append(interpolated * theta / s + (1 - interpolated) * theta)

    def grown(scale: float) -> float:
        return 0.1 * scale * math.log(s) + 1

    one, other = parameters.get("mscale"), parameters.get("mscale_all_dim")
    derived = grown(one) / grown(other) if one and other else grown(1.0)
    return Turning(found, parameters.get("attention_factor", derived))


def _llama3(theta: float, parameters: dict[str, Any], L0: int, s: float) -> float:
    wavelength = 2 * math.pi / theta
    low, high = parameters["low_freq_factor"], parameters["high_freq_factor"]
    if wavelength < L0 / high:
        return theta
    if wavelength > L0 / low:
        return theta / s
    smooth = (L0 / wavelength - low) / (high - low)
    return (1 - smooth) * theta / s + smooth * theta

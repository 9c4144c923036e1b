"""Losses of a law with known constants, with noise that a seed, a run and a model add."""

import math

import numpy as np

from clearhead.analysis.scaling.points import ScalingPoint

SIZES = (55e3, 98e3, 154e3, 221e3, 301e3, 498e3)
BUDGETS = (1e6, 2e6, 4e6, 8e6)
E, A, ALPHA, B, BETA = 1.6, 12.0, 0.25, 120.0, 0.35
NOISE = 0.004


def true_loss(parameters: float, tokens: float, needs: float = 1.0) -> float:
    """An arm that needs `needs` of the baseline's parameters."""
    return float(E + A / (parameters / needs) ** ALPHA + B / tokens**BETA)


def study(
    seed: int, needs: float = 0.65, *, noise: float = NOISE, seeds: int = 3, bump: float = 0.0
) -> list[ScalingPoint]:
    """Two arms, "base" and "arm". bump: how far the arm's third size is off its law."""
    rng = np.random.default_rng(seed)
    points = []
    for index, size in enumerate(SIZES):
        for number in range(seeds):
            shared = 0.6 * rng.normal()
            for name, share in (("base", 1.0), ("arm", needs)):
                run = 0.7 * rng.normal()
                for tokens in BUDGETS:
                    error = noise * (shared + run + 0.4 * rng.normal())
                    if name == "arm" and index == 2:
                        error += bump
                    loss = true_loss(size, tokens, share) * math.exp(error)
                    points.append(
                        ScalingPoint(name, f"n{index}", number, size, tokens, 6 * size * tokens, loss)
                    )
    return points

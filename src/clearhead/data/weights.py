"""Weights of several texts as whole ten-thousandths of their sum."""

from collections.abc import Sequence

WHOLE = 10_000


def whole_shares(weights: Sequence[float]) -> list[int]:
    """The weights in ten-thousandths of their sum, by largest remainder. ValueError for one that comes to none."""
    total = sum(weights)
    exact = [weight / total * WHOLE for weight in weights]
    found = [int(one) for one in exact]
    missing = WHOLE - sum(found)
    for i in sorted(range(len(found)), key=lambda i: (found[i] - exact[i], i))[:missing]:
        found[i] += 1
    if min(found) < 1:
        raise ValueError(
            f"a weight of {min(weights):g} is less than 1/{WHOLE} of their sum, {total:g}: raise it or leave it out"
        )
    return found

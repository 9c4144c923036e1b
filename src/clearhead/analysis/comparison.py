"""From samples per arm and seed to the first screen's numbers: each arm's estimate and its paired verdict."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from clearhead.analysis.sections import Headline
from clearhead.analysis.statistics import (
    Better,
    Estimate,
    Floats,
    paired_difference,
    proportion,
    ratio,
    seeds_clause,
    verdict,
)

Samples = Mapping[str, Mapping[int, Floats]]
"""Arm -> seed -> one number per sample; the same samples, in the same order, everywhere."""


@dataclass(frozen=True)
class Comparison:
    """`estimates` by arm; `differences` from the baseline by arm, over the seeds that both have."""

    baseline: str
    better: Better
    digits: int
    estimates: dict[str, Estimate]
    differences: dict[str, Estimate]

    def headlines(self) -> list[Headline]:
        return [Headline(name, estimate, self._verdict(name)) for name, estimate in self.estimates.items()]

    def _verdict(self, name: str) -> str:
        difference = self.differences.get(name)
        return "" if difference is None else verdict(difference, self.better, digits=self.digits)

    def sentence(self) -> str:
        """`DIFF V1 is better than Transformer by 0.12 (0.05 to 0.20). No difference detected for CoCA.`

        Then the number of seeds. With a single arm, its own estimate.
        """
        if not self.differences:
            return " ".join(
                f"{name}: {estimate.text(self.digits)}." for name, estimate in self.estimates.items()
            )
        unclear = [name for name, difference in self.differences.items() if difference.contains_zero]
        parts = []
        for word in ("better", "worse"):
            # "better by 0.12 (...)" -> the first arm of each kind carries the whole clause, the others only "by ...".
            sizes = {name: self._verdict(name).removeprefix(word).strip() for name in self.differences}
            found = [name for name in self.differences if self._verdict(name).startswith(word)]
            if found:
                clauses = [f"{found[0]} is {word} than {self.baseline} {sizes[found[0]]}"]
                parts.append(join([*clauses, *(f"{name} {sizes[name]}" for name in found[1:])]) + ".")
        if unclear:
            against = "" if parts else f" from {self.baseline}"
            parts.append(f"No difference{against} detected for {join(unclear)}.")
        seeds = min(difference.seeds for difference in self.differences.values())
        return " ".join([*parts, seeds_clause(seeds)])


def join(names: Sequence[str]) -> str:
    """`a`, `a and b`, `a, b and c`."""
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"


def compare(
    samples: Samples,
    better: Better,
    *,
    denominators: Floats | None = None,
    proportions: bool = False,
    shares: bool = False,
    digits: int = 2,
) -> Comparison:
    """Compare every arm with the first one, sample by sample and seed by seed.

    `denominators` makes it a ratio of sums (bits over bytes); `proportions` says that the numbers are 0 or 1,
    so that an arm's own interval is Wilson's; `shares` that they lie in 0..1, and so does an arm's interval.
    """
    baseline = next(iter(samples))
    estimates: dict[str, Estimate] = {}
    differences: dict[str, Estimate] = {}
    for name, seeds in samples.items():
        rows = [np.asarray(row, dtype=np.float64) for row in seeds.values()]
        if proportions:
            estimates[name] = proportion([(int(row.sum()), row.size) for row in rows])
        else:
            estimate = ratio(rows, np.ones(rows[0].size) if denominators is None else denominators)
            if shares:
                estimate = replace(estimate, low=max(0.0, estimate.low), high=min(1.0, estimate.high))
            estimates[name] = estimate
        shared = [seed for seed in seeds if seed in samples[baseline]]
        if name != baseline and shared:
            ours, theirs = ([samples[arm][seed] for seed in shared] for arm in (name, baseline))
            differences[name] = paired_difference(ours, theirs, denominators)
    return Comparison(baseline, better, digits, estimates, differences)

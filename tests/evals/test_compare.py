"""The sentences of the first screen."""

from __future__ import annotations

import numpy as np

from clearhead.analysis.comparison import compare, join

RNG = np.random.default_rng(1)
HARD = RNG.normal(2.0, 0.5, 100)


def arm(shift: float, seeds: int = 3) -> dict[int, list[float]]:
    return {seed: (HARD + shift + RNG.normal(0, 0.01, 100)).tolist() for seed in range(seeds)}


def test_better_worse_and_undecided_each_get_their_clause() -> None:
    text = compare(
        {"T": arm(0), "A": arm(-0.2), "B": arm(-0.1), "C": arm(0.3), "D": arm(0)}, "lower"
    ).sentence()
    assert text.startswith("A is better than T by 0.20 (")
    assert " and B by 0.10 (" in text
    assert ". C is worse than T by 0.30 (" in text
    assert "No difference detected for D. 3 seeds per arm." in text


def test_nothing_found_says_from_what() -> None:
    text = compare({"T": arm(0), "D": arm(0)}, "lower").sentence()
    assert text == "No difference from T detected for D. 3 seeds per arm."


def test_one_seed_proves_nothing() -> None:
    assert (
        compare({"T": arm(0, 1), "A": arm(1, 1)}, "higher")
        .sentence()
        .endswith("One seed proves nothing about the methods.")
    )


def test_a_single_arm_is_just_stated() -> None:
    text = compare({"T": {0: [1.0, 0.0], 1: [1.0, 1.0]}}, "higher", proportions=True).sentence()
    assert text.startswith("T: 0.75 (") and text.endswith("n=2, 2 seeds).")


def test_only_seeds_that_both_have_are_paired() -> None:
    result = compare({"T": arm(0, 2), "A": arm(1, 3)}, "higher")
    assert result.estimates["A"].seeds == 3 and result.differences["A"].seeds == 2
    nothing = compare({"T": {0: [1.0]}, "A": {1: [1.0]}}, "higher")
    assert nothing.differences == {}


def test_join() -> None:
    assert [join(["a"]), join(["a", "b"]), join(["a", "b", "c"])] == ["a", "a and b", "a, b and c"]


def test_a_share_stays_between_0_and_1() -> None:
    rows = {"T": {0: [0.0, 0.02], 1: [0.1, 0.08]}}
    assert compare(rows, "higher").estimates["T"].low < 0.0
    assert compare(rows, "higher", shares=True).estimates["T"].low == 0.0

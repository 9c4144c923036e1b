"""Tokens until mastery from a log, and what the section says about arms that differ and arms that do not."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from clearhead.evals.retrieval.mastery import Mastery, MasteryConfig, probe_curve
from clearhead.runs.results import ArmResults, RunResults, SeedResults
from tests.evals.conftest import Subjects
from tests.evals.fakes import FakeModel, uniform


def log(*accuracies: float) -> list[dict[str, Any]]:
    records: list[dict[str, Any]] = []
    for index, accuracy in enumerate(accuracies, start=1):
        records.append({"step": index * 10, "tokens": index * 1000, "loss": 1.0})
        records.append({"step": index * 10, "tokens": index * 1000, "probe": {"needle_accuracy": accuracy}})
    return records


def run(subject: Subjects, *accuracies: float) -> dict[str, Any]:
    one = replace(subject(FakeModel(uniform(8))), metrics=log(*accuracies), budget=9000)
    return Mastery().run(one, MasteryConfig())


def test_the_first_probe_at_the_threshold_counts(subject: Subjects) -> None:
    values = run(subject, 0.1, 0.9, 0.3, 1.0)
    assert (values["mastered"], values["tokens"]) == (True, 2000)
    assert (values["final_accuracy"], values["best_accuracy"], values["n"]) == (1.0, 1.0, 4)


def test_a_run_that_never_gets_there_is_censored_where_it_ended(subject: Subjects) -> None:
    values = run(subject, 0.1, 0.89)
    assert (values["mastered"], values["tokens"], values["budget"]) == (False, 2000, 9000)


def test_no_probe_is_skipped_with_what_to_change(subject: Subjects) -> None:
    assert "train.probe_every" in run(subject)["skipped"]
    assert probe_curve([{"step": 1, "tokens": 5, "loss": 2.0}]) == []


def section_of(**arms: list[tuple[int, bool]]) -> Any:
    found = []
    for name, outcomes in arms.items():
        seeds = {}
        for seed, (tokens, mastered) in enumerate(outcomes):
            values = {
                "threshold": 0.9, "mastered": mastered, "tokens": tokens, "budget": None, "final_accuracy": 0.5,
                "best_accuracy": 0.5, "n": 1,
            }  # fmt: skip
            seeds[seed] = SeedResults(results={"mastery": {"values": values}})
        found.append(ArmResults(name, name, "softmax", seeds))
    return Mastery().section(RunResults({"name": "x"}, {}, found))


def test_arms_that_differ_are_told_apart_and_others_are_not() -> None:
    slow, fast = [(10**6, False)] * 8, [(10**5 * (i + 1), True) for i in range(8)]
    section = section_of(slow=slow, fast=fast, same=slow)
    assert "slow 0 of 8; fast 8 of 8; same 0 of 8" in section.answer
    assert "fast differs from slow (log-rank, Holm-adjusted p = " in section.answer
    assert "No difference detected for same" in section.answer
    assert [headline.text for headline in section.headlines] == ["not reached", "0.40 M", "not reached"]


def test_one_seed_is_named_as_one() -> None:
    assert "One seed proves nothing" in section_of(a=[(10, True)], b=[(20, True)]).answer


def test_nothing_measured_is_missing() -> None:
    section = Mastery().section(RunResults({"name": "x"}, {}, [ArmResults("a", "a", "softmax")]))
    assert section.missing and section.answer == "No results yet."


def test_nothing_reached_is_said_and_not_compared() -> None:
    section = section_of(a=[(10, False)] * 3, b=[(10, False)] * 3)
    assert section.answer.startswith("No run of any arm reached 90% within the budget")
    assert section.charts == []

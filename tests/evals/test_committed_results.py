"""Results that are committed, or of earlier versions, give the numbers that they gave, read as typed values."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from clearhead.evals.retrieval.mastery import Mastery
from clearhead.evals.retrieval.passkey.evaluation import Passkey
from clearhead.report.build import evaluation_sections, headline_number, summary
from clearhead.runs.recipe_io import read_toml
from clearhead.runs.results import ArmResults, RunResults, SeedResults, load_run
from tests.report.example_run import make_run

ROOT = Path(__file__).parents[2]
COMMITTED = ROOT / "docs/results"


def committed(name: str, evaluation: str) -> dict[str, Any]:
    """What a committed report says of an evaluation."""
    answers = json.loads((COMMITTED / name / "summary.json").read_text())["answers"]
    return next(dict(answer) for answer in answers if answer["section"] == evaluation)


def run_of(name: str, evaluation: str, values: dict[tuple[str, int], dict[str, Any]]) -> RunResults:
    """A run with the committed recipe and these values, by arm and seed."""
    recipe = read_toml(COMMITTED / name / "recipe.toml")
    arms = [
        ArmResults(
            arm["name"],
            arm["name"],
            arm["attention"],
            {
                seed: SeedResults(results={evaluation: {"values": found}})
                for (of, seed), found in sorted(values.items())
                if of == arm["name"]
            },
        )
        for arm in recipe["arms"]
    ]
    return RunResults(recipe, {}, arms)


def test_the_committed_mastery_of_recall_is_said_in_the_same_words() -> None:
    rows = json.loads((COMMITTED / "recall/runs.json").read_text())["runs"]
    values = {(row["arm"], row["seed"]): {"threshold": 0.9, "n": 1, **row} for row in rows}
    section = Mastery().section(run_of("recall", "mastery", values))
    told = committed("recall", "mastery")
    assert section.answer == told["answer"]
    found = [(one.arm, headline_number(one, section.digits), one.verdict) for one in section.headlines]
    assert found == [(arm["arm"], arm["text"], arm["verdict"]) for arm in told["arms"]]


def test_the_committed_passkeys_of_extrapolation_are_counted_alike() -> None:
    rows = json.loads((COMMITTED / "extrapolation/runs.json").read_text())
    trained = read_toml(COMMITTED / "extrapolation/recipe.toml")["data"]["length"]

    def cell(length: str, said: str) -> dict[str, Any]:
        right, n = map(int, said.split("/"))
        marks = "1" * right + "0" * (n - right)
        return {
            "form": "native", "length": int(length), "place": "uniform", "n": n, "rule": "exact",
            "correct": {"exact": marks}, "inside": "1" * n, "chance": 0.0,
        }  # fmt: skip

    values = {
        (row["arm"], row["seed"]): {
            "cells": [cell(length, said) for length, said in row["passkeys"].items()],
            "skipped_cells": {},
            "training_length": trained,
            "rope_parameters": None,
            "n": 0,
        }
        for row in rows
    }
    section = Passkey().section(run_of("extrapolation", "passkey", values))
    for one, arm in zip(section.headlines, committed("extrapolation", "passkey")["arms"], strict=True):
        assert one.estimate is not None and one.arm == arm["arm"]
        found = (one.estimate.value, one.estimate.low, one.estimate.high, one.estimate.n)
        assert found == pytest.approx((arm["value"], arm["low"], arm["high"], arm["n"]), rel=1e-9)


def test_files_of_earlier_versions_give_the_same_summary(tmp_path: Path) -> None:
    """The example has no key that came later; its summary was written when values were read as plain dictionaries."""
    run = load_run(make_run(tmp_path / "demo"))
    found = summary(run, evaluation_sections(run))
    told = json.loads((ROOT / "tests/report/example_summary.json").read_text())
    known = {answer["section"]: answer for answer in told["answers"]}
    assert len(found["answers"]) == 5
    for answer in found["answers"]:
        before = known[answer["section"]]
        numbers = [arm.pop(key) for arm in answer["arms"] for key in ("value", "low", "high") if key in arm]
        meant = [arm.pop(key) for arm in before["arms"] for key in ("value", "low", "high") if key in arm]
        assert answer == before
        assert numbers == pytest.approx(meant, rel=1e-9)

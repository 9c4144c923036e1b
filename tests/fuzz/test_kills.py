"""The fuzzer of kills: every kind comes, a plan repeats a trial, what differs is seen; with KILLS=2 it kills too."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.fuzz import comparison, kills
from tests.fuzz.kills import KINDS, PHASES, Reference, Trial

EVENTS = [
    "parent: open run/recipe.toml",
    "parent: start transformer",
    "transformer: model",
    "transformer: step",
    "transformer: open run/metrics.jsonl",
    "transformer: within run/checkpoints/checkpoint-4/model.safetensors",
    "transformer: open run/.model.part/config.json",
    "transformer: evaluation",
    "parent: start diff-v1",
    "parent: open run/report.html",
]


def reference() -> Reference:
    events = [(name, 1) for name in EVENTS]
    return Reference({}, events, kills.phases(events), 5.0)


def test_every_phase_is_known_and_every_kind_comes_once_in_a_round() -> None:
    assert set(reference().phases) == set(PHASES)
    assert len(set(KINDS)) == len(KINDS) == 100
    for seed in range(len(KINDS)):
        trial = kills.draw(seed, reference())
        assert KINDS[seed][1] in {one.action for one in trial.planned}


def test_a_plan_repeats_a_trial() -> None:
    for seed in range(20):
        trial = kills.draw(seed, reference())
        assert kills.draw(seed, reference()) == trial
        assert Trial.of(trial.plan()) == trial


def files(base: Path, *, seconds: float, loss: float = 1.0, weights: bytes = b"abc") -> Path:
    (base / "run" / "model").mkdir(parents=True)
    (base / "run" / "metrics.jsonl").write_text(f'{{"step": 1, "loss": {loss}, "seconds": {seconds}}}\n')
    (base / "run" / "model" / "model.safetensors").write_bytes(weights)
    return base


def test_what_differs_is_seen_and_time_is_not(tmp_path: Path) -> None:
    right = comparison.result(files(tmp_path / "right", seconds=1.0))
    assert comparison.differences(right, comparison.result(files(tmp_path / "same", seconds=2.0))) == []
    other = files(tmp_path / "other", seconds=1.0, loss=1.5, weights=b"abd")
    (other / "run" / ".status.json.part").touch()
    told = comparison.differences(right, comparison.result(other))
    assert [line.partition(" ")[0] for line in told] == [
        "run/.status.json.part",
        "run/metrics.jsonl",
        "run/model/model.safetensors",
    ]


@pytest.mark.skipif("KILLS" not in os.environ, reason="takes a minute; KILLS=2 asks for two kills")
def test_a_few_kills_end_equal() -> None:
    command = [sys.executable, "-m", "tests.fuzz", "--seconds", "0", "--kills", os.environ["KILLS"]]
    done = subprocess.run(command, cwd=Path(__file__).parents[2], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr

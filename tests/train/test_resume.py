"""An interrupted run that is called again ends with the weights of one that was not; several processes train as one."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

RECIPE = """
name = "small"
seeds = [0]
[corpus]
source = "{corpus}"
validation_fraction = 0.2
[tokenizer]
vocab_size = 300
[data]
length = 32
needle_share = 0.3
pair_share = 0.3
[data.needles]
lengths = [24, 32]
needles = [1, 2]
questions = 1
[model]
hidden_size = 16
intermediate_size = 32
num_hidden_layers = 2
num_attention_heads = 2
[train]
tokens = 5120
batch_tokens = 128
learning_rate = 4e-3
save_every = 4
log_every = 2
probe_every = 10
[evaluate]
suites = []
[[arms]]
name = "V1"
attention = "differential"
"""


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("recipe")
    corpus = folder / "corpus"
    corpus.mkdir()
    for i in range(12):
        (corpus / f"{i}.txt").write_text(
            f"Document {i}. " + "The cat sat on the mat and looked around. " * (20 + i)
        )
    path = folder / "small.toml"
    path.write_text(RECIPE.format(corpus=corpus.as_posix()))
    return path


@pytest.fixture(scope="module")
def uninterrupted(recipe: Path) -> Path:
    run = recipe.parent / "uninterrupted"
    subprocess.run(_command(recipe, run), check=True, env=_environment(recipe))
    return run


def _environment(recipe: Path) -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1", "CLEARHEAD_CACHE": str(recipe.parent / "cache")}


def _arguments(recipe: Path, run: Path) -> list[str]:
    return ["train", str(recipe), "--arm", "V1", "--seed", "0", "--out", str(run)]


def _command(recipe: Path, run: Path) -> list[str]:
    return [sys.executable, "-m", "clearhead", *_arguments(recipe, run)]


def _weights(run: Path) -> dict[str, torch.Tensor]:
    return load_file(next(run.glob("arms/*/seed-0/model/model.safetensors")))


def _losses(run: Path) -> list[tuple[int, float]]:
    lines = next(run.glob("arms/*/seed-0/metrics.jsonl")).read_text().splitlines()
    records = [json.loads(line) for line in lines]
    return [(record["step"], record["loss"]) for record in records if "loss" in record]


def test_a_killed_run_ends_with_the_same_weights(recipe: Path, uninterrupted: Path) -> None:
    run = recipe.parent / "killed"
    process = subprocess.Popen(_command(recipe, run), env=_environment(recipe), stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while not list(run.glob("arms/*/seed-0/checkpoints/checkpoint-*/complete")):
        assert process.poll() is None, "training ended before it could be interrupted"
        assert time.monotonic() < deadline
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    assert process.wait() != 0
    assert not list(run.glob("arms/*/seed-0/model")), "it was meant to be interrupted before its end"
    # What a kill in the middle of writing leaves behind must not be resumed from.
    checkpoints = next(run.glob("arms/*/seed-0/checkpoints"))
    assert {path.suffix for path in checkpoints.rglob("*") if path.is_file()} <= {
        ".json",
        ".safetensors",
        "",
    }, "no pickle"
    shutil.copytree(next(checkpoints.glob("checkpoint-*")), checkpoints / "checkpoint-39")
    (checkpoints / "checkpoint-39" / "complete").unlink(missing_ok=True)

    subprocess.run(_command(recipe, run), check=True, env=_environment(recipe))
    expected, found = _weights(uninterrupted), _weights(run)
    assert expected.keys() == found.keys()
    for name, weight in expected.items():
        assert torch.equal(weight, found[name]), name
    assert _losses(run) == _losses(uninterrupted)


def test_two_processes_train_as_one(recipe: Path, uninterrupted: Path) -> None:
    run = recipe.parent / "two"
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--nproc-per-node",
        "2",
        "--master-port",
        "29611",
    ]
    subprocess.run(
        [*command, "-m", "clearhead", *_arguments(recipe, run)], check=True, env=_environment(recipe)
    )
    one, two = _losses(uninterrupted), _losses(run)
    assert [step for step, _ in one] == [step for step, _ in two]
    assert max(abs(a - b) / a for (_, a), (_, b) in zip(one, two, strict=True)) < 1e-4

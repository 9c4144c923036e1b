"""Trainings of one recipe by several processes: `trained` in each of them, what a folder's plan.json lists."""

import json
import os
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch

from clearhead.runs.recipe import Recipe
from clearhead.runs.recipe_io import parse_recipe
from clearhead.train import spread, trainer
from clearhead.train.callbacks import SaveAt
from clearhead.train.pool import TrainingTask, place

STEPS, EVERY = 20, 4
ROWS, LENGTH = 8, 32
# All three in one model, and each by itself.
MODELS: dict[str, list[dict[str, Any]]] = {
    "all": [{"attention": "differential"}, {"attention": "differential_v2"}, {"attention": "collinear"}],
    "V1": [{"attention": "differential"}],
    "V2": [{"attention": "differential_v2"}],
    "CoCA": [{"attention": "collinear"}],
}


def write_corpus(folder: Path) -> None:
    (folder / "corpus").mkdir(parents=True)
    for i in range(8):
        text = f"Document {i}. " + "The cat sat on the mat and looked around. " * (20 + i)
        (folder / "corpus" / f"{i}.txt").write_text(text)


def recipe(folder: Path, model: str, **train: Any) -> Recipe:
    raw = {
        "name": "shared",
        "corpus": {"source": str(folder / "corpus"), "validation_fraction": 0.2},
        "tokenizer": {"vocab_size": 300},
        "data": {
            "length": LENGTH,
            "needles": {"lengths": [24, 32], "needles": [1, 2], "questions": 1},
        },
        "model": {
            "hidden_size": 16,
            "intermediate_size": 32,
            "num_hidden_layers": len(MODELS[model]),
            "num_attention_heads": 4,
            "layers": MODELS[model],
            "tie_word_embeddings": model in ("all", "V2"),
        },
        "train": {
            "tokens": STEPS * ROWS * LENGTH,
            "batch_tokens": ROWS * LENGTH,
            "learning_rate": 4e-3,
            "grad_clip": 0.5,  # less than the gradients of the first steps
            "save_every": EVERY,
            "log_every": 1,
            "probe_every": 10,
            "report_to": [],
            **train,
        },
        "evaluate": {"suites": []},
        "arms": [{"name": "arm"}],
    }
    return parse_recipe(raw, source="test")


class Stopped(Exception):
    """Training was meant to end there."""


def train(folder: Path, run: str, model: str, stop: int | None = None, **train: Any) -> None:
    """Bring the run to its end, or to where step `stop` would begin: nothing has been written since its checkpoint."""

    class Stop(SaveAt):
        def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step == stop:
                raise Stopped

    made = TrainingTask(recipe(folder, model, **train).for_arm("arm", 0), folder / run, "arm")
    if int(os.environ.get("RANK", "0")) == 0:
        place(made)
    if torch.distributed.is_initialized():
        torch.distributed.barrier()
    with patch.object(trainer, "SaveAt", Stop), patch.object(spread, "COMPILER", "aot_eager"):
        try:
            trainer.train_job(made.job, made.directory)
        except Stopped:
            assert stop is not None
        else:
            assert stop is None


def trained(folder: Path, rank: int) -> None:
    # The processes have met already; Accelerate only wants to see that they could.
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}
    for planned in json.loads((folder / "plan.json").read_text()):
        train(folder, **planned)


def plan(folder: Path, runs: list[dict[str, Any]]) -> None:
    (folder / "plan.json").write_text(json.dumps(runs))


def records(folder: Path, run: str) -> list[dict[str, Any]]:
    lines = (folder / run / "metrics.jsonl").read_text().splitlines()
    found = [record for line in lines if "loss" in (record := json.loads(line))]
    assert [record["step"] for record in found] == list(range(1, len(found) + 1))
    return found


def probes(folder: Path, run: str) -> list[float]:
    """The losses on held-out text."""
    found = [json.loads(line) for line in (folder / run / "metrics.jsonl").read_text().splitlines()]
    return [record["probe"]["validation_loss"] for record in found if "probe" in record]


def apart(folder: Path, run: str, other: str, key: str = "loss") -> float:
    """The largest relative difference of a logged number, over all steps."""
    both = zip(records(folder, run), records(folder, other), strict=True)
    return max(abs(a[key] - b[key]) / abs(b[key]) for a, b in both)

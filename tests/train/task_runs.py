"""Trainings of every task, small enough for a test, and one that is killed on the way."""

import json
import os
import signal
from pathlib import Path
from typing import Any

import torch
from tests.train import small

from clearhead.runs.recipe import Recipe
from clearhead.runs.recipe_io import parse_recipe
from clearhead.train import trainer
from clearhead.train.pool import TrainingTask, place

STEPS, SAVE_EVERY = 8, 3
TASKS = ("masked", "classify", "seq2seq")
DATA: dict[str, dict[str, Any]] = {
    "masked": {"length": 32, "masks": {"whole_words": True}},
    "classify": {"length": 32, "examples": {"source": "pairs.jsonl", "target_field": "label"}},
    "seq2seq": {
        "length": 32,
        "examples": {"source": "pairs.jsonl", "target_field": "answer", "target_length": 8},
    },
    "gaps": {"length": 32, "examples": {"target_length": 8}},
}


def write_data(folder: Path) -> Path:
    """A corpus, and forty texts with labels and answers beside it."""
    corpus = small.write_corpus(folder / "corpus")
    lines = [
        {
            "text": f"The cat number {i} sat on a mat.",
            "label": "odd" if i % 2 else "even",
            "answer": f"mat {i % 5}",
        }
        for i in range(40)
    ]
    (folder / "pairs.jsonl").write_text("\n".join(json.dumps(line) for line in lines))
    return corpus


def recipe(corpus: Path, kind: str, **more: Any) -> Recipe:
    """Two arms. kind: a task, or "gaps" for seq2seq of text."""
    data = json.loads(json.dumps(DATA[kind]))
    if "source" in data.get("examples", {}):
        data["examples"]["source"] = str(corpus.parent / data["examples"]["source"])
    raw = {
        "name": "small",
        "task": "seq2seq" if kind == "gaps" else kind,
        "corpus": {"source": str(corpus), "validation_fraction": 0.2},
        "tokenizer": {"vocab_size": 300},
        "data": data,
        "model": {
            "hidden_size": 16,
            "intermediate_size": 32,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
        },
        "train": {
            "tokens": STEPS * 128,
            "batch_tokens": 128,
            "learning_rate": 4e-3,
            "save_every": SAVE_EVERY,
            "log_every": 2,
            "probe_every": 4,
            "report_to": [],
        },
        "arms": [{"name": "Transformer"}, {"name": "V2", "attention": "differential_v2"}],
        **more,
    }
    return parse_recipe(raw, source="test")


def train(
    corpus: Path, run: Path, kind: str, arm: str = "V2", environment: dict[str, str] | None = None
) -> None:
    """Train one arm with one thread in this process."""
    os.environ |= environment or {}
    torch.set_num_threads(1)
    made = TrainingTask(recipe(corpus, kind).for_arm(arm, 0), run, arm)
    place(made)
    trainer.train_job(made.job, run)


def train_until_killed(corpus: Path, run: Path, kind: str, environment: dict[str, str]) -> None:
    """Die while the second checkpoint is written."""
    mark = trainer.mark_complete

    def die(folder: Path) -> None:
        if folder.name == f"checkpoint-{2 * SAVE_EVERY}":
            os.kill(os.getpid(), signal.SIGKILL)
        mark(folder)

    trainer.mark_complete = die
    train(corpus, run, kind, "V2", environment)

"""A training small enough for a test, and processes that have everything loaded before they start."""

import multiprocessing
import os
import signal
from collections.abc import Callable
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import Any

import torch

from clearhead.runs.recipe import Recipe
from clearhead.runs.recipe_io import parse_recipe
from clearhead.train import trainer
from clearhead.train.pool import TrainingTask, place

STEPS = 12
SAVE_EVERY = 3


def write_corpus(folder: Path) -> Path:
    """Twelve little documents of real words, enough for a tokenizer that has words of its own."""
    folder.mkdir(parents=True)
    for i in range(12):
        text = f"Document {i}. " + "The cat sat on the mat and looked around. " * (20 + i)
        (folder / f"{i}.txt").write_text(text)
    return folder


def recipe(corpus: Path, **train: Any) -> Recipe:
    raw = {
        "name": "small",
        "corpus": {"source": str(corpus), "validation_fraction": 0.2},
        "tokenizer": {"vocab_size": 300},
        "data": {
            "length": 32,
            "needle_share": 0.3,
            "pair_share": 0.3,
            "needles": {"lengths": [24, 32], "needles": [1, 2], "questions": 1},
        },
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
            "probe_every": 6,
            **train,
        },
        "evaluate": {"suites": []},
        "arms": [{"name": "V1", "attention": "differential"}],
    }
    return parse_recipe(raw, source="test")


def task(corpus: Path, run: Path) -> TrainingTask:
    """The one job of the recipe, placed in `run`."""
    made = TrainingTask(recipe(corpus).for_arm("V1", 0), run, "V1")
    place(made)
    return made


def process(target: Callable[..., None], *arguments: Any) -> ForkServerProcess:
    """A process that runs `target`. The first one costs the imports, the others share them."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["clearhead.train.trainer", "tests.train.small"])
    started = context.Process(target=target, args=arguments)
    started.start()
    return started


def train(corpus: Path, run: Path, environment: dict[str, str]) -> None:
    """Train with one thread in this process."""
    os.environ |= environment
    torch.set_num_threads(1)
    made = task(corpus, run)
    trainer.train_job(made.job, run)


def train_until_killed(corpus: Path, run: Path, environment: dict[str, str], step: int) -> None:
    """Die while the checkpoint of `step` is written: all its files are there, but nothing says that it is complete."""
    mark = trainer.mark_complete

    def die(folder: Path) -> None:
        if folder.name == f"checkpoint-{step}":
            os.kill(os.getpid(), signal.SIGKILL)
        mark(folder)

    trainer.mark_complete = die
    train(corpus, run, environment)

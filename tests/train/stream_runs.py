"""A training on streamed text in one or several processes, which writes down every row that it is given."""

import hashlib
import json
import os
import signal
import socket
from pathlib import Path
from typing import Any

import torch
from tests.train import small

from clearhead.data import streams, tokenizing
from clearhead.runs.recipe import Recipe
from clearhead.runs.recipe_io import parse_recipe
from clearhead.train import trainer
from clearhead.train.pool import TrainingTask, place

STEPS, ROWS, LENGTH, SAVE_EVERY = 12, 4, 32, 3
PATIENCE = 300


def write_texts(folder: Path) -> Path:
    """Two texts: a JSON-lines file and a folder."""
    (folder / "books").mkdir(parents=True)
    lines = [json.dumps({"text": f"page {i}: " + "the cat sat on the mat " * (5 + i % 7)}) for i in range(80)]
    (folder / "web.jsonl").write_text("\n".join(lines))
    for i in range(30):
        (folder / "books" / f"{i:02}.txt").write_text(f"book {i}. " + "and looked around. " * (9 + i % 5))
    return folder


def small_shards() -> None:
    """Several shards of so little text."""
    setattr(streams, "SHARD_BYTES", 2000)  # noqa: B010  it is tokenizing's
    tokenizing.SHARD_BYTES, tokenizing.BATCH_BYTES = 2000, 300


def recipe(texts: Path, **data: Any) -> Recipe:
    """Seven tenths web, three tenths books; twelve steps."""
    sources = [
        {"source": str(texts / "web.jsonl"), "weight": 0.7},
        {"source": str(texts / "books"), "weight": 0.3},
    ]
    raw = {
        "name": "streamed",
        "corpus": {"sources": sources, "validation_fraction": 0.2},
        "tokenizer": {"vocab_size": 300},
        "data": {"length": LENGTH, **data},
        "model": {
            "hidden_size": 16,
            "intermediate_size": 32,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
        },
        "train": {
            "tokens": STEPS * ROWS * LENGTH,
            "batch_tokens": ROWS * LENGTH,
            "save_every": SAVE_EVERY,
            "log_every": 1,
        },
        "evaluate": {"suites": []},
        "arms": [{"name": "V1", "attention": "differential"}, {"name": "Plain"}],
    }
    return parse_recipe(raw, source="test")


def task(texts: Path, run: Path, arm: str = "V1") -> TrainingTask:
    """A job of the recipe, placed in `run`."""
    made = TrainingTask(recipe(texts).for_arm(arm, 0), run, arm)
    place(made)
    return made


def train(
    texts: Path, run: Path, environment: dict[str, str], log: Path | None, stop: int = 0, arm: str = "V1"
) -> None:
    """Train; each row that this process is given goes to `log` as "number digest". stop: die when that step begins."""
    os.environ |= environment
    torch.set_num_threads(1)
    small_shards()
    if log is not None:
        given = trainer._Rows.__getitem__

        def logged(self: Any, index: int) -> dict[str, Any]:
            row = given(self, index)
            digest = hashlib.sha256(row["input_ids"].tobytes() + row["labels"].tobytes()).hexdigest()
            with log.open("a") as file:
                file.write(f"{index} {digest[:16]}\n")
            return row

        trainer._Rows.__getitem__ = logged  # type: ignore[method-assign]
    if stop:
        step = trainer.ComparisonTrainer.training_step
        begun = 0

        def mortal(self: Any, *arguments: Any, **named: Any) -> Any:
            nonlocal begun
            # Checkpoints of earlier processes count.
            begun = self.state.global_step + 1
            if begun >= stop:
                os.kill(os.getpid(), signal.SIGKILL)
            return step(self, *arguments, **named)

        trainer.ComparisonTrainer.training_step = mortal  # type: ignore[method-assign]
    made = task(texts, run, arm)
    trainer.train_job(made.job, run)


def together(texts: Path, run: Path, world: int, logs: Path, stop: int = 0) -> list[int | None]:
    """Train in `world` processes; what each was given is in `logs`/RANK. Exit codes."""
    logs.mkdir(parents=True)
    environment: dict[str, str] = {name: os.environ[name] for name in ("CLEARHEAD_CACHE", "OMP_NUM_THREADS")}
    if world > 1:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = str(free.getsockname()[1])
        environment |= {"WORLD_SIZE": str(world), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    started = []
    for rank in range(world):
        own = {"RANK": str(rank), "LOCAL_RANK": str(rank)} if world > 1 else {}
        started.append(small.process(train, texts, run, {**environment, **own}, logs / str(rank), stop))
    for one in started:
        one.join(PATIENCE)
    return [one.exitcode for one in started]

"""Checkpoints of encoders and encoder-decoders, small enough for a test, and trainings that begin with them."""

import json
import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tests.train import task_runs
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from clearhead.data.prepare import prepare
from clearhead.models.tasks import task_of
from clearhead.runs.recipe import Recipe
from clearhead.runs.recipe_io import parse_recipe
from clearhead.runs.rows import data_spec
from clearhead.train import trainer
from clearhead.train.begun import begun_model
from clearhead.train.pool import TrainingTask, place

ARMS = [
    {"name": "Transformer"},
    {"name": "V1", "attention": "differential", "attention_options": {"lambda_init": 0.7}},
]
FAMILIES = {"masked": "encoders", "classify": "encoders", "seq2seq": "pairs"}


def project(temporary: pytest.TempPathFactory) -> Iterator[Path]:
    """A corpus with labelled examples beside it, and in encoders/ and pairs/ untrained twins with its tokenizer."""
    made = task_runs.write_data(temporary.mktemp("project"))
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CLEARHEAD_CACHE", str(made.parent / "cache"))
        write_checkpoints(made)
        yield made
    torch.set_num_threads(threads)


def weights(folder: Path) -> dict[str, Tensor]:
    return load_file(folder / "model.safetensors")


def begun(made: Recipe, arm: str, folder: Path, seed: int = 0) -> Any:
    folder.mkdir(exist_ok=True)
    return begun_model(made.for_arm(arm, seed), folder, prepare(data_spec(made)))


def checkpoint(corpus: Path, arm: str = "v1", seed: int = 0, family: str = "encoders") -> Path:
    return corpus.parent / family / "arms" / arm / f"seed-{seed}" / "model"


def write_checkpoints(corpus: Path) -> None:
    """Untrained twins for two seeds as a run has them: encoders/ and pairs/; what no training can begin with beside."""
    root = corpus.parent
    for kind, family in (("masked", "encoders"), ("seq2seq", "pairs")):
        made = task_runs.recipe(corpus, kind, arms=ARMS)
        data = prepare(data_spec(made))
        for arm in made.arms:
            for seed in (0, 1):
                torch.manual_seed(seed)
                folder = root / family / "arms" / arm.slug / f"seed-{seed}" / "model"
                task_of(kind).untrained(made.for_arm(arm.name, seed), data).save_pretrained(folder)
                data.tokenizer.save_pretrained(folder)
    for seed, slug in ((0, "transformer"), (1, "v1")):
        (root / "mixed").mkdir(exist_ok=True)
        (root / "mixed" / f"seed-{seed}").symlink_to(root / "encoders" / "arms" / slug / "seed-0")
    (root / "bert").mkdir()
    (root / "bert" / "config.json").write_text('{"model_type": "bert"}')
    tokenizer = PreTrainedTokenizerFast.from_pretrained(root / "encoders/arms/v1/seed-0/model")
    plain = json.loads(tokenizer.backend_tokenizer.to_str())
    vocabulary = plain["model"]["vocab"]
    last, before = sorted(vocabulary, key=vocabulary.__getitem__)[-2:]
    vocabulary[last], vocabulary[before] = vocabulary[before], vocabulary[last]
    tokenizer.save_pretrained(root / "other")
    (root / "other" / "tokenizer.json").write_text(json.dumps(plain))


def recipe(corpus: Path, kind: str, **train: Any) -> Recipe:
    """Both twins trained on, each seed from its own checkpoint."""
    family = corpus.parent / FAMILIES[kind] / "arms"
    base = task_runs.recipe(corpus, kind, seeds=[0, 1])
    raw = json.loads(base.model_dump_json(exclude_none=True))
    raw["tokenizer"] = {"source": str(family / "transformer" / "seed-0" / "model")}
    raw["model"] = {"from": str(family / "{arm}" / "seed-{seed}" / "model")}
    raw["train"] |= train
    raw["arms"] = [{"name": arm["name"]} for arm in ARMS]
    return parse_recipe(raw, source="test")


def train(made: Recipe, run: Path, environment: dict[str, str] | None = None) -> None:
    """Train the differential twin with one thread in this process."""
    os.environ |= environment or {}
    torch.set_num_threads(1)
    task = TrainingTask(made.for_arm("V1", 0), run, "V1")
    place(task)
    trainer.train_job(task.job, run)


def train_until_killed(made: Recipe, run: Path, environment: dict[str, str]) -> None:
    """Die while the second checkpoint is written."""
    mark = trainer.mark_complete

    def die(folder: Path) -> None:
        if folder.name == f"checkpoint-{2 * task_runs.SAVE_EVERY}":
            os.kill(os.getpid(), signal.SIGKILL)
        mark(folder)

    trainer.mark_complete = die
    train(made, run, environment)

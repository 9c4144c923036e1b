"""The training loop of `clearhead train` beside a bare PyTorch loop: processor time of the same steps, in one process.

Both take the same rows, model, optimiser, schedule and clipping. The bare loop does nothing else: no log, no
checkpoint, no bits per byte, no status. In turns of `--steps` steps each in one process: what one turn of the recipe's
loop took, from the end of the bare one before it, is divided by what the bare one took behind it. Logs and checkpoints
come as often as the recipe of the shape has them (`demo` as recipes/demo.toml, `wide` by the defaults), without probes;
status.json, which is written once a second, by the processor's clock, as on a machine that does nothing else.
"""

import argparse
import shutil
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import torch
import torch.nn.functional as F
from torch import nn
from torch.optim.lr_scheduler import LambdaLR
from transformers import TrainerCallback

from clearhead.bench.machine import facts, versions
from clearhead.bench.measure import spread
from clearhead.bench.records import append
from clearhead.models.tasks import TrainingRows, collate
from clearhead.runs.recipe import Job, Train
from clearhead.runs.recipe_io import load_recipe
from clearhead.train import callbacks, trainer
from clearhead.train.optimiser import adamw, course
from clearhead.train.pool import TrainingTask, place

DEMO = Path(__file__).parents[1] / "recipes" / "demo.toml"
SHAPES: dict[str, list[str]] = {
    "demo": [],
    "wide": [
        "data.length=256",
        "data.needles.lengths=[18, 256]",
        "tokenizer.vocab_size=2048",
        "model={hidden_size=256, num_hidden_layers=4, num_attention_heads=8}",
        "train.batch_tokens=2048",
        "train.save_every=200",
        "train.log_every=10",
    ],
}


def bare(model: nn.Module, rows: TrainingRows, train: Train, rows_per_step: int) -> Callable[[], None]:
    """A function that takes the next step."""
    optimiser = adamw(model, train)
    schedule = LambdaLR(optimiser, course(train))
    parameters = list(model.parameters())
    step = 0

    def take() -> None:
        nonlocal step
        batch = collate([rows[step * rows_per_step + row] for row in range(rows_per_step)])
        labels = F.pad(batch.pop("labels")[:, 1:], (0, 1), value=-100)
        logits = model(**batch, use_cache=False).logits
        F.cross_entropy(logits.flatten(0, 1), labels.flatten()).backward()
        nn.utils.clip_grad_norm_(parameters, train.grad_clip)
        optimiser.step()
        schedule.step()
        optimiser.zero_grad()
        step += 1

    return take


class Turns(TrainerCallback):
    """Lets the bare loop take its turn after every `steps` steps, and notes what both took."""

    def __init__(self, steps: int, take: Callable[[], None]) -> None:
        self.steps, self.take = steps, take
        self.began = 0.0
        self.found: list[tuple[float, float]] = []

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.began = time.process_time()

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        # At the beginning of the next step the last one's log and checkpoint are written.
        if state.global_step % self.steps or not state.global_step:
            return
        ended = time.process_time()
        for _ in range(self.steps):
            self.take()
        self.began, began = time.process_time(), self.began
        self.found.append((ended - began, self.began - ended))


def measure(job: Job, folder: Path, steps: int) -> list[tuple[float, float]]:
    """Seconds of a turn of the recipe's loop and of the bare one behind it; the first, which warms up, left out."""
    made = TrainingTask(job, folder, job.arm)
    place(made)
    built: list[Turns] = []
    make = trainer.ComparisonTrainer

    def beside(model: Any, *rest: Any, **more: Any) -> Any:
        torch.manual_seed(job.seed)
        twin = type(model)(model.config)
        twin.load_state_dict(model.state_dict())
        rows = rest[2]
        built.append(Turns(steps, bare(twin, rows, job.train, job.train.batch_tokens // job.data.length)))
        return make(model, *rest, **more)

    # Only `StatusCallback` and the journal ask it there.
    processor = SimpleNamespace(monotonic=time.process_time)
    with (
        patch.object(callbacks, "time", processor),
        patch.object(trainer, "ComparisonTrainer", beside),
        patch.object(trainer, "SaveAt", lambda kept: built[0]),
    ):
        trainer.train_job(made.job, made.directory)
    return built[0].found[1:]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shape", choices=("all", *SHAPES), default="all")
    parser.add_argument("--arms", nargs="+", default=["Transformer", "DIFF V1"])
    parser.add_argument("--turns", type=int, default=15)
    parser.add_argument("--steps", type=int, default=40, help="of a turn")
    parser.add_argument("--out", type=Path, default=Path("runs/bench/loop_overhead.jsonl"))
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    for shape in SHAPES if arguments.shape == "all" else [arguments.shape]:
        recipe = load_recipe(DEMO, [*SHAPES[shape], "train.probe_every=0"])
        for arm in arguments.arms:
            job = recipe.for_arm(arm, 0)
            # One more turn than is kept, and a step at whose beginning the last one ends.
            tokens = ((arguments.turns + 1) * arguments.steps + 1) * job.train.batch_tokens
            job = job.model_copy(update={"train": job.train.model_copy(update={"tokens": tokens})})
            folder = Path(tempfile.mkdtemp())
            try:
                found = measure(job, folder / "run", arguments.steps)
            finally:
                shutil.rmtree(folder)
            ratio = spread([ours / theirs for ours, theirs in found])
            each = {
                name: spread([turn[index] * 1e3 / arguments.steps for turn in found]).median
                for index, name in enumerate(("clearhead", "bare"))
            }
            print(
                f"{shape:5} {arm:12} {each['clearhead']:8.2f} ms a step, bare {each['bare']:8.2f}: "
                f"{ratio.median:.3f} ({ratio.q1:.3f} to {ratio.q3:.3f}), {len(found)} turns",
                flush=True,
            )
            record = {
                "shape": shape,
                "arm": arm,
                "turns": len(found),
                "steps": arguments.steps,
                "log_every": job.train.log_every,
                "save_every": job.train.save_every,
                "ms": each,
                "ratio": {"median": ratio.median, "q1": ratio.q1, "q3": ratio.q3},
                "clock": "processor",
                "machine": facts(),
                "versions": versions(),
            }
            append(arguments.out, [record])


if __name__ == "__main__":
    main()

"""Files that a training run writes as it goes: metrics.jsonl, status.json and probes of what it has learned."""

import json
import math
import time
from collections.abc import Callable, Collection
from dataclasses import replace
from pathlib import Path
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from clearhead.data.writing import writing
from clearhead.runs.files import plain, read_lines, write_text
from clearhead.runs.recipe import Train
from clearhead.runs.status import read_status, write_status

STATUS_SECONDS = 1.0


class TrainingError(ValueError):
    """Training cannot go on. The message is one sentence that names what to change."""


class Journal:
    """metrics.jsonl of one job. On resumption it forgets what was logged after the checkpoint and counts time on."""

    def __init__(self, path: Path, resumed_step: int) -> None:
        self.path = path
        kept = [record for record in read_lines(path) if record["step"] <= resumed_step]
        write_text(path, "".join(json.dumps(record) + "\n" for record in kept))
        self.loss: float | None = next((r["loss"] for r in reversed(kept) if "loss" in r), None)
        self._before = max((record.get("seconds", 0.0) for record in kept), default=0.0)
        self._started = time.monotonic()

    @property
    def seconds(self) -> float:
        """Training time so far, earlier sessions included."""
        return float(self._before + time.monotonic() - self._started)

    def write(self, record: dict[str, Any]) -> None:
        """Append one record."""
        with writing(self.path), self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(plain(record), allow_nan=False) + "\n")


class StatusCallback(TrainerCallback):
    """Keeps status.json fresh and stops a run whose loss is no longer a number; `loss` is the last before it began."""

    def __init__(self, job_dir: Path, batch_tokens: int, steps: int, loss: float | None = None) -> None:
        self.job_dir = job_dir
        self.batch_tokens = batch_tokens
        self.steps = steps
        self.loss = loss
        self._first_step = 0
        self._started = 0.0
        self._written = 0.0

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._first_step = state.global_step
        self._started = time.monotonic()
        self._write(state)

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if state.is_world_process_zero and time.monotonic() - self._written > STATUS_SECONDS:
            self._write(state)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._write(state)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        loss = (logs or {}).get("loss")
        if loss is None:
            return
        if not math.isfinite(loss):
            raise TrainingError(
                f"the loss is {loss} at step {state.global_step}; lower train.learning_rate (now peaking at "
                f"{args.learning_rate:g}) or train.grad_clip"
            )
        self.loss = loss

    def _write(self, state: TrainerState) -> None:
        if not state.is_world_process_zero:
            return
        self._written = time.monotonic()
        done = state.global_step - self._first_step
        seconds = self._written - self._started
        write_status(
            self.job_dir,
            replace(
                read_status(self.job_dir),
                state="training",
                step=state.global_step,
                steps=self.steps,
                tokens=state.global_step * self.batch_tokens,
                tokens_per_second=done * self.batch_tokens / seconds if done else None,
                seconds_left=(self.steps - state.global_step) * seconds / done if done else None,
                loss=self.loss,
                error=None,
            ),
        )


class SaveAt(TrainerCallback):
    """A checkpoint at each of `steps`, beside the regular ones."""

    def __init__(self, steps: Collection[int]) -> None:
        self.steps = frozenset(steps)

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if state.global_step in self.steps:
            control.should_save = True


class Probe(TrainerCallback):
    """Measures the model every `every` steps and may end the run once it has mastered retrieval."""

    def __init__(
        self, journal: Journal | None, measure: Callable[[], dict[str, float]], train: Train
    ) -> None:
        self.journal = journal
        self.measure = measure
        self.every = train.probe_every
        self.batch_tokens = train.batch_tokens
        self.mastery = train.mastery
        self.stop_at_mastery = train.stop_at_mastery

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if state.global_step % self.every and state.global_step != state.max_steps:
            return
        found = self.measure()
        if self.journal is not None:
            step = state.global_step
            record = {
                "step": step,
                "tokens": step * self.batch_tokens,
                "seconds": self.journal.seconds,
                "probe": found,
            }
            self.journal.write(record)
        if self.stop_at_mastery and found.get("needle_accuracy", 0.0) >= self.mastery:
            control.should_training_stop = True

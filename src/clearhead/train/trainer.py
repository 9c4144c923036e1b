"""Training one job: Hugging Face's Trainer with the same rows for every arm, exact resumption, and true logs."""

import math
import os
import sys
from dataclasses import replace
from functools import cache, partial
from pathlib import Path
from typing import Any

import accelerate.optimizer
import torch
from safetensors.torch import load_model
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import Dataset, SequentialSampler
from transformers import PreTrainedModel, PrinterCallback, Trainer, TrainingArguments, set_seed
from transformers.integrations.integration_utils import TensorBoardCallback
from transformers.utils.logging import disable_progress_bar

from clearhead.data.cache import digest_json
from clearhead.data.prepare import PreparedData, prepare
from clearhead.data.writing import writing
from clearhead.models.tasks import Task, TrainingRows, collate, mean_by_row, task_of
from clearhead.runs.checksums import sync
from clearhead.runs.directory import kept_data
from clearhead.runs.grid import branching_steps
from clearhead.runs.recipe import Job, Train
from clearhead.runs.rows import data_spec
from clearhead.runs.status import read_status, write_status
from clearhead.train import diagnostics
from clearhead.train.begun import (
    Schedules,
    begun_model,
    check_files,
    files_read,
    forget_start,
    new_parameters,
)
from clearhead.train.callbacks import Journal, Probe, SaveAt, StatusCallback, TrainingError
from clearhead.train.checkpoint import (
    drop_old,
    load_optimizer,
    load_random,
    mark_complete,
    newest_complete,
    save_optimizer,
    save_random,
)
from clearhead.train.finishing import drop_checkpoints, finish
from clearhead.train.optimiser import adamw, bare, course
from clearhead.train.position import Stream
from clearhead.train.probe import make_probe
from clearhead.train.sharded import (
    gathered,
    is_sharded,
    load_moments,
    load_weights,
    save_moments,
    save_weights,
)
from clearhead.train.spread import rows_of_device, spread
from clearhead.train.trainable import TrainedPart, choose_part
from clearhead.variants.schedule import begins

KEEP_CHECKPOINTS = 2
# Accelerate looks for this package on the disk twice a step, a thirtieth of a small model's; it does not come and go.
if hasattr(accelerate.optimizer, "is_lomo_available"):
    accelerate.optimizer.is_lomo_available = cache(accelerate.optimizer.is_lomo_available)


def train_job(job: Job, job_dir: Path) -> None:
    """Train `job` in `job_dir` from its last complete checkpoint, or from the start, to a model in `job_dir / "model"`.

    An interrupted run that is called again ends with the same weights as one that was not, bit for bit on CPU with
    the same number of threads. Under torchrun every process calls this; each sees its share of every batch. Raises
    TrainingError for a batch that cannot be shared and for a loss that is not a number.
    """
    world = int(os.environ.get("WORLD_SIZE", "1"))
    first = int(os.environ.get("RANK", "0")) == 0
    if (job_dir / "model" / "config.json").exists():
        if first:
            # Killed while it removed them.
            drop_checkpoints(job, job_dir)
            forget_start(job_dir)
        return
    rows_at_once, accumulated = rows_of_device(job, world)
    data = prepare(data_spec(job), began=kept_data(job_dir))
    # Progress is told through status.json; the bars of saving and loading would only break its display.
    disable_progress_bar()
    set_seed(job.seed)
    task = task_of(job.task)
    model = build_model(job, data) if job.start is None else begun_model(job, job_dir, data)
    part = choose_part(model, job.train, new_parameters(job, job_dir))
    arguments = _arguments(job, job_dir, rows_at_once, accumulated)
    spread(model, job, arguments)
    resume = newest_complete(job_dir / "checkpoints", partial(_note, job_dir, first), first=first)
    resumed_step = 0 if resume is None else int(resume.name.rpartition("-")[2])
    rows = task.rows(job, data)
    stream = Stream(rows, job.train.batch_tokens // job.data.length, job.data.length, data.identity)
    if resume is not None:
        stream.check(resume, resumed_step)
    # Behind the reading: what was read is then what is looked at.
    check_files(job_dir, files_read(job))
    journal = Journal(job_dir / "metrics.jsonl", resumed_step) if first else None
    last = None if journal is None else journal.loss
    progress = StatusCallback(job_dir, job.train.batch_tokens, job.train.steps, last)
    trainer = ComparisonTrainer(
        model,
        arguments,
        task,
        rows,
        bytes_per_label=task.bytes_per_label(job, data),
        diagnosed_tokens=torch.from_numpy(data.validation.tokens[: job.data.length].astype("int64"))[None],
        journal=journal,
        train=job.train,
        part=part,
    )
    _check_shared(trainer, data)
    trainer.stream = stream
    trainer.kept = branching_steps(job)
    trainer.add_callback(SaveAt(trainer.kept))
    trainer.remove_callback(PrinterCallback)
    trainer.add_callback(progress)
    if begins(model):
        trainer.add_callback(Schedules())
    if first and "tensorboard" in job.train.report_to:
        trainer.add_callback(TensorBoardCallback(diagnostics.writer(job_dir / "tensorboard", resumed_step)))
    if job.train.probe_every:
        trainer.add_callback(Probe(journal, make_probe(task, job, data, model), job.train))
    # Whatever has no better name for what it could not write, TensorBoard's events say.
    with writing(job_dir):
        trainer.train(resume_from_checkpoint=None if resume is None else str(resume))
    whole = gathered(model) if is_sharded(model) else model
    if journal is not None:
        finish(job, job_dir, whole, part, data, journal, trainer.state.global_step)


def _note(job_dir: Path, first: bool, text: str) -> None:
    """Say something that a person should know: in the log, and in the status for whoever watches."""
    if first:
        print(text, file=sys.stderr, flush=True)
        before = read_status(job_dir)
        write_status(job_dir, replace(before, note=f"{before.note}; {text}" if before.note else text))


def _check_shared(trainer: Trainer, data: PreparedData) -> None:
    """TrainingError unless every process of this training has the same text; all of them call this."""
    number = int(digest_json(data.identity)[:12], 16)
    found = trainer.accelerator.gather(torch.tensor([number], device=trainer.args.device))
    if len(set(found.tolist())) > 1:
        raise TrainingError("the text has changed while the processes started; start the training again")


def build_model(job: Job, data: PreparedData) -> PreTrainedModel:
    """The untrained model of a job; the seed of torch's generator decides its weights."""
    return task_of(job.task).untrained(job, data)


class ComparisonTrainer(Trainer):
    """Hugging Face's Trainer, with rows in their given order, checkpoints without pickle, bits per byte of text alone.

    The loss is the mean over a batch's rows, over all processes too, of each row's mean over its labels. Weight decay
    falls on matrices only: norms and the λ vectors are left out.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        arguments: TrainingArguments,
        task: Task,
        rows: TrainingRows,
        *,
        bytes_per_label: float | None,
        diagnosed_tokens: Tensor,
        journal: Journal | None,
        train: Train,
        part: TrainedPart | None = None,
    ) -> None:
        self.rows = _Rows(rows)
        optimizer = adamw(model, train, () if part is None else part.partial)
        # Trainer refuses to write checkpoints of sharded models, as its own could not be gone on from; these can.
        arguments.save_only_model = is_sharded(model)
        super().__init__(
            model=model,
            args=arguments,
            train_dataset=self.rows,
            data_collator=collate,
            optimizers=(optimizer, LambdaLR(optimizer, course(train))),
        )
        self.args.save_only_model = False
        # The loss is a mean over rows; Trainer would count labels, over all processes, to scale it by.
        self.model_accepts_loss_kwargs = False
        self.folder = Path(str(arguments.output_dir))
        self.task = task
        self.bytes_per_label = bytes_per_label
        self.diagnosed_tokens = diagnosed_tokens
        self.journal = journal
        self.plan = train
        self.kept: tuple[int, ...] = ()
        self.stream: Stream | None = None
        # What the next record sums up since the last one; a checkpoint between two records keeps it.
        self._loss = torch.zeros(2)
        self._text = torch.zeros(2, dtype=torch.float64)
        self._logged = (0, 0.0)

    def _get_train_sampler(self, train_dataset: Dataset[Any] | None = None) -> SequentialSampler:
        return SequentialSampler(self.rows)

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Tensor],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        is_text = inputs.pop("is_text")
        labels = inputs.pop("labels")
        outputs = model(**inputs, **self.task.forward)
        losses, counted = self.task.losses(outputs.logits, labels)
        with torch.no_grad():
            text = counted & is_text[:, None]
            sums = torch.stack([(losses * text).sum(), text.sum()]).double()
            # Where the loss is: a step that moved it would wait for its device.
            self._text = self._text.to(sums.device) + sums
        loss = mean_by_row(losses, counted)
        self._loss = self._loss.to(loss.device) + torch.stack([loss.detach(), torch.ones_like(loss)])
        return (loss, outputs) if return_outputs else loss

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "loss" not in logs:
            return
        text = self.accelerator.reduce(self._text.float().to(self.args.device), reduction="sum")
        nats, count = text.tolist()
        self._text = torch.zeros_like(self._text)
        # Not Trainer's own mean, which after a resumption leaves out the steps before it.
        total, steps = self.accelerator.gather(self._loss[None]).mean(dim=0).tolist()
        self._loss = torch.zeros_like(self._loss)
        logs = {**logs, "loss": total / steps}
        bits = None
        if count and self.bytes_per_label is not None:
            bits = nats / count / math.log(2) / self.bytes_per_label
        model = self.accelerator.unwrap_model(self.model)
        found = diagnostics.measure(model, self.diagnosed_tokens.to(self.args.device))
        step = self.state.global_step
        tokens = step * self.plan.batch_tokens
        record: dict[str, Any] = {
            "step": step,
            "tokens": tokens,
            "loss": logs["loss"],
            "bits_per_byte": bits,
            "grad_norm": logs.get("grad_norm"),
            "learning_rate": logs.get("learning_rate"),
            **diagnostics.as_record(found),
        }
        if self.journal is not None:
            seconds = self.journal.seconds
            before, then = self._logged
            record["seconds"] = seconds
            record["tokens_per_second"] = (tokens - before) / (seconds - then) if then else None
            self._logged = (tokens, seconds)
            self.journal.write(record)
        extra = diagnostics.as_scalars(found)
        if bits is not None:
            extra["bits_per_byte"] = bits
        super().log({**logs, **extra}, start_time)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        folder = self.folder / f"checkpoint-{self.state.global_step}"
        with writing(folder):
            super()._save_checkpoint(model, trial)
            # Every process has its own file in it.
            self.accelerator.wait_for_everyone()
            if self.args.should_save:
                if self.journal is not None and self.journal.path.exists():
                    sync(self.journal.path)
                if self.stream is not None:
                    self.stream.save(folder, self.state.global_step)
                mark_complete(folder)
                drop_old(self.folder, KEEP_CHECKPOINTS, self.kept)

    def floating_point_ops(self, inputs: dict[str, Any]) -> int:
        """Not counted: Trainer would walk over all parameters in every step for it, and cost.json has it."""
        return 0

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> Any:
        found = super()._get_grad_norm(model, grad_norm=grad_norm)
        # Of a sharded model it is made of every process's part.
        return found.full_tensor() if hasattr(found, "full_tensor") else found

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        folder = Path(output_dir or self.folder)
        if self.plan.parallel.fsdp:
            save_weights(folder, self.accelerator.unwrap_model(self.model))
        elif self.args.should_save and isinstance(self.model, PreTrainedModel):
            self.model.save_pretrained(folder, state_dict=state_dict)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        states = bare(self.optimizer), bare(self.lr_scheduler)
        if self.plan.parallel.fsdp:
            save_moments(Path(output_dir), self.accelerator.unwrap_model(self.model), *states)
        elif self.args.should_save:
            save_optimizer(Path(output_dir), *states)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is None:
            return
        states = bare(self.optimizer), bare(self.lr_scheduler)
        if self.plan.parallel.fsdp:
            load_moments(Path(checkpoint), self.accelerator.unwrap_model(self.model), *states)
        else:
            load_optimizer(Path(checkpoint), *states)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        inner = self.accelerator.unwrap_model(model or self.model)
        if self.plan.parallel.fsdp:
            load_weights(Path(resume_from_checkpoint), inner)
        else:
            load_model(inner, Path(resume_from_checkpoint) / "model.safetensors", device="cpu")

    def _load_scaler(self, checkpoint: str | None) -> None:
        """There is none in float32 and bfloat16; whatever file has its name is not read."""

    def _save_rng_state(self, output_dir: str) -> None:
        Path(output_dir).mkdir(parents=True, exist_ok=True)
        # Of all processes, so that any other number of them goes on with the same sums.
        loss = self.accelerator.gather(self._loss[None].to(self.args.device)).mean(dim=0)
        text = self.accelerator.reduce(self._text.to(self.args.device), reduction="sum")
        save_random(Path(output_dir), self.args.process_index, {"loss": loss, "text": text})

    def _load_rng_state(self, checkpoint: str | None) -> None:
        if checkpoint is not None:
            sums = load_random(Path(checkpoint), self.args.process_index)
            self._loss = sums.get("loss", self._loss)
            if self.args.process_index == 0:
                self._text = sums.get("text", self._text)


class _Rows(Dataset[dict[str, Any]]):
    """The rows with a flag that says which of them are text."""

    def __init__(self, rows: TrainingRows) -> None:
        self.rows = rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {**self.rows[index], "is_text": self.rows.kind(index) == "text"}


def _arguments(job: Job, job_dir: Path, rows_at_once: int, accumulated: int) -> TrainingArguments:
    cuda = torch.cuda.is_available()
    # On CPU bfloat16 autocast took 1.25 times float32's time at width 64 and 0.63 at width 256 (AVX-512 with BF16);
    # "auto" stays in float32 there, which every processor computes.
    bf16 = job.train.precision == "bfloat16" or (
        job.train.precision == "auto" and cuda and torch.cuda.is_bf16_supported()
    )
    return TrainingArguments(
        output_dir=str(job_dir / "checkpoints"),
        per_device_train_batch_size=rows_at_once,
        gradient_accumulation_steps=accumulated,
        activation_checkpointing=job.train.parallel.checkpointing,
        activation_checkpointing_kwargs={"use_reentrant": False},
        max_steps=job.train.steps,
        learning_rate=job.train.learning_rate,
        max_grad_norm=job.train.grad_clip,
        bf16=bf16,
        use_cpu=not cuda,
        ddp_backend="gloo" if not cuda and "WORLD_SIZE" in os.environ else None,
        seed=job.seed,
        logging_strategy="steps",
        logging_steps=job.train.log_every,
        logging_nan_inf_filter=False,
        save_strategy="steps",
        save_steps=job.train.save_every,
        save_total_limit=None,
        # TensorBoard's writer is made apart: it forgets what was logged after the checkpoint that is gone on from.
        report_to=[name for name in job.train.report_to if name != "tensorboard"],
        run_name=f"{job.recipe}/{job.slug}/seed-{job.seed}",
        disable_tqdm=True,
        remove_unused_columns=False,
        dataloader_drop_last=True,
        dataloader_pin_memory=cuda,
    )

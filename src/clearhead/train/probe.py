"""What is measured while a model trains: retrieval on held-out needles, and the loss on held-out text."""

import math
from collections.abc import Callable
from itertools import islice
from typing import Any

from clearhead.data.packing import validation_windows
from clearhead.data.prepare import PreparedData
from clearhead.evals.asking.needle_documents import needle_probe
from clearhead.evals.asking.running import inference, to_batch, token_losses
from clearhead.models.tasks import Task, collate, mean_by_row
from clearhead.runs.recipe import Job
from clearhead.runs.rows import needle_range

NEEDLE_SAMPLES = 64
TEXT_WINDOWS = 16
HELD_OUT_ROWS = 64


def make_probe(task: Task, job: Job, data: PreparedData, model: Any) -> Callable[[], dict[str, float]]:
    """A function that measures `model` now, on what it is trained for."""
    return causal_probe(job, data, model) if task.name == "causal" else held_out_probe(task, job, data, model)


def held_out_probe(task: Task, job: Job, data: PreparedData, model: Any) -> Callable[[], dict[str, float]]:
    """A function that measures the loss of `model` on held-out rows, the first 64 or those of the held-out fold.

    validation_loss in nats a label; validation_bits_per_byte where labels are text, validation_accuracy where not.
    """
    rows = task.held_out(job, data, HELD_OUT_ROWS)
    size = max(1, job.train.batch_tokens // job.data.length)
    batches = [collate(rows[start : start + size]) for start in range(0, len(rows), size)]
    per_label = task.bytes_per_label(job, data)

    def measure() -> dict[str, float]:
        total = right = count = 0.0
        with inference(model):
            for batch in batches:
                inputs = {key: value.to(model.device) for key, value in batch.items()}
                labels = inputs.pop("labels")
                logits = model(**inputs, **task.forward).logits
                losses, counted = task.losses(logits, labels)
                total += float(mean_by_row(losses, counted)) * len(labels)
                right += float((logits.argmax(-1) == labels).sum()) if per_label is None else 0.0
                count += len(labels)
        found = {"validation_loss": total / count}
        if per_label is None:
            return {**found, "validation_accuracy": right / count}
        return {**found, "validation_bits_per_byte": total / count / math.log(2) / per_label}

    return measure


def causal_probe(job: Job, data: PreparedData, model: Any) -> Callable[[], dict[str, float]]:
    """A function that measures a causal language model now.

    needle_accuracy: exact match on 64 validation documents as long and as crowded as training ever makes them.
    validation_loss, validation_bits_per_byte: the first windows of the validation text, nats a token and bits a byte;
        not measured for a job that learns no text.
    """
    length = min(job.data.length, job.data.needles.lengths[1])
    spec = needle_range(job).fitting(length, job.data.needles.needles[1], data.tokenizer)
    learns_text = job.data.needle_share + job.data.pair_share < 1
    full = (
        ids
        for _, ids, _ in validation_windows(data.validation, job.data.length)
        if len(ids) == job.data.length
    )
    windows = list(islice(full, TEXT_WINDOWS)) if learns_text else []
    bytes_per_token = float(data.validation.utf8_bytes.sum()) / data.validation.num_tokens

    def measure() -> dict[str, float]:
        accuracy = needle_probe(model, data.validation, data.tokenizer, spec, samples=NEEDLE_SAMPLES)
        found = {"needle_accuracy": accuracy}
        if windows:
            with inference(model):
                loss = float(token_losses(model, to_batch(windows, model.device)).mean())
            found["validation_loss"] = loss
            found["validation_bits_per_byte"] = loss / math.log(2) / bytes_per_token
        return found

    return measure

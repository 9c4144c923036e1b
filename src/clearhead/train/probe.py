"""What is measured while a model trains: retrieval on held-out needles, and the loss on held-out text."""

import math
from collections.abc import Callable
from itertools import islice

from clearhead.data.packing import validation_windows
from clearhead.data.prepare import PreparedData
from clearhead.evals.asking.needle_documents import needle_probe
from clearhead.evals.asking.running import inference, to_batch, token_losses
from clearhead.models.causal import ClearheadForCausalLM
from clearhead.runs.recipe import Job
from clearhead.runs.rows import needle_range

NEEDLE_SAMPLES = 64
TEXT_WINDOWS = 16


def make_probe(job: Job, data: PreparedData, model: ClearheadForCausalLM) -> Callable[[], dict[str, float]]:
    """A function that measures `model` now.

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

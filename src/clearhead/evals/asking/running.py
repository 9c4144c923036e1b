"""Running a model over texts: inference mode, batches, losses of all tokens."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from clearhead.evals.probing.rescaling import rescaled
from clearhead.positions.length import UnknownLengthsWarning

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@contextmanager
def inference(
    model: PreTrainedModel, implementation: str | None = None, *, length: int | None = None
) -> Iterator[None]:
    """No gradients, eval mode, optionally another attention implementation; all restored afterwards.

    length: tokens of every text that is read inside. A rotary scaling of a Hugging Face model that depends on it is
        settled for it; by itself it would be what earlier and longer texts have left behind.
    """
    training = model.training
    previous = str(model.config._attn_implementation)
    model.eval()
    if implementation is not None:
        model.set_attn_implementation(implementation)
    try:
        with rescaled(model, length=length), torch.inference_mode(), warnings.catch_warnings():
            # Texts that are read together here have one length, or a scaling that does not look at it.
            warnings.simplefilter("ignore", UnknownLengthsWarning)
            yield
    finally:
        model.train(training)
        if implementation is not None:
            model.set_attn_implementation(previous)


def token_losses(model: PreTrainedModel, input_ids: Tensor) -> Tensor:
    """Negative log-likelihood in nats of every token given those before it: (B, L) -> (B, L - 1), float32."""
    logits = model(input_ids=input_ids, use_cache=False).logits[:, :-1]
    return nn.functional.cross_entropy(
        logits.float().flatten(0, 1), input_ids[:, 1:].flatten(), reduction="none"
    ).view(input_ids.shape[0], -1)


def to_batch(rows: list[NDArray[np.int64]], device: torch.device) -> Tensor:
    """Rows of ids, padded with 0 on the right to the longest: under a causal mask that changes nothing before it."""
    longest = max(len(row) for row in rows)
    batch = np.zeros((len(rows), longest), dtype=np.int64)
    for index, row in enumerate(rows):
        batch[index, : len(row)] = row
    return torch.from_numpy(batch).to(device)


def batches(count: int, size: int) -> Iterator[range]:
    """Index ranges of at most `size` that cover `range(count)`."""
    for start in range(0, count, max(1, size)):
        yield range(start, min(start + max(1, size), count))

"""Losses of chosen tokens without ever holding the logits of a whole long text.

Legend: B batch, L tokens, V vocabulary.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.utils.generic import ModelOutput

from clearhead.evals.asking.running import batches, inference
from clearhead.evals.reasons import Unmeasured
from clearhead.evals.subject import Subject

LOGITS_AT_ONCE = 2**24
"""Logits held at a time: 64 MB in float32, whatever the vocabulary."""


def suffix_losses(model: PreTrainedModel, input_ids: Tensor, first: int) -> Tensor:
    """Negative log-likelihood in nats of the tokens from `first` on, given all before: (B, L) -> (B, L − first).

    Float32, or float64 for a float64 model. One pass through the decoder; the head then sees a piece of its states
    at a time, so the memory of the logits does not grow with L (a text of 8,192 tokens over a vocabulary of 49,152
    would take 1.6 GB a row). The head is the model's own, with whatever it does to its logits (scaling, soft caps).
    Raises ValueError unless 1 <= first < L: nothing predicts the first token.
    """
    batch, length = input_ids.shape
    if not 1 <= first < length:
        raise ValueError(
            f"first is {first}; of {length} tokens those from 1 to {length - 1} can be predicted"
        )
    targets = input_ids[:, first:]
    if not isinstance(model, PreTrainedModel) or model.base_model is model:
        return _nats(model(input_ids=input_ids, use_cache=False).logits[:, first - 1 : -1], targets)
    output = model.base_model(input_ids=input_ids, use_cache=False)
    states = output.last_hidden_state[:, first - 1 : -1]
    step = max(1, LOGITS_AT_ONCE // (batch * int(model.config.get_text_config().vocab_size)))
    pieces = []
    for start in range(0, length - first, step):
        piece = slice(start, start + step)
        with _decoder_returns(model.base_model, output, states[:, piece]):
            # The decoder is replaced by its own earlier result, so the ids are read for their shape alone.
            logits = model(input_ids=targets[:, piece], use_cache=False).logits
        pieces.append(_nats(logits, targets[:, piece]))
    return torch.cat(pieces, dim=1)


def row_losses(subject: Subject, rows: NDArray[np.int64], batch_tokens: int) -> NDArray[np.float64]:
    """Losses in nats of rows (N, L) of one length, in batches without padding: (N, L − 1), all but the first token's.

    Raises Unmeasured where they are no numbers.
    """
    length, found = rows.shape[1], []
    with inference(subject.model, length=length):
        for span in batches(len(rows), batch_tokens // length):
            ids = torch.from_numpy(rows[span.start : span.stop]).to(subject.device)
            found.append(suffix_losses(subject.model, ids, 1).double().cpu().numpy())
    return finite(np.concatenate(found))


def finite(losses: NDArray[np.float64]) -> NDArray[np.float64]:
    """The losses themselves. Raises Unmeasured where they are no numbers."""
    if not np.isfinite(losses).all():
        raise Unmeasured("the losses are not numbers")
    return losses


def _nats(logits: Tensor, targets: Tensor) -> Tensor:
    wide = logits if logits.dtype == torch.float64 else logits.float()
    return nn.functional.cross_entropy(wide.flatten(0, 1), targets.flatten(), reduction="none").view_as(
        targets
    )


@contextmanager
def _decoder_returns(decoder: nn.Module, output: ModelOutput, states: Tensor) -> Iterator[None]:
    """Inside, a call of the decoder gives `output` with `states` at once; afterwards it computes again."""
    # A copy of its own output: heads of some models read more of it than the states.
    replayed = copy.copy(output)
    replayed.last_hidden_state = states

    def replay(*arguments: object, **options: object) -> ModelOutput:
        return replayed

    before = decoder.__dict__.get("forward")
    decoder.forward = replay
    try:
        yield
    finally:
        if before is None:
            del decoder.forward
        else:
            decoder.forward = before

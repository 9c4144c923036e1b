"""A model that computes with few bits, emulated: values are rounded to what the bits could hold, then used as they are.

Absmax quantisation to b bits is symmetric, without a zero point, its step made from the values themselves:

    step = max |x| / (2^(b-1) − 1),        x' = step · round(x / step)

* *logits*: of one layer and stream, scaled (q kᵀ / √d) and before the softmax, what a position adds (ALiBi) not
  included; both streams of a differential layer, each with its own step. The maximum is over what the queries of a
  text see;
* *cache*: every key (of each stream) and every value, one step a token and key-value head, as the softmax takes them;
* *weights*: of the decoder's linear layers, embeddings and language-model head left as they are; one step an output
  channel, or a group of neighbouring inputs of it.

All of it is quantise-dequantise in the model's own precision: what it costs in quality is real, nothing is faster or
smaller. No kernel and no library of low-bit arithmetic is involved.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from clearhead.evals.probing.adapter import adapter_of
from clearhead.evals.probing.quantised_attention import ACTIVE, Active, Scheme, absmax

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = ["Active", "Scheme", "absmax", "quantised"]


@contextmanager
def quantised(model: PreTrainedModel, scheme: Scheme) -> Iterator[Active]:
    """Inside, `model` computes attention written out and rounded as `scheme` says; afterwards as before.

    Under `Scheme()` nothing is rounded: the reference that differences are taken from. `calls` of what is given counts
    the attention calls that were rounded; it stays 0 for a model that does not use Hugging Face's attention interface.
    Raises ValueError for a model whose attention or weights cannot be reached.
    """
    with _rounded_weights(model, scheme), adapter_of(model).rounded_attention():
        active = Active(scheme)
        token = ACTIVE.set(active)
        try:
            yield active
        finally:
            ACTIVE.reset(token)


@contextmanager
def _rounded_weights(model: PreTrainedModel, scheme: Scheme) -> Iterator[None]:
    if scheme.weights is None:
        yield
        return
    layers = [
        module
        for module in model.base_model.modules()
        if isinstance(module, nn.Linear) and module is not model.get_output_embeddings()
    ]
    if not layers:
        raise ValueError(f"{type(model).__name__} has no nn.Linear layers whose weights could be quantised")
    kept = [layer.weight.detach().clone() for layer in layers]
    try:
        with torch.no_grad():
            for layer in layers:
                layer.weight.copy_(_channels(layer.weight, scheme.weights, scheme.group))
        yield
    finally:
        with torch.no_grad():
            for layer, weight in zip(layers, kept, strict=True):
                layer.weight.copy_(weight)


def _channels(weight: Tensor, bits: int, group: int | None) -> Tensor:
    """(outputs, inputs), one step an output channel or a group of its inputs."""
    outputs, inputs = weight.shape
    size = group or inputs
    if inputs % size:
        raise ValueError(f"group is {group}; it must divide the {inputs} inputs of every linear layer")
    return absmax(weight.view(outputs, inputs // size, size), bits, (-1,)).view(outputs, inputs)

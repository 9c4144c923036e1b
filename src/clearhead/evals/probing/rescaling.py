"""The same weights under another rotary scaling, or under one whose length is settled.

What a rotary scaling does is a matter of frequencies, not of weights, so a trained model can be looked at under any of
them. Length-dependent scalings (dynamic NTK, LongRoPE) are measured at one length a request: models of this library
take it from each call; those of Hugging Face keep it between calls instead (after a long text a shorter one is read
with the long one's frequencies, and keys in a cache keep those of the step they were written at), so here their
frequencies are computed once for the length that is measured, and put back afterwards.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any

from clearhead.evals.probing.adapter import adapter_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def rescaled(
    model: PreTrainedModel,
    parameters: Mapping[str, Any] | None = None,
    *,
    trained: int | None = None,
    length: int | None = None,
) -> AbstractContextManager[None]:
    """Inside, `model` has the rotary scaling `parameters`; its own comes back afterwards.

    parameters: as in `config.rope_parameters`, `{"rope_type": "dynamic", "factor": 4.0}`, of any scaling of this
        library; the base and the pairing stay the model's unless they are named. None keeps the model's own.
    trained: the training length, from which a scaling counts that is not told `original_max_position_embeddings`.
    length: tokens of a request, generated ones included, for which a length-dependent scaling of a Hugging Face model
        is settled. Models of this library are told by each call.
    Raises ValueError for parameters that are wrong and for a model without rotary positions.
    """
    return adapter_of(model).rescaled(parameters, trained=trained, length=length)

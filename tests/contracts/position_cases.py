"""Every rope scaling with parameters that show at a handful of tokens, and the models that use them."""

from typing import Any

import torch
from torch import Tensor

from clearhead.models import ClearheadForCausalLM
from tests.contracts.model_cases import HEAD, make_model, oracle_of
from tests.oracles.rotary import Turning
from tests.oracles.scalings import turning

# Trained with 8 tokens. The base is small, so that the slow pair turns enough to be seen.
TRAINED = 8
SCALINGS: dict[str, dict[str, Any]] = {
    "default": {"rope_type": "default", "rope_theta": 50.0},
    "linear": {"rope_type": "linear", "rope_theta": 50.0, "factor": 4.0},
    "ntk": {"rope_type": "ntk", "rope_theta": 50.0, "factor": 4.0},
    "dynamic": {"rope_type": "dynamic", "rope_theta": 50.0, "factor": 4.0},
    "yarn": {
        "rope_type": "yarn",
        "rope_theta": 50.0,
        "factor": 4.0,
        "beta_fast": 1.2,
        "beta_slow": 0.1,
        "truncate": False,
    },
    "llama3": {
        "rope_type": "llama3",
        "rope_theta": 50.0,
        "factor": 4.0,
        "low_freq_factor": 0.1,
        "high_freq_factor": 1.4,
    },
    "longrope": {
        "rope_type": "longrope",
        "rope_theta": 50.0,
        "factor": 4.0,
        "short_factor": [1.0, 1.2],
        "long_factor": [1.5, 3.7],
    },
}
BY_LENGTH = ("dynamic", "longrope")


def scaled_model(
    name: str, scaling: str, dtype: torch.dtype = torch.float32, **changes: Any
) -> ClearheadForCausalLM:
    parameters = dict(SCALINGS[scaling])
    return make_model(
        name, dtype=dtype, rope_parameters=parameters, max_position_embeddings=TRAINED, **changes
    )


def turning_of(scaling: str, length: int) -> Turning:
    return turning(HEAD, SCALINGS[scaling], TRAINED, length)


def expected_logits(
    name: str, scaling: str, model: ClearheadForCausalLM, row: Tensor, length: int | None = None
) -> Tensor:
    """The oracle's logits (L, V) of one row (L,) as a request of `length` tokens, by default its own."""
    base = turning_of(scaling, len(row) if length is None else length)
    logits: Tensor = oracle_of(name, "gqa", model, row[None], base=base)[0][0]
    return logits

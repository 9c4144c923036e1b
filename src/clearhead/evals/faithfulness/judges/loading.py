"""Loading a judge's own model: whatever goes wrong on the way is said in one sentence."""

from __future__ import annotations

from typing import Any

import torch
from safetensors import SafetensorError

from clearhead.evals.faithfulness.judges.base import JudgeError
from clearhead.evals.finite import broken_weights
from clearhead.evals.reasons import reason_of
from clearhead.evals.subjects.external import load


def load_judge(kind: Any, source: str) -> tuple[Any, Any]:
    """(tokenizer, model of the Auto class `kind` on its device). Raises JudgeError."""
    from transformers import AutoTokenizer

    import clearhead.models  # noqa: F401  registers the model family with the Auto classes

    try:
        tokenizer = load(AutoTokenizer, source, "the judge's tokenizer")
        model = load(kind, source, "the judge")
    except SafetensorError as error:
        raise JudgeError(f"the judge in {source!r} cannot be loaded: {reason_of(error)}") from error
    except ValueError as error:
        raise JudgeError(str(error)) from error
    if reason := broken_weights(model):
        raise JudgeError(f"the judge in {source!r} cannot judge: {reason}")
    return tokenizer, model.to("cuda" if torch.cuda.is_available() else "cpu").eval()

"""Why something was not measured, in a sentence."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    pass


NEEDS_FAST = "the prompts need a tokenizer with a tokenizer.json, which knows where its tokens lie"
"""Why an evaluation that cuts texts at exact tokens skips a model."""


def reason_of(error: Exception) -> str:
    """The first line of what an error says, as the reason why something was not measured."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]

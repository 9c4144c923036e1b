"""Why something was not measured, in a sentence."""

from __future__ import annotations

from collections.abc import Mapping

NEEDS_FAST = "the prompts need a tokenizer with a tokenizer.json, which knows where its tokens lie"
"""Why an evaluation that cuts texts at exact tokens skips a model."""


class Unmeasured(ValueError):
    """A model, or a part of an evaluation, that cannot be measured: the reason as a result keeps it."""


def unless(reason: str | None) -> None:
    """Goes on without a reason; raises it as Unmeasured if there is one."""
    if reason is not None:
        raise Unmeasured(reason)


def all_of(reasons: Mapping[str, str]) -> str:
    """Every reason once, when nothing is left that was measured."""
    return "; ".join(dict.fromkeys(reasons.values()))


def reason_of(error: Exception) -> str:
    """The first line of what an error says, as the reason why something was not measured."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]

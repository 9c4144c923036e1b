"""What became of one call: right, refused by a sentence, wrong, or crashed."""

import linecache
import re
import traceback
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any, Literal

import torch
from torch import Tensor

from tests.fuzz.draw import Draw

Verdict = Literal["right", "refused", "wrong", "crashed"]
SENTENCES = (ValueError, TypeError, NotImplementedError)
# Who may speak for itself: transformers checks what `generate` and configurations are given.
SPEAKERS = ("/clearhead/", "/transformers/", "/huggingface_hub/")
# What PyTorch says of second derivatives, which nobody can know of before they are asked for.
PYTORCH = re.compile(r"derivative for '?[\w:]+'? is not implemented|Trying to use forward AD with")
# Refused by decision and drawn all the same: a scaling of a model that turns nothing, a length that is too short.
DECIDED = re.compile(r"turns nothing that could be scaled|shorter than the request")


class Wrong(Exception):
    """An answer that is not the expected one; `kind` is the same for all findings of one fault."""

    def __init__(self, kind: str, expected: str, found: str) -> None:
        super().__init__(f"{kind}: expected {expected}, found {found}")
        self.kind, self.expected, self.found = kind, expected, found


class Case(ABC):
    """One call: drawn from a seed, shown by its fields, and able to check itself."""

    @classmethod
    @abstractmethod
    def draw(cls, draw: Draw) -> "Case":
        """Any case of the kind."""

    @abstractmethod
    def check(self) -> None:
        """Make the call; Wrong if its answer is not the exact one. Whatever it raises is judged by `judge`."""

    @property
    def may_refuse(self) -> bool:
        """Whether a sentence is an answer too."""
        return False

    @property
    def must_refuse(self) -> bool:
        """Whether a sentence is the only answer."""
        return False

    def __str__(self) -> str:
        """Its class and the fields that are not what they are by default."""
        shown = [f"{f.name}={getattr(self, f.name)!r}" for f in fields(self) if self._is_shown(f)]  # type: ignore[arg-type]
        return f"{type(self).__name__}({', '.join(shown)})"

    def _is_shown(self, field: Any) -> bool:
        return bool(getattr(self, field.name) != field.default)


@dataclass(frozen=True)
class Outcome:
    """The verdict on a call, with the kind of finding or the reason of a refusal, and what to print of it."""

    verdict: Verdict
    kind: str = ""
    expected: str = ""
    found: str = ""


def judge(case: Case) -> Outcome:
    """Check `case`."""
    area = type(case).__name__
    try:
        case.check()
    except Wrong as wrong:
        return Outcome("wrong", f"{area}: {wrong.kind}", wrong.expected, wrong.found)
    except Exception as error:
        reason = sentence(error)
        if reason is None:
            kind = f"{area}: {type(error).__name__} in {_where(error)}: {_general(str(error))}"
            return Outcome("crashed", kind, "an answer, or one sentence", _trace(error))
        if not (case.may_refuse or case.must_refuse or DECIDED.search(reason)):
            return Outcome("wrong", f"{area}: refused: {_general(reason)}", "an answer", reason)
        return Outcome("refused", _general(reason))
    if case.must_refuse:
        return Outcome("wrong", f"{area}: taken: {case.subject()}", "one sentence", "an answer")
    return Outcome("right")


def _subject(case: Case) -> str:
    return str(getattr(case, "what", ""))


Case.subject = _subject  # type: ignore[attr-defined]


def sentence(error: BaseException) -> str | None:
    """The sentence of a refusal, or None for an error that nobody meant to raise.

    A refusal is a ValueError, TypeError or NotImplementedError raised by a `raise` of the library (RuntimeError too
    where autograd asks for what there is not), one line long. Hugging Face wraps what a configuration raises.
    """
    text = str(error).strip()
    if PYTORCH.search(text):
        return text.splitlines()[0]
    cause = error.__cause__ if type(error).__name__ == "StrictDataclassClassValidationError" else error
    if cause is None:
        cause = error
    named = isinstance(cause, SENTENCES) or type(cause).__name__.startswith("StrictDataclass")
    named = named or (isinstance(cause, RuntimeError) and "backend" in text)
    frames = traceback.extract_tb(cause.__traceback__)
    if not named or not frames or not str(cause).strip():
        return None
    last = frames[-1]
    line = linecache.getline(last.filename, last.lineno or 0).strip()
    if not any(name in last.filename for name in SPEAKERS) or not line.startswith("raise "):
        return None
    return " ".join(str(cause).split())


def _general(text: str) -> str:
    """Without the numbers, so that one fault is one kind."""
    text = re.sub(r"[(\[][\d,. -]*[)\]]", "(…)", " ".join(text.split()))
    return re.sub(r"-?\d+(\.\d+)?(e[+-]?\d+)?", "#", text)[:160]


def _where(error: BaseException) -> str:
    frames = [f for f in traceback.extract_tb(error.__traceback__) if "/clearhead/" in f.filename]
    if not frames:
        return "no frame of the library"
    return f"{frames[-1].filename.rpartition('/clearhead/')[2]}:{frames[-1].name}"


def _trace(error: BaseException) -> str:
    lines = traceback.format_exception(type(error), error, error.__traceback__)
    return "".join(lines[-6:]).strip()


def compare(
    names: Sequence[str],
    found: Sequence[Tensor],
    expected: Sequence[Tensor],
    allowed: Sequence[Tensor | float],
    kind: str = "",
) -> None:
    """Every element within what is allowed; NaN is infinitely far. Wrong names the tensor and the worst element."""
    for name, a, b, most in zip(names, found, expected, allowed, strict=True):
        if a.shape != b.shape:
            raise Wrong(f"{kind}shape of the {name}", str(tuple(b.shape)), str(tuple(a.shape)))
        if a.numel() == 0:
            continue
        error = (a.double() - b).abs().nan_to_num(nan=torch.inf)
        limit = torch.as_tensor(most, dtype=torch.float64).expand(error.shape)
        excess = error - limit
        if not bool((excess > 0).any()):
            continue
        at = int(excess.argmax())
        where = tuple(int(i) for i in torch.unravel_index(torch.tensor(at), error.shape))
        raise Wrong(
            f"{kind}{name}",
            f"{float(b.flatten()[at]):.9g} ± {float(limit.flatten()[at]):.2g} at {where} of {tuple(b.shape)}",
            f"{float(a.flatten()[at]):.9g} (off by {float(error.flatten()[at]):.3g})",
        )

"""Opening what is saved for Hugging Face's Auto classes, never with code that lies beside it.

What is not said to them they ask at the terminal, and run what is there when somebody answers "y".
"""

from pathlib import Path
from typing import Any

NEEDS_CODE = "it needs code of its own, which is not run"


class NeedsCode(ValueError):
    """What cannot be opened without code of its own. The message is one sentence."""


def open_pretrained(kind: Any, source: str | Path, **settings: Any) -> Any:
    """`kind.from_pretrained(source, **settings)` of an Auto class, with classes that are installed or with none.

    Raises NeedsCode where the source has a class of its own and nothing else will do, and what transformers raises.
    """
    try:
        return kind.from_pretrained(source, trust_remote_code=False, **settings)
    except ValueError as error:
        if "trust_remote_code" not in str(error):
            raise
        raise NeedsCode(
            f"{str(source)!r} needs code of its own, which is not run; give one whose class the installed transformers "
            "has"
        ) from None

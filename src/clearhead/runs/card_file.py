"""README.md of a model: the card in a directory, and the one that goes along when the model is pushed to a hub."""

import os
from pathlib import Path

CARD = "README.md"
CARD_MARK = "<!-- clearhead card -->"
"""Stands in every card that `clearhead card` made, so that one that a person wrote is never replaced."""
GENERATED = "This model card has been automatically generated"
"""Stands in the card that transformers makes for a repository without one."""


def read_card(folder: str | os.PathLike[str]) -> str | None:
    """The card in a directory of this machine; None where there is none, and for "", a model of no directory."""
    if not os.fspath(folder):
        return None
    try:
        return (Path(folder) / CARD).read_text(encoding="utf-8")
    except (OSError, ValueError):
        return None


def put_card(folder: str | os.PathLike[str], card: str) -> None:
    """Write `card` into a directory that is about to be pushed, but not over one that a person wrote."""
    found = read_card(folder)
    if found is None or CARD_MARK in found or GENERATED in found:
        (Path(folder) / CARD).write_text(card, encoding="utf-8")

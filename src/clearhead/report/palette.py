"""One colour per arm, the same in every chart, table and sentence of a report.

The hues are those of Okabe and Ito (2008), told apart with any common colour vision; the first arm, which the others
are compared with, is grey. Parts of a whole and heat maps have hues that no arm has. In print (PDF, PNG) the light
values are used; in the page a chart refers to the CSS variables of the template, so that it follows the reader's light
or dark setting.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Ink:
    """A colour by its CSS variable, with its value on a light and on a dark page."""

    name: str
    light: str
    dark: str


ARMS = (
    Ink("arm-0", "#6f767e", "#a3abb3"),
    Ink("arm-1", "#0072b2", "#4aa8e0"),
    Ink("arm-2", "#d55e00", "#f08a4b"),
    Ink("arm-3", "#00896a", "#35c29d"),
    Ink("arm-4", "#b85c95", "#dd8fc0"),
    Ink("arm-5", "#b98000", "#e0af3f"),
    Ink("arm-6", "#2a9fc9", "#6cc9ea"),
    Ink("arm-7", "#7a5bc0", "#a991e6"),
)
PARTS = (
    Ink("part-0", "#54489a", "#8476d6"),
    Ink("part-1", "#b3a8d8", "#584f8a"),
    Ink("part-2", "#d3d6da", "#4a5058"),
    Ink("part-3", "#e2c48c", "#94753a"),
    Ink("part-4", "#9ab7a6", "#4f7562"),
    Ink("part-5", "#c79a9a", "#8a5757"),
)
TEXT = Ink("ink", "#1f2328", "#e6e8ea")
MUTED = Ink("muted", "#636a73", "#9aa2ab")
RULE = Ink("rule", "#dfe2e6", "#33383f")
HEAT = Ink("heat", "#4a4596", "#8079de")
PAPER = Ink("paper", "#ffffff", "#16181b")

MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*", "<", "p", ">")
"""Not as many as colours, so that the ninth arm, which has the first one's colour, has another marker."""


def arm_inks(arms: Sequence[str]) -> dict[str, Ink]:
    """Arm name -> colour, by the order of the recipe."""
    return {arm: ARMS[index % len(ARMS)] for index, arm in enumerate(arms)}


def all_inks() -> tuple[Ink, ...]:
    """Every colour that the page has to define."""
    return (*ARMS, *PARTS, TEXT, MUTED, RULE, HEAT, PAPER)

"""SQuAD's rules: how answers are written alike before they are compared, exact match and F1 (Rajpurkar et al. 2016).

As in the published scorer of SQuAD v1.1: lower case, ASCII punctuation and the articles a, an, the removed, white space
collapsed; F1 over words as a bag; the best of several right answers counts. Differs: two answers that are both nothing
after that (only articles) do not match, and neither do two without a word in F1.
"""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Sequence

ARTICLES = re.compile(r"\b(a|an|the)\b")
PUNCTUATION = str.maketrans("", "", string.punctuation)


def normalised(text: str) -> str:
    """`"The Denver Broncos!"` -> `"denver broncos"`."""
    return " ".join(ARTICLES.sub(" ", text.lower().translate(PUNCTUATION)).split())


def exact(answer: str, right: Sequence[str]) -> bool:
    """Whether the answer is one of the right ones."""
    said = normalised(answer)
    return bool(said) and any(said == normalised(one) for one in right)


def f1(answer: str, right: Sequence[str]) -> float:
    """The harmonic mean of the words' precision and recall, against the right answer that fits best."""
    said = normalised(answer).split()
    best = 0.0
    for one in right:
        words = normalised(one).split()
        common = sum((Counter(said) & Counter(words)).values())
        if common:
            best = max(best, 2 * common / (len(said) + len(words)))
    return best


def within(phrase: str, text: str) -> bool:
    """Whether the words of `phrase`, at least one, stand in `text` one after the other."""
    words = normalised(phrase)
    return bool(words) and f" {words} " in f" {normalised(text)} "


def covered(answer: str, text: str) -> float:
    """The share of the answer's words that the text has, wherever they stand; 0 for an answer without words."""
    words, known = normalised(answer).split(), set(normalised(text).split())
    return sum(word in known for word in words) / len(words) if words else 0.0

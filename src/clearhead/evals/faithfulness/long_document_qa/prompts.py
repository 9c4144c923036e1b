"""Questions about long documents: articles in SQuAD's form, and prompts of an exact length with the answer at a depth.

An article is taken as a ring of its paragraphs. A prompt holds the paragraph that the question was written for, whole,
what stands before it on the ring and what follows: as many tokens before it as the depth says, cut between words at the
outer ends. So the text around the answer is the article's own, in its own order, whatever the length and depth.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray
from transformers import PreTrainedTokenizerFast

from clearhead.evals.asking.answering import FormName, encode, frame
from clearhead.evals.asking.articles import Article as Article
from clearhead.evals.asking.articles import Question as Question
from clearhead.evals.asking.articles import read_articles as read_articles
from clearhead.evals.asking.haystack import Haystack, measured, specials

INTRO = "Read the text and answer the question.\n\nText:\n"
OUTRO = "\n\nQuestion: {question}\n"
ASK = "Answer with as few words of the text as possible."
CUE = "Answer:"
BETWEEN = "\n\n"
TRIES = 64
BORDERS = 8
"""Tokens that the joints of a prompt may take more or fewer."""


@dataclass(frozen=True, eq=False)
class QuestionPrompt:
    """A prompt as text and as ids. document: what stands in it of the article. before: tokens before the paragraph."""

    text: str
    ids: NDArray[np.int64]
    document: str
    before: int
    around: int


class Asker:
    """Makes the prompts of articles for one tokenizer and form."""

    def __init__(
        self, articles: Sequence[Article], tokenizer: PreTrainedTokenizerFast, form: FormName
    ) -> None:
        self.tokenizer = tokenizer
        self.form = form
        self.articles = [
            Article(a.title, tuple(self._plain(text) for text in a.paragraphs), a.questions) for a in articles
        ]
        self._rings: dict[tuple[int, int], Haystack] = {}

    @cached_property
    def _specials(self) -> list[str]:
        return specials(self.tokenizer)

    def _plain(self, text: str) -> str:
        """Without what spells a special token: nothing in a document may end it."""
        for token in self._specials:
            text = text.replace(token, "")
        return text

    @cached_property
    def sizes(self) -> list[list[int]]:
        """Tokens of every paragraph."""
        return [[len(encode(self.tokenizer, text)) for text in a.paragraphs] for a in self.articles]

    def around(self, question: str) -> tuple[str, str]:
        ask = f"{OUTRO.format(question=self._plain(question))}{ASK}"
        return frame(self.tokenizer, self.form, INTRO, ask, f"\n{CUE}")

    def closed(self, question: str) -> NDArray[np.int64]:
        """The question without a text."""
        ask = f"Question: {self._plain(question)}\nAnswer with as few words as possible."
        before, after = frame(self.tokenizer, self.form, "", ask, f"\n{CUE}")
        return encode(self.tokenizer, before + after)

    def bounds(self, question: Question) -> tuple[int, int]:
        """Tokens of the shortest prompt (the paragraph alone) and of the longest (the whole article), to be safe."""
        before, after = self.around(question.text)
        sizes = self.sizes[question.article]
        least = len(encode(self.tokenizer, before + after)) + sizes[question.paragraph]
        return least + BORDERS, least + sum(sizes) - sizes[question.paragraph] - BORDERS

    def prompt(self, question: Question, length: int, depth: float) -> QuestionPrompt:
        """A prompt of exactly `length` tokens whose paragraph begins after `depth` of the other tokens of the text.

        The depth is met as nearly as words allow. Raises ValueError for a length that cannot be met.
        """
        article = self.articles[question.article]
        paragraph = article.paragraphs[question.paragraph]
        before, after = self.around(question.text)
        ring = self._ring(question)
        core = f"{BETWEEN}{paragraph}{BETWEEN}"
        room = length - len(encode(self.tokenizer, before + core + after))
        if room > ring.tokens:
            raise ValueError(
                f"the article {article.title!r} has {ring.tokens} tokens around the paragraph, the prompt needs {room}"
            )
        size = room
        visits: Counter[int] = Counter()
        for _ in range(TRIES):
            windows = _windows(ring, size, depth)
            if visits[size] >= len(windows):
                break
            first, last = windows[visits[size]]
            lead, tail = ring.between(first, ring.tokens), ring.between(0, last)
            document = f"{lead}{BETWEEN if lead else ''}{paragraph}{BETWEEN if tail else ''}{tail}"
            ids = encode(self.tokenizer, before + document + after)
            if len(ids) == length:
                return QuestionPrompt(
                    before + document + after, ids, document, ring.tokens - first, max(1, size)
                )
            # Tokens are joined or parted at the borders.
            visits[size] += 1
            size = max(0, size + length - len(ids))
        raise ValueError(
            f"no words of the article {article.title!r} make a prompt of exactly {length} tokens"
        )

    def _ring(self, question: Question) -> Haystack:
        """All other paragraphs, from the one after the question's on."""
        key = (question.article, question.paragraph)
        if key not in self._rings:
            parts = self.articles[question.article].paragraphs
            others = (*parts[question.paragraph + 1 :], *parts[: question.paragraph])
            self._rings[key] = measured(BETWEEN.join(others), self.tokenizer)
        return self._rings[key]


def _windows(ring: Haystack, size: int, depth: float) -> list[tuple[int, int]]:
    """(token from which the text before the paragraph goes on, token before which the text after it ends).

    They hold `size` tokens together and begin and end between words; nearest to the depth first.
    """
    places = np.unique(np.concatenate([ring.cuts, [ring.tokens]]))
    firsts = places[np.argsort(np.abs(ring.tokens - places - depth * size), kind="stable")]
    lasts = size - (ring.tokens - firsts)
    kept = np.isin(lasts, places) & (lasts <= firsts)
    return list(zip(firsts[kept].tolist(), lasts[kept].tolist(), strict=True))


def draw(questions: Sequence[Sequence[Question]], samples: int, seed: int) -> list[Question]:
    """`samples` questions, in turn from every article, so that they come from as many documents as possible."""
    rng = np.random.default_rng(seed)
    piles = [[part[i] for i in rng.permutation(len(part))] for part in questions if part]
    piles = [piles[i] for i in rng.permutation(len(piles))]
    found: list[Question] = []
    while piles and len(found) < samples:
        for pile in piles:
            found.append(pile.pop())
        piles = [pile for pile in piles if pile]
    return found[:samples]

"""Haystacks: real text drawn as text, then measured in a tokenizer's tokens, with the places where it may be cut.

A text is cut only where it splits into tokens the same way on either side of the cut, so that what is put there, and
how many tokens stand before it, is known exactly however the whole is tokenized.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from transformers import PreTrainedTokenizerFast

from clearhead.data.store import TokenStore
from clearhead.evals.asking.texts import read_source

MARGIN = 512
"""Tokens of a haystack beyond those that are asked for: where it ends depends on what is put into it."""


def read_documents(sources: Sequence[str], text_field: str = "text") -> list[str]:
    """The texts of `sources` (files, directories, globs, `stdlib`, `hf:owner/name`), a book in one piece.

    Raises CorpusError for a source that is missing, empty or unreadable.
    """
    return [document.text for source in sources for document in read_source(source, text_field)]


def store_documents(store: TokenStore, tokenizer: PreTrainedTokenizerFast) -> list[str]:
    """The texts that a store's tokens are."""
    return [str(tokenizer.decode(store.document(i).tolist())) for i in range(len(store))]


def digest(documents: Sequence[str]) -> str:
    """Equal for equal texts in equal order."""
    summed = hashlib.sha256()
    for document in documents:
        summed.update(f"{len(document)}\n".encode())
        summed.update(document.encode("utf-8", "replace"))
    return summed.hexdigest()


def draw_text(documents: Sequence[str], rng: np.random.Generator, characters: int) -> tuple[str, bool]:
    """At least `characters` of text and whether that is all there is; no tokenizer has a say in it.

    Documents come in an order drawn from `rng`, the first one from a drawn place on; what stands before that place
    comes last. Nothing repeats. Raises ValueError when there is no text at all.
    """
    kept = [document for document in documents if document.strip()]
    if not kept:
        raise ValueError("the haystack is empty: name a text with the option 'haystack'")
    order = rng.permutation(len(kept))
    first = kept[order[0]]
    start = int(rng.random() * len(first))
    while start and start < len(first) and not first[start - 1].isspace():
        start += 1
    pieces = (first[start:], *(kept[i] for i in order[1:]), first[:start])
    taken: list[str] = []
    size = 0
    for piece in pieces:
        if size >= characters:
            return "\n\n".join(taken)[:characters], False
        if piece.strip():
            taken.append(piece.strip())
            size += len(taken[-1]) + 2
    text = "\n\n".join(taken)
    return text[:characters], len(text) <= characters


@dataclass(frozen=True, eq=False)
class Haystack:
    """A text, the character at which each of its tokens begins, and the tokens before which it may be cut.

    begins: (tokens + 1,), the last entry is the end of the text. cuts: sorted token indices, 0 among them.
    """

    text: str
    begins: NDArray[np.int64]
    cuts: NDArray[np.int64]

    @property
    def tokens(self) -> int:
        return len(self.begins) - 1

    def down(self, index: int) -> int:
        """The last place at or before token `index` where the text may be cut."""
        return int(self.cuts[np.searchsorted(self.cuts, index, side="right") - 1])

    def stretches(self, after: int, size: int) -> NDArray[np.int64]:
        """Where `size` tokens from `after` on may begin so that both of their ends may be cut; nearest first."""
        later = self.cuts[np.searchsorted(self.cuts, after) :]
        return later[np.isin(later + size, self.cuts)]

    def between(self, start: int, stop: int) -> str:
        """The text of tokens `start` to `stop`."""
        return self.text[self.begins[start] : self.begins[stop]]


def make_haystack(
    documents: Sequence[str],
    tokenizer: PreTrainedTokenizerFast,
    tokens: int,
    rng: np.random.Generator,
) -> Haystack:
    """At least `tokens` tokens and a margin, or all the text there is.

    Text that spells a special token loses those characters: nothing in a document may end it.
    """
    state = rng.bit_generator.state
    characters = 6 * (tokens + MARGIN)
    while True:
        rng.bit_generator.state = state
        text, everything = draw_text(documents, rng, characters)
        for token in specials(tokenizer):
            text = text.replace(token, "")
        made = measured(text, tokenizer)
        if everything or made.tokens >= tokens + MARGIN:
            return made
        characters *= 2


def specials(tokenizer: PreTrainedTokenizerFast) -> list[str]:
    """The texts that become special tokens."""
    return [str(token.content) for token in tokenizer.added_tokens_decoder.values() if token.special]


def measured(text: str, tokenizer: PreTrainedTokenizerFast) -> Haystack:
    """`text` with the borders of its tokens. It may be cut before a word, and between two ideographs."""
    offsets = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)["offset_mapping"]
    begins, cuts = [0], [0]
    for index in range(1, len(offsets)):
        end = int(offsets[index - 1][1])
        begins.append(max(end, begins[-1]))
        # Several tokens may be one character; offsets may leave out the space that a token begins with.
        if int(offsets[index][0]) >= end > int(offsets[index - 1][0]) and _may_cut(text, end):
            cuts.append(index)
    return Haystack(text, np.array([*begins, len(text)], np.int64), np.array(cuts, np.int64))


def _may_cut(text: str, at: int) -> bool:
    before, after = text[at - 1], text[at : at + 2]
    if len(after) < 2 or before.isspace():
        return False
    if after[0] == " ":
        return not after[1].isspace()
    return min(ord(before), ord(after[0])) > 0x2E7F

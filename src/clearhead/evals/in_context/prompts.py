"""Prompts of demonstrations, and the tokens by which a label is told from the others in them.

A demonstration is a text's line and its label's line, published as `Question: ...` and `Type: ...`; a separator
that begins with a line's end stands between two. The prompt ends where the label of the asked text would begin.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from transformers import PreTrainedTokenizerFast

from clearhead.evals.asking.answering import encode
from clearhead.evals.in_context.labelled import Example

Tokens = tuple[int, ...]
SEPARATOR = "\n==\n"


@dataclass(frozen=True)
class Wording:
    """The words around texts and labels. The label's template ends with the label; what white space stands before
    it belongs to the answer, as tokenizers have it."""

    text_template: str
    label_template: str
    separator: str = SEPARATOR

    def demonstrations(self, examples: Sequence[Example]) -> str:
        """Each followed by the separator."""
        return "".join(f"{self.asked(e.text)}{self.answer(e.label)}{self.separator}" for e in examples)

    def asked(self, text: str) -> str:
        """The text, and the beginning of its label's line."""
        return f"{self.text_template.replace('{text}', text)}\n{self._before.rstrip()}"

    def answer(self, label: str) -> str:
        return self._before[len(self._before.rstrip()) :] + label

    @property
    def _before(self) -> str:
        return self.label_template.removesuffix("{label}")


@dataclass(frozen=True)
class LabelTrie:
    """The labels as token paths. No path begins with another whole one: each goes on to the first token after its
    label, which ends the line.

    children: prefix -> the tokens that may follow. below: prefix -> the labels that begin with it.
    """

    labels: tuple[str, ...]
    paths: tuple[Tokens, ...]
    children: Mapping[Tokens, tuple[int, ...]]
    below: Mapping[Tokens, tuple[int, ...]]

    @classmethod
    def of(cls, labels: Sequence[str], paths: Sequence[Tokens]) -> LabelTrie:
        """Raises ValueError when the tokens do not tell two labels apart."""
        children: dict[Tokens, dict[int, None]] = {}
        below: dict[Tokens, list[int]] = {}
        for index, path in enumerate(paths):
            for end in range(len(path) + 1):
                below.setdefault(path[:end], []).append(index)
                if end < len(path):
                    children.setdefault(path[:end], {})[path[end]] = None
        for index, path in enumerate(paths):
            if below[path] != [index]:
                other = next(i for i in below[path] if i != index)
                raise ValueError(
                    f"the tokenizer gives the labels {labels[index]!r} and {labels[other]!r} the same tokens: "
                    "rename one of them"
                )
        return cls(
            tuple(labels),
            tuple(paths),
            {prefix: tuple(sorted(tokens)) for prefix, tokens in children.items()},
            {prefix: tuple(rows) for prefix, rows in below.items()},
        )

    @property
    def longest(self) -> int:
        return max(map(len, self.paths))

    def settle(self, prefix: Tokens) -> Tokens:
        """`prefix` and what must follow it, up to where labels part or one alone is left."""
        while len(self.below[prefix]) > 1 and len(self.children[prefix]) == 1:
            prefix = (*prefix, self.children[prefix][0])
        return prefix

    def decided(self, prefix: Tokens) -> int | None:
        """The one label that begins with `prefix`, if there is one alone."""
        labels = self.below[prefix]
        return labels[0] if len(labels) == 1 else None

    def stems(self) -> list[Tokens]:
        """The paths without their last tokens, but for those that another one begins with."""
        stems = sorted({path[:-1] for path in self.paths})
        return [stem for stem in stems if not any(s[: len(stem)] == stem for s in stems if s != stem)]


def label_paths(
    tokenizer: PreTrainedTokenizerFast, form: Wording, labels: Sequence[str], text: str
) -> tuple[NDArray[np.int64], list[Tokens]]:
    """The tokens of an asked `text` after a separator, and those that each label goes on with.

    Prompt and answer are tokenized together with the separator that follows in a demonstration; a path ends with the
    first token that reaches beyond the label. A full stop and a line's end are one token to many tokenizers.
    Raises ValueError where a prompt's tokens depend on the label that follows.
    """
    before = form.separator + form.asked(text)
    prompt = tokenizer(before, add_special_tokens=False, return_offsets_mapping=True)
    size = len(prompt["input_ids"])
    whole = [before + form.answer(label) for label in labels]
    joint = tokenizer(
        [text + form.separator for text in whole], add_special_tokens=False, return_offsets_mapping=True
    )
    paths = []
    for label, text_, ids, offsets in zip(
        labels, whole, joint["input_ids"], joint["offset_mapping"], strict=True
    ):
        if ids[:size] != prompt["input_ids"]:
            raise ValueError(
                f"the tokenizer joins the end of the prompt {form.asked('')[-12:]!r} with the label {label!r}: "
                "choose another label_template"
            )
        end = next(k for k in range(size, len(ids)) if offsets[k][1] > len(text_))
        paths.append(tuple(ids[size : end + 1]))
    inside = sum(start >= len(form.separator) for start, _ in prompt["offset_mapping"])
    return np.array(prompt["input_ids"][size - inside :], np.int64), paths


def make_trie(
    tokenizer: PreTrainedTokenizerFast, form: Wording, labels: Sequence[str], texts: Sequence[str]
) -> tuple[LabelTrie, list[NDArray[np.int64]]]:
    """The labels' trie, which must be the same after every one of `texts`, and each asked text's own tokens."""
    paths: list[Tokens] | None = None
    tails = []
    for text in texts:
        tail, found = label_paths(tokenizer, form, labels, text)
        if paths is not None and found != paths:
            raise ValueError(
                "the tokenizer reads labels differently after different texts: choose another label_template"
            )
        paths = found
        tails.append(tail)
    return LabelTrie.of(labels, paths or []), tails


def make_prompts(
    tokenizer: PreTrainedTokenizerFast,
    form: Wording,
    demonstrations: Sequence[Example],
    texts: Sequence[str],
    tails: Sequence[NDArray[np.int64]],
) -> tuple[NDArray[np.int64], list[NDArray[np.int64]]]:
    """The tokens of the demonstrations, bos first, and of the prompt of each text after them.

    Raises ValueError where a text's tokens are not those that the labels' tokens were taken after.
    """
    context = str(tokenizer.bos_token or "") + form.demonstrations(demonstrations)
    whole = tokenizer([context + form.asked(text) for text in texts], add_special_tokens=False)["input_ids"]
    prompts = [np.array(ids, np.int64) for ids in whole]
    for prompt, tail in zip(prompts, tails, strict=True):
        if not np.array_equal(prompt[-len(tail) :], tail):
            raise ValueError(
                "the tokenizer reads a text differently after demonstrations: choose another separator"
            )
    return encode(tokenizer, context), prompts

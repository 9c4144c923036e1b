"""The two published passkey prompts, made to an exact number of tokens, and what counts as the right answer.

Both hide a number in the same filler sentences; they differ in wording, numbers, and in whether the prompt ends with
the beginning of its answer:

* `coca` (Zhu et al., arXiv 2309.08646, listing 1, misspelling as printed): keys 10,000 to 99,999; ends with the
  question; 64 new tokens; the match is not stated;
* `mohtashami` (Mohtashami and Jaggi, arXiv 2305.16300, released program): keys 1 to 50,000; ends with "The pass key
  is"; 10 new tokens; the first number of the answer counts.

Differs from those programs: the filler is cut between tokens so that a prompt has exactly the tokens asked for (they
count sentences and characters); lines are joined by a line break in both (not stated for CoCA).
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

FILLER = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again."
TASK = (
    "There is an important info hidden inside a lot of irrelevant text. Find it and memorize them. "
    "I will quiz you about the important information there."
)


@dataclass(frozen=True)
class PasskeyForm:
    """One published prompt: the sentence with the key, the ending, the smallest and the largest key, tokens of an
    answer, and the rule that judges it."""

    fact: str
    ending: str
    keys: tuple[int, int]
    new_tokens: int
    rule: str

    @property
    def chance(self) -> float:
        """How often a key drawn blindly is right."""
        return 1 / (self.keys[1] - self.keys[0] + 1)


FORMS = {
    "coca": PasskeyForm(
        "The passkey is {key}. Remeber it. {key} is the passkey.",
        "What is the passkey?",
        (10_000, 99_999),
        64,
        "substring",
    ),
    "mohtashami": PasskeyForm(
        "The pass key is {key}. Remember it. {key} is the pass key.",
        "What is the pass key? The pass key is",
        (1, 50_000),
        10,
        "first number",
    ),
}


@dataclass(frozen=True)
class KeyPrompt:
    """Ids (bos included), the key in digits, and the index of the first token of the sentence that tells it."""

    ids: NDArray[np.int64]
    key: str
    start: int


class PromptLine:
    """A prompt in the making: all tokens but the filler's are fixed, and the filler's are cut to measure."""

    def __init__(self, form: PasskeyForm, tokenizer: PreTrainedTokenizerFast, key: int) -> None:
        self.fact = form.fact.format(key=key)
        self.ending = form.ending
        self.tokenizer = tokenizer
        self.bos = [] if tokenizer.bos_token_id is None else [int(tokenizer.bos_token_id)]
        before, first, middle, second, after = self.parts(1, 1)
        self.filler = min(len(first), len(second))
        self.head = len(self.bos) + len(before)
        self.fixed = self.head + len(middle) + len(after)

    def parts(self, before: int, after: int) -> list[list[int]]:
        """Tokens of the whole text, in five: task, filler, fact, filler, ending; so many filler sentences each."""
        fillers = [" ".join([FILLER] * count) for count in (before, after)]
        text, borders = "", []
        for piece in (TASK, fillers[0], self.fact, fillers[1], self.ending):
            text += "\n" if text else ""
            borders.append((len(text), len(text) + len(piece)))
            text += piece
        encoded = self.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        pieces: list[list[int]] = [[], [], [], [], []]
        place = 0
        for token, (begin, end) in zip(encoded["input_ids"], encoded["offset_mapping"], strict=True):
            # A token belongs to a filler only if it lies in it whole, so that cutting fillers leaves the rest as it is.
            enters = place in (0, 2) and borders[place + 1][0] <= begin and end <= borders[place + 1][1]
            leaves = place in (1, 3) and end > borders[place][1]
            place += enters or leaves
            pieces[place].append(int(token))
        return pieces

    def write(self, length: int, offset: int) -> NDArray[np.int64]:
        """Exactly `length` ids, `offset` filler tokens before the fact."""
        wanted = (offset, length - self.fixed - offset)
        repeats = [1 + count // max(1, self.filler - 1) for count in wanted]
        while True:
            before, first, middle, second, after = self.parts(*repeats)
            short = [len(piece) < count for piece, count in zip((first, second), wanted, strict=True)]
            if not any(short):
                break
            repeats = [2 * count if missing else count for count, missing in zip(repeats, short, strict=True)]
        ids = [*self.bos, *before, *first[: wanted[0]], *middle, *second[: wanted[1]], *after]
        return np.array(ids, dtype=np.int64)


def passkey_prompt(
    form: PasskeyForm,
    tokenizer: PreTrainedTokenizerFast,
    length: int,
    rng: np.random.Generator,
    *,
    window: int | None = None,
    inside: bool | None = None,
) -> KeyPrompt:
    """A prompt of exactly `length` tokens with a key and a place drawn from `rng`, the place uniform over tokens.

    inside: whether the whole sentence with the key must lie in the last `window` tokens; None for anywhere.
    Raises ValueError when the prompt does not fit or there is no such place; a prompt is never cut.
    """
    key = int(rng.integers(form.keys[0], form.keys[1], endpoint=True))
    line = PromptLine(form, tokenizer, key)
    room = length - line.fixed
    if room < 0:
        raise ValueError(f"the passkey prompt needs at least {line.fixed} tokens, not {length}")
    low, high = 0, room
    if inside is not None and window is not None:
        border = length - window - line.head
        low, high = (max(0, border), room) if inside else (0, min(room, border - 1))
    if low > high:
        where = "inside" if inside else "outside"
        raise ValueError(f"no place of the key in {length} tokens is {where} the last {window}")
    offset = int(rng.integers(low, high, endpoint=True))
    return KeyPrompt(line.write(length, offset), str(key), line.head + offset)


@dataclass(frozen=True)
class KeyVerdict:
    """Whether an answer is right by each rule; None while more tokens may still decide it.

    first: the first run of digits, read as a number, is the key (Mohtashami and Jaggi).
    anywhere: the key's digits occur in the answer (RULER, LWM).
    """

    first: bool | None
    anywhere: bool | None

    @property
    def decided(self) -> bool:
        return self.first is not None and self.anywhere is not None


def judge(text: str, key: str, *, ended: bool) -> KeyVerdict:
    """What `text` is worth as an answer so far, or in the end once `ended`."""
    run = re.search(r"[0-9]+", text)
    first: bool | None = False if ended else None
    # A run at the very end may still grow.
    if run is not None and (ended or run.end() < len(text)):
        first = int(run.group()) == int(key)
    anywhere = True if key in text else (False if ended else None)
    return KeyVerdict(first, anywhere)

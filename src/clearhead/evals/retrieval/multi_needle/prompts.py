"""Multi-needle prompts: several cities have a magic number each, some are asked for, all hidden in one long text.

The sentences are those of the LWM needle test (Liu et al., arXiv 2402.08268, released program
`scripts/eval_needle_multi.py`), which the Differential Transformer (Ye et al., arXiv 2410.05258, section 3.4) and
Gemini 1.5 follow: the first asked needle stands at a fixed depth, all others anywhere.

Forms:

* `chat`: the published question as a user's message under the tokenizer's own chat template;
* `completion`: the same words, then the beginning of the answer, for models without a template;
* `message`: the message alone, for a program that puts a template around it.

Differs from the program: every prompt has exactly the tokens asked for (it leaves 200 free); a needle stands before the
word nearest to its depth (it moves back to a full stop); no city is on the list twice; the words "You are a helpful
assistant. USER: ... ASSISTANT:" are the template's. The Differential Transformer's own prompt is not published.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from math import comb
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from transformers import PreTrainedTokenizerFast

from clearhead.evals.asking.haystack import Haystack

FormName = Literal["chat", "completion", "message"]
NEEDLE = "\nThe special magic {city} number is: {number}\n"
ONLY_DOCUMENT = "Don't give information outside the document."
NUMBERS = (1_000_000, 9_999_999)
TRIES = 64
"""Attempts to meet an exact number of tokens before a tokenizer is given up."""
CITIES = (
    "Accra", "Algiers", "Amsterdam", "Athens", "Auckland", "Baghdad", "Baku", "Bangkok", "Barcelona", "Belgrade",
    "Berlin", "Bogota", "Boston", "Brussels", "Bucharest", "Budapest", "Cairo", "Caracas", "Chicago", "Copenhagen",
    "Dakar", "Damascus", "Dhaka", "Dublin", "Geneva", "Hamburg", "Hanoi", "Havana", "Helsinki", "Istanbul", "Jakarta",
    "Kabul", "Karachi", "Kathmandu", "Kiev", "Lagos", "Lima", "Lisbon", "London", "Madrid", "Manila", "Melbourne",
    "Milan", "Montreal", "Moscow", "Mumbai", "Munich", "Nairobi", "Oslo", "Paris", "Prague", "Quito", "Riga", "Rome",
    "Santiago", "Seattle", "Seoul", "Sofia", "Stockholm", "Sydney", "Tehran", "Tokyo", "Toronto", "Tunis", "Vancouver",
    "Vienna", "Warsaw", "Zagreb", "Zurich",
)  # fmt: skip


@dataclass(frozen=True)
class Facts:
    """What is hidden and what is asked, drawn before anything is tokenized.

    cities, numbers: of all needles, the asked ones first. asked: the order in which the question names those.
    places: of the needles after the first, in 0..1 of the haystack.
    """

    cities: tuple[str, ...]
    numbers: tuple[str, ...]
    asked: tuple[int, ...]
    places: tuple[float, ...]


def draw_facts(seed: int, index: int, needles: int, asked: int) -> Facts:
    """Sample `index` of a seed: the same at every length and depth, for every model and tokenizer.

    Raises ValueError when more is asked than hidden, or more hidden than there are cities.
    """
    if not 1 <= asked <= needles <= len(CITIES):
        raise ValueError(f"cannot ask {asked} of {needles} needles: 1 <= asked <= needles <= {len(CITIES)}")
    rng = np.random.default_rng([seed, needles, asked, index])
    cities = rng.choice(len(CITIES), needles, replace=False)
    numbers: list[str] = []
    while len(numbers) < needles:
        number = str(rng.integers(NUMBERS[0], NUMBERS[1], endpoint=True))
        if number not in numbers:
            numbers.append(number)
    order = rng.permutation(asked)
    places = rng.random(needles - 1)
    return Facts(
        tuple(CITIES[i] for i in cities), tuple(numbers), tuple(map(int, order)), tuple(map(float, places))
    )


@dataclass(frozen=True, eq=False)
class NeedlesPrompt:
    """A prompt as text (bos and template spelled out) and as ids, and what it asks.

    numbers: the right answers. starts: the token with which each needle's sentence begins, asked ones first.
    before: tokens of the haystack before the first asked needle; haystack: tokens of the haystack in all.
    """

    text: str
    ids: NDArray[np.int64]
    cities: tuple[str, ...]
    numbers: tuple[str, ...]
    starts: tuple[int, ...]
    before: int
    haystack: int


def listed(cities: Sequence[str]) -> str:
    """`A`, `A and B`, `A, B, and C`."""
    if len(cities) < 3:
        return " and ".join(cities)
    return f"{', '.join(cities[:-1])}, and {cities[-1]}"


def question(cities: Sequence[str]) -> str:
    """The question as published, which has two wordings."""
    if len(cities) == 1:
        return f"What is the special magic number for {cities[0]}?"
    return f"What are the special magic numbers for {listed(cities)}?"


def beginning(cities: Sequence[str]) -> str:
    """How the answer begins in the completion form."""
    if len(cities) == 1:
        return f"The special magic number for {cities[0]} is:"
    return f"The special magic numbers for {listed(cities)} are:"


def expected(form: FormName, cities: Sequence[str], numbers: Sequence[str]) -> str:
    """A right answer in the words of the prompt, up to its last number: what a model that answers briefly says."""
    said = f" {listed(numbers)}"
    return said if form == "completion" else beginning(cities) + said


def surroundings(
    form: FormName, tokenizer: PreTrainedTokenizerFast, cities: Sequence[str]
) -> tuple[str, str]:
    """The text before the haystack and the text after it.

    Raises ValueError for `chat` with a tokenizer without a chat template, or with one that changes the message.
    """
    asks = f" {question(cities)} {ONLY_DOCUMENT}"
    if form == "message":
        return "", asks
    if form == "completion":
        return str(tokenizer.bos_token or ""), f"{asks}\n{beginning(cities)}"
    if tokenizer.chat_template is None:
        raise ValueError("the tokenizer has no chat template: ask in the form 'completion'")
    mark = "HAYSTACK"
    shown = str(
        tokenizer.apply_chat_template(
            [{"role": "user", "content": mark + asks}], tokenize=False, add_generation_prompt=True
        )
    )
    before, found, after = shown.partition(mark)
    if not found or mark in after or not after.startswith(asks):
        raise ValueError("the chat template does not give the message as it is: ask in the form 'completion'")
    return before, after


def multi_needle_prompt(
    tokenizer: PreTrainedTokenizerFast,
    haystack: Haystack,
    facts: Facts,
    length: int,
    depth: float,
    form: FormName = "completion",
) -> NeedlesPrompt:
    """A prompt of exactly `length` tokens whose first asked needle stands after `depth` of the haystack's tokens.

    A needle stands before a word: at the last place at or before its depth where the text may be cut. After the last
    needle the text may go on a few words later, which makes the length exact. `length` counts all that the model
    reads (bos, template and question too).
    Raises ValueError when the prompt does not fit, when the haystack is too short, and when a tokenizer cannot be met.
    """
    asked = tuple(facts.cities[i] for i in facts.asked)
    before, after = surroundings(form, tokenizer, asked)
    needles = [NEEDLE.format(city=c, number=n) for c, n in zip(facts.cities, facts.numbers, strict=True)]
    fixed = len(tokenizer(before + "".join(needles) + after, add_special_tokens=False)["input_ids"])
    if fixed > length:
        raise ValueError(f"a prompt with {len(needles)} needles needs at least {fixed} tokens, not {length}")
    size = length - fixed
    visits: Counter[int] = Counter()
    for _ in range(TRIES):
        text, marks, first = _assembled(
            haystack, before, needles, after, (depth, *facts.places), size, visits[size]
        )
        encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        ids, missing = encoded["input_ids"], length - len(encoded["input_ids"])
        if missing == 0:
            ends = np.array([end for _, end in encoded["offset_mapping"]])
            starts = tuple(int(np.argmax(ends > mark)) for mark in marks)
            numbers = tuple(facts.numbers[i] for i in facts.asked)
            return NeedlesPrompt(text, np.array(ids, np.int64), asked, numbers, starts, first, size)
        visits[size] += 1
        size = max(0, size + missing)
    raise ValueError(
        f"no text of this haystack makes a prompt of exactly {length} tokens with this tokenizer"
    )


def _assembled(
    haystack: Haystack,
    before: str,
    needles: Sequence[str],
    after: str,
    depths: Sequence[float],
    size: int,
    choice: int,
) -> tuple[str, list[int], int]:
    """The text, the character at which each needle's sentence begins, and the tokens before the first asked one."""
    if size > haystack.tokens:
        raise ValueError(
            f"the haystack has {haystack.tokens} tokens, the prompt needs {size}: name a longer text with the option "
            "'haystack' or ask for shorter lengths"
        )
    places = [haystack.down(int(depth * size + 0.5)) for depth in depths]
    order = sorted(range(len(needles)), key=lambda i: (places[i], i))
    text, at = before, 0
    marks = [0] * len(needles)
    for i in order:
        text += haystack.between(at, places[i])
        at = places[i]
        marks[i] = len(text) + 1
        text += needles[i]
    starts = haystack.stretches(at, size - at)
    if choice >= len(starts):
        raise ValueError(
            f"the haystack's {haystack.tokens} tokens have no place where {size} of them may end: name a longer text "
            "with the option 'haystack'"
        )
    start = int(starts[choice])
    text += haystack.between(start, start + size - at)
    return text + after, marks, places[0]


def any_needle(needles: int, asked: int) -> float:
    """How often naming `asked` different needles of the text blindly is right by this rule: 1 / C(needles, asked)."""
    return 1 / comb(needles, asked)

"""Greedy answers to long prompts: what they share is read once, and what is expected is read instead of written.

The beginning that prompts share is read once, its keys and values are kept. The answer that would be right is read
behind each prompt in the same pass; where it is the likeliest token at every step, it is what greedy decoding would
have said, and nothing is decoded. The others are decoded together, behind the prompts that are read by then.

Exact where keys and values of a token depend on nothing but the tokens up to it: plain full attention (or this
library's) with frequencies that do not change with the length. Elsewhere every prompt is read from its start.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import DynamicCache, GenerationConfig, PreTrainedModel, PreTrainedTokenizerFast
from transformers.cache_utils import DynamicLayer
from transformers.generation.stopping_criteria import StoppingCriteria, StoppingCriteriaList

from clearhead.evals.probing.adapter import adapter_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel

KeysValues = list[tuple[Tensor, Tensor]]


@dataclass(frozen=True, eq=False)
class AskedPrompt:
    """One prompt: its ids, the numbers that are asked, and whether its answer ends with its line.

    expected: the tokens of an answer that ends as soon as all numbers are found, tried before anything is decoded.
    """

    ids: NDArray[np.int64]
    numbers: tuple[str, ...]
    one_line: bool
    new_tokens: int
    expected: NDArray[np.int64] | None = None


def prefill(model: PreTrainedModel, ids: NDArray[np.int64]) -> KeysValues | None:
    """Keys and values of `ids` in every layer, or None where a part of them would not be those of a shorter text.

    That is so with sliding windows, recurrent states and other caches than the plain growing one, and with a
    length-dependent rotary scaling that is not settled for the request.
    """
    if adapter_of(model).keys_depend_on_request():
        return None
    batch = torch.from_numpy(ids)[None].to(model.device)
    cache = DynamicCache(config=model.config)
    cache = model(input_ids=batch, past_key_values=cache, use_cache=True, logits_to_keep=1).past_key_values
    if type(cache) is not DynamicCache:
        return None
    pairs = [(layer.keys, layer.values) for layer in cache.layers if type(layer) is DynamicLayer]
    if len(pairs) < len(cache.layers):
        return None
    if any(part is None or part.shape[-2] != len(ids) for pair in pairs for part in pair):
        return None
    return pairs  # type: ignore[return-value]


def beginning_of(kept: KeysValues, tokens: int, rows: int) -> DynamicCache:
    """A cache of the first `tokens`, the same for each of `rows`."""
    cache = DynamicCache()
    for layer, (keys, values) in enumerate(kept if tokens else ()):
        cache.update(
            keys[..., :tokens, :].repeat_interleave(rows, 0),
            values[..., :tokens, :].repeat_interleave(rows, 0),
            layer,
        )
    return cache


def shared(first: NDArray[np.int64], second: NDArray[np.int64]) -> int:
    """How many tokens both begin with."""
    size = min(len(first), len(second))
    differ = np.nonzero(first[:size] != second[:size])[0]
    return int(differ[0]) if differ.size else size


def answer(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast,
    asked: Sequence[AskedPrompt],
    settings: GenerationConfig,
    *,
    common: NDArray[np.int64] | None = None,
    batch_tokens: int = 8192,
) -> Iterator[tuple[int, str]]:
    """(index in `asked`, answer), batch by batch; all prompts have one length, so nothing is padded.

    common: tokens that prompts begin with, more or less far. They are read once if that saves work and is exact; the
    prompts that share most of them make a batch, and expected answers are tried.
    An answer ends as soon as all its numbers are found, or at the end of its line or at the model's end of text.
    """
    shares = [0 if common is None else min(shared(common, a.ids), len(a.ids) - 1) for a in asked]
    kept = None
    if common is not None and sum(shares) > max(shares, default=0):
        kept = prefill(model, common[: max(shares)])
    # Batches of one budget of new tokens; within it, the longest shared beginnings together.
    order = sorted(range(len(asked)), key=lambda i: (asked[i].new_tokens, asked[i].one_line, -shares[i]))
    waiting = Waiting(batch_tokens)
    for rows in _batches(order, asked, shares if kept is not None else [0] * len(asked), batch_tokens):
        part = [asked[i] for i in rows]
        if kept is None:
            yield from zip(rows, decoded(model, tokenizer, part, settings, None), strict=True)
            continue
        cache = beginning_of(kept, min(shares[i] for i in rows), len(rows))
        right = confirmed(model, part, cache)
        yield from (
            (i, str(tokenizer.decode(one.expected, skip_special_tokens=True)))
            for i, one, is_right in zip(rows, part, right, strict=True)
            if is_right and one.expected is not None
        )
        left = [k for k, is_right in enumerate(right) if not is_right]
        for whole in waiting.add([rows[k] for k in left], [part[k] for k in left], cache, left):
            yield from whole.answers(model, tokenizer, settings)
    for whole in waiting.rest():
        yield from whole.answers(model, tokenizer, settings)


def confirmed(model: PreTrainedModel, asked: Sequence[AskedPrompt], cache: DynamicCache) -> list[bool]:
    """Read the prompts, of one length, and tell whose expected answer is what greedy decoding would say.

    cache holds the beginning of all of them, and all but their last token afterwards.
    """
    answers = [[] if one.expected is None else one.expected.tolist() for one in asked]
    longest = max(map(len, answers))
    # Nothing is read past an answer's own end, so what fills the shorter ones up is of no matter.
    rows = [
        [*one.ids.tolist(), *said, *[0] * (longest - len(said))]
        for one, said in zip(asked, answers, strict=True)
    ]
    ids = torch.tensor(rows, device=model.device)[:, cache.get_seq_length() :]
    logits = model(input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=longest + 1).logits
    likeliest = logits[:, -longest - 1 :].argmax(-1).tolist()
    cache.crop(-longest - 1)
    return [
        bool(said) and one.new_tokens >= len(said) and found_row[: len(said)] == said
        for one, said, found_row in zip(asked, answers, likeliest, strict=True)
    ]


def decoded(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast,
    asked: Sequence[AskedPrompt],
    settings: GenerationConfig,
    cache: DynamicCache | None,
) -> list[str]:
    """Greedy answers to prompts of one length and budget, behind what `cache` holds of them."""
    ids = torch.from_numpy(np.stack([one.ids for one in asked])).to(model.device)
    said = Said(tokenizer, asked, settings)
    model.generate(  # type: ignore[operator]
        ids,
        attention_mask=torch.ones_like(ids),
        past_key_values=cache,
        max_new_tokens=asked[0].new_tokens,
        stopping_criteria=StoppingCriteriaList([said]),
    )
    return said.texts


@dataclass(frozen=True, eq=False)
class Read:
    """Prompts that are read but for their last token: their place among all, and their keys and values."""

    places: list[int]
    asked: list[AskedPrompt]
    layers: KeysValues

    def joined(self, other: Read) -> Read:
        layers = [
            (torch.cat((k, more_k)), torch.cat((v, more_v)))
            for (k, v), (more_k, more_v) in zip(self.layers, other.layers, strict=True)
        ]
        return Read([*self.places, *other.places], [*self.asked, *other.asked], layers)

    def answers(
        self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, settings: GenerationConfig
    ) -> Iterator[tuple[int, str]]:
        cache = DynamicCache()
        for layer, (keys, values) in enumerate(self.layers):
            cache.update(keys, values, layer)
        yield from zip(self.places, decoded(model, tokenizer, self.asked, settings, cache), strict=True)


class Waiting:
    """Prompts to be decoded, gathered up to `batch_tokens`: a step costs little more for many than for one."""

    def __init__(self, batch_tokens: int) -> None:
        self.batch_tokens = batch_tokens
        self.read: Read | None = None

    def add(
        self, places: list[int], asked: list[AskedPrompt], cache: DynamicCache, rows: list[int]
    ) -> Iterator[Read]:
        """Keep `rows` of `cache`; yields batches that are to be decoded now."""
        if not rows:
            return
        plain: list[Any] = cache.layers
        layers = [(layer.keys[rows], layer.values[rows]) for layer in plain]
        new = Read(places, asked, layers)
        before = self.read
        if before is not None and (
            before.asked[0].new_tokens != asked[0].new_tokens or not self._fits(len(before.asked), new)
        ):
            yield before
            before = None
        self.read = new if before is None else before.joined(new)
        if not self._fits(1, self.read):
            yield from self.rest()

    def rest(self) -> Iterator[Read]:
        """What is left to decode, if anything."""
        read, self.read = self.read, None
        if read is not None:
            yield read

    def _fits(self, more: int, read: Read) -> bool:
        one = read.asked[0]
        return (len(read.asked) + more) * (len(one.ids) + one.new_tokens) <= self.batch_tokens


def _batches(
    order: Sequence[int], asked: Sequence[AskedPrompt], shares: Sequence[int], batch_tokens: int
) -> Iterator[list[int]]:
    """Runs of one budget within `batch_tokens`; what a row shares beyond the others is an eighth at most."""
    rows: list[int] = []
    for i in order:
        one = asked[i]
        if rows and (
            asked[rows[0]].new_tokens != one.new_tokens
            or (len(rows) + 1) * (len(one.ids) + one.new_tokens) > batch_tokens
            or shares[rows[0]] - shares[i] > len(one.ids) // 8
        ):
            yield rows
            rows = []
        rows.append(i)
    if rows:
        yield rows


class Said(StoppingCriteria):
    """Ends a row when nothing that could follow would change its score."""

    def __init__(
        self, tokenizer: PreTrainedTokenizerFast, asked: Sequence[AskedPrompt], settings: GenerationConfig
    ) -> None:
        self.tokenizer = tokenizer
        self.asked = asked
        ends = settings.eos_token_id
        self.ends = {tokenizer.eos_token_id, *(ends if isinstance(ends, list) else [ends])}
        self.texts = [""] * len(asked)
        self.done = [False] * len(asked)

    def __call__(self, input_ids: Tensor, scores: Tensor, **unused: Any) -> Tensor:  # type: ignore[override]
        for row, one in enumerate(self.asked):
            # What follows the end of a row is padding.
            if self.done[row]:
                continue
            tokens = input_ids[row, len(one.ids) :].tolist()
            over = tokens[-1] in self.ends
            text = str(self.tokenizer.decode(tokens[:-1] if over else tokens, skip_special_tokens=True))
            if not one.numbers:
                # Of a free answer the line is the first that is not empty.
                text = text.lstrip()
            if one.one_line and "\n" in text:
                text, over = text[: text.index("\n")], True
            self.texts[row] = text
            # An answer of which no numbers are known beforehand goes on to its end.
            self.done[row] = over or (bool(one.numbers) and all(found(text, one.numbers)))
        return torch.tensor(self.done, device=input_ids.device)


@contextmanager
def greedy(model: PreTrainedModel) -> Iterator[GenerationConfig]:
    """Plain greedy decoding: a model's own settings (a repetition penalty, sampling) would be part of the answer."""
    own = model.generation_config
    assert own is not None, "a model that generates has a generation configuration"
    ends = own.eos_token_id
    first = ends[0] if isinstance(ends, list) else ends
    pad = own.pad_token_id if own.pad_token_id is not None else first
    plain = GenerationConfig(
        do_sample=False, use_cache=True, eos_token_id=ends, pad_token_id=0 if pad is None else pad
    )
    model.generation_config = plain
    try:
        yield plain
    finally:
        model.generation_config = own


def found(answer: str, numbers: Sequence[str]) -> list[bool]:
    """Which of the asked numbers are right: their digits occur in the answer (LWM's rule; so does RULER's).

    An answer is right when all are ("exact"); the share of them is the second number.
    """
    return [number in answer for number in numbers]

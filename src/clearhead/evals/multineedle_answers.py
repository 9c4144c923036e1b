"""Greedy answers to long prompts that share their beginning: it is read once, its keys and values are kept.

Exact where keys and values of a token depend on nothing but the tokens up to it: plain full attention (or this
library's) with frequencies that do not change with the length. Elsewhere every prompt is read from its start.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import DynamicCache, GenerationConfig, PreTrainedTokenizerFast
from transformers.cache_utils import DynamicLayer
from transformers.generation.stopping_criteria import StoppingCriteria, StoppingCriteriaList

from clearhead.evals.multineedle_prompts import found
from clearhead.evals.rescale import GROWING

if TYPE_CHECKING:
    from transformers import PreTrainedModel

KeysValues = list[tuple[Tensor, Tensor]]


@dataclass(frozen=True, eq=False)
class Asked:
    """One prompt: its ids, the numbers that are asked, and whether its answer ends with its line."""

    ids: NDArray[np.int64]
    numbers: tuple[str, ...]
    one_line: bool
    new_tokens: int


def grows(model: PreTrainedModel) -> bool:
    """Whether a model of this library has a rotary scaling that depends on the length of each call."""
    known = model.config.to_dict()
    scaling = known.get("rope_parameters") or {}
    return known.get("model_type") == "clearhead" and scaling.get("rope_type") in GROWING


def prefill(model: PreTrainedModel, ids: NDArray[np.int64]) -> KeysValues | None:
    """Keys and values of ``ids`` in every layer, or None where a part of them would not be those of a shorter text.

    That is so with sliding windows, recurrent states and other caches than the plain growing one, and with a
    length-dependent rotary scaling that is not settled for the request.
    """
    if grows(model):
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
    """A cache of the first ``tokens``, the same for each of ``rows``."""
    cache = DynamicCache()
    for layer, (keys, values) in enumerate(kept):
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
    asked: Sequence[Asked],
    settings: GenerationConfig,
    *,
    common: NDArray[np.int64] | None = None,
    batch_tokens: int = 8192,
) -> Iterator[tuple[int, str]]:
    """(index in ``asked``, answer), batch by batch; all prompts have one length, so nothing is padded.

    common: tokens that prompts begin with, more or less far. They are read once if that saves work and is exact; the
    prompts that share most of them make a batch.
    An answer ends as soon as all its numbers are found, or at the end of its line or at the model's end of text.
    """
    shares = [0 if common is None else min(shared(common, a.ids), len(a.ids) - 1) for a in asked]
    kept = None
    if common is not None and sum(shares) > max(shares, default=0):
        kept = prefill(model, common[: max(shares)])
    # Batches of one budget of new tokens; within it, the longest shared beginnings together.
    order = sorted(range(len(asked)), key=lambda i: (asked[i].new_tokens, asked[i].one_line, -shares[i]))
    for rows in _batches(order, asked, shares if kept is not None else [0] * len(asked), batch_tokens):
        ids = torch.from_numpy(np.stack([asked[i].ids for i in rows])).to(model.device)
        start = min(shares[i] for i in rows)
        cache = beginning_of(kept, start, len(rows)) if kept is not None and start else None
        said = Said(tokenizer, [asked[i] for i in rows], settings)
        model.generate(  # type: ignore[operator]
            ids,
            attention_mask=torch.ones_like(ids),
            past_key_values=cache,
            max_new_tokens=asked[rows[0]].new_tokens,
            stopping_criteria=StoppingCriteriaList([said]),
        )
        yield from zip(rows, said.texts, strict=True)


def _batches(
    order: Sequence[int], asked: Sequence[Asked], shares: Sequence[int], batch_tokens: int
) -> Iterator[list[int]]:
    """Runs of one budget within ``batch_tokens``; what a row shares beyond the others is an eighth at most."""
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
        self, tokenizer: PreTrainedTokenizerFast, asked: Sequence[Asked], settings: GenerationConfig
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
            if one.one_line and "\n" in text:
                text, over = text[: text.index("\n")], True
            self.texts[row] = text
            self.done[row] = over or all(found(text, one.numbers))
        return torch.tensor(self.done, device=input_ids.device)

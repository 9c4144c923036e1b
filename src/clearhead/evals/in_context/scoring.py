"""The label that a model gives when it can give nothing but labels.

`greedy`, the published rule: from the prompt on, the likeliest of the tokens that some label goes on with, until one
label is left. Labels that begin alike part later; of a label that begins another one, the end of the line decides.
`likelihood`: the label of the greatest log-likelihood, its end of line included, so that labels that begin with one
another are different events. It is not normalised by length.

Each needs no more passes than it must: one where the first token tells all labels apart. What prompts begin with is
read once where that is exact; rows of about one length are read together, padded on the right, which a causal mask
never looks at.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import DynamicCache

from clearhead.evals.asking.decoding import KeysValues, beginning_of, prefill, shared
from clearhead.evals.asking.running import batches, to_batch
from clearhead.evals.in_context.prompts import LabelTrie, Tokens
from clearhead.evals.probing.adapter import adapter_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Ids = NDArray[np.int64]
Score = Literal["greedy", "likelihood"]
SPREAD = 16
"""Tokens by which rows of a batch may differ in length."""
AT_ONCE = 16
"""Prompts whose labels' likelihoods are computed together."""


class LogitReader:
    """Logits at the ends of rows, many of which begin with `common`.

    length: of a whole request, for a model of this library whose rotary scaling grows with it.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        prompts: Sequence[Ids],
        common: Ids | None = None,
        *,
        batch_tokens: int = 8192,
        length: int | None = None,
    ) -> None:
        self.model = model
        self.batch_tokens = batch_tokens
        self.settled = {"rope_length": length} if adapter_of(model).keys_depend_on_request() else {}
        self.common = common
        self.kept: KeysValues | None = None
        self.cache: DynamicCache | None = None
        self.rows = 0
        shares = [0] if common is None else [shared(common, prompt) for prompt in prompts]
        if common is not None and sum(shares) > max(shares, default=0):
            self.common = common[: max(shares)]
            self.kept = prefill(model, self.common)

    def logits(self, rows: Sequence[Ids], wanted: Sequence[int]) -> Iterator[tuple[int, Tensor]]:
        """(i, logits after each of the last `wanted[i]` tokens of row i), (wanted, V), batch by batch."""
        model: Any = self.model
        for batch in self._batches(rows):
            starts = [self._share(rows[i], wanted[i]) for i in batch]
            start = min(starts)
            ids = to_batch([rows[i][start:] for i in batch], model.device)
            first = min(len(rows[i]) - wanted[i] for i in batch) - start
            cache = self._beginning(start, len(batch)) if start else None
            found = model(
                input_ids=ids,
                past_key_values=cache,
                use_cache=cache is not None,
                logits_to_keep=ids.shape[1] - first,
                **self.settled,
            ).logits
            if cache is not None:
                _cut(cache, start)
            for row, i in enumerate(batch):
                end = len(rows[i]) - start - first
                yield i, found[row, end - wanted[i] : end]

    def _share(self, row: Ids, wanted: int) -> int:
        if self.kept is None or self.common is None:
            return 0
        return min(shared(self.common, row), len(row) - wanted)

    def _beginning(self, tokens: int, rows: int) -> DynamicCache:
        """The kept beginning for each row; the last one is used again where it is long enough."""
        assert self.kept is not None
        if self.cache is None or self.rows != rows or self.cache.get_seq_length() < tokens:
            # Freed first: there is room for one of them.
            self.cache = None
            self.cache, self.rows = beginning_of(self.kept, tokens, rows), rows
        _cut(self.cache, tokens)
        return self.cache

    def _batches(self, rows: Sequence[Ids]) -> Iterator[list[int]]:
        batch: list[int] = []
        for i in sorted(range(len(rows)), key=lambda i: len(rows[i])):
            # Sorted by length: this row is the longest so far.
            full = (len(batch) + 1) * len(rows[i]) > self.batch_tokens
            if batch and (full or len(rows[i]) - len(rows[batch[0]]) > SPREAD):
                yield batch
                batch = []
            batch.append(i)
        if batch:
            yield batch


def _cut(cache: DynamicCache, tokens: int) -> None:
    """Leave the first `tokens` of a cache."""
    cache.crop(tokens - cache.get_seq_length())


def decide(
    reader: LogitReader, prompts: Sequence[Ids], trie: LabelTrie, score: Score
) -> Iterator[tuple[int, int]]:
    """(index of a prompt, index of its label), as they are decided."""
    yield from _greedy(reader, prompts, trie) if score == "greedy" else _likeliest(reader, prompts, trie)


def _greedy(reader: LogitReader, prompts: Sequence[Ids], trie: LabelTrie) -> Iterator[tuple[int, int]]:
    said = dict.fromkeys(range(len(prompts)), trie.settle(()))
    while said:
        left = list(said)
        rows = [_with(prompts[i], said[i]) for i in left]
        for at, logits in reader.logits(rows, [1] * len(rows)):
            i = left[at]
            choices = trie.children[said[i]]
            best = choices[int(logits[-1, list(choices)].argmax())]
            said[i] = trie.settle((*said[i], best))
            label = trie.decided(said[i])
            if label is not None:
                del said[i]
                yield i, label


def _likeliest(reader: LogitReader, prompts: Sequence[Ids], trie: LabelTrie) -> Iterator[tuple[int, int]]:
    for chunk in batches(len(prompts), AT_ONCE):
        scores = likelihoods(reader, [prompts[i] for i in chunk], trie)
        for i, row in zip(chunk, scores, strict=True):
            yield i, int(row.argmax())


def likelihoods(reader: LogitReader, prompts: Sequence[Ids], trie: LabelTrie) -> Tensor:
    """log p(label and its end of line | prompt), in nats: (prompts, labels), float64."""
    stems = trie.stems()
    scores = torch.full((len(prompts), len(trie.paths)), -torch.inf, dtype=torch.float64)
    pairs = [(i, stem) for i in range(len(prompts)) for stem in stems]
    rows = [_with(prompts[i], stem) for i, stem in pairs]
    for at, logits in reader.logits(rows, [len(stem) + 1 for _, stem in pairs]):
        i, stem = pairs[at]
        nats = torch.log_softmax(logits.double(), -1).cpu()
        for label, path in enumerate(trie.paths):
            if stem[: len(path) - 1] == path[:-1]:
                scores[i, label] = nats[range(len(path)), list(path)].sum()
    return scores


def _with(prompt: Ids, tokens: Tokens) -> Ids:
    return np.concatenate([prompt, np.array(tokens, np.int64)])

"""Hidden tokens of held-out text: what is hidden is the same for every model and every length of window."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import Field

from clearhead.data.masking import Masker, token_bytes
from clearhead.data.packing import IGNORED
from clearhead.data.readers import CorpusError
from clearhead.evals.asking.losses import finite
from clearhead.evals.asking.running import batches, inference
from clearhead.evals.evaluation import EvaluationConfig
from clearhead.evals.reasons import Unmeasured
from clearhead.evals.subject import Subject

Ids = NDArray[np.int64]


class MaskConfig(EvaluationConfig):
    """share: of the tokens, or with whole_words of the words, that are hidden; each is shown as the mask token."""

    share: float = Field(default=0.3, gt=0, lt=1)
    whole_words: bool = False
    max_documents: int = Field(default=200, ge=1)
    max_tokens: int = Field(default=4096, ge=1)
    batch_tokens: int = Field(default=8192, ge=1)
    seed: int = 0


@dataclass(frozen=True, eq=False)
class HiddenText:
    """A document as it is shown, what was there (−100 where nothing is hidden), and the bytes of what is hidden."""

    shown: Ids
    labels: Ids
    bytes: float


def hide(subject: Subject, chosen: Sequence[int], config: MaskConfig) -> list[HiddenText]:
    """The chosen documents, cut to `max_tokens`, with tokens hidden by (seed, document).

    Bytes are those of the hidden tokens in a byte-level vocabulary, else the document's mean for each.
    Raises Unmeasured where the tokenizer has no mask token.
    """
    tokenizer: Any = subject.tokenizer
    try:
        masker = Masker(tokenizer, config.share, whole_words=config.whole_words, always=True)
    except CorpusError as error:
        raise Unmeasured(str(error)) from None
    store, sizes = subject.documents, token_bytes(tokenizer)
    found = []
    for i in chosen:
        ids = np.asarray(store.document(i)[: config.max_tokens], dtype=np.int64)
        shown, labels = masker(ids, (config.seed, i))
        hidden = labels[labels != IGNORED]
        mean = float(store.utf8_bytes[i]) / max(1, len(store.document(i)))
        found.append(
            HiddenText(shown, labels, len(hidden) * mean if sizes is None else float(sizes[hidden].sum()))
        )
    return found


@dataclass(frozen=True, eq=False)
class Guesses:
    """Bits of all hidden tokens of each document, how many of them were guessed first, and how many there are."""

    bits: NDArray[np.float64]
    right: NDArray[np.int64]
    hidden: NDArray[np.int64]


def guess(subject: Subject, documents: Sequence[HiddenText], length: int, batch_tokens: int) -> Guesses:
    """Each document in windows of `length` tokens that do not overlap, a bos token first in each.

    Raises Unmeasured where the losses are no numbers.
    """
    bos = subject.tokenizer.bos_token_id
    head = np.array([] if bos is None else [bos], dtype=np.int64)
    size = length - len(head)
    windows = [
        (index, start)
        for index, document in enumerate(documents)
        for start in range(0, len(document.shown), size)
        if (document.labels[start : start + size] != IGNORED).any()
    ]
    # Similar lengths side by side keep the padding small.
    windows.sort(key=lambda window: -min(size, len(documents[window[0]].shown) - window[1]))
    nats = np.zeros(len(documents))
    right, hidden = np.zeros(len(documents), dtype=np.int64), np.zeros(len(documents), dtype=np.int64)
    with inference(subject.model, length=length):
        for span in batches(len(windows), batch_tokens // length):
            part = [windows[i] for i in span]
            shown = [np.concatenate([head, documents[i].shown[at : at + size]]) for i, at in part]
            labels = [
                np.concatenate([np.full_like(head, IGNORED), documents[i].labels[at : at + size]])
                for i, at in part
            ]
            losses, hits = _losses(subject, shown, labels)
            for (i, _), row, loss, hit in zip(part, labels, losses, hits, strict=True):
                asked = row != IGNORED
                nats[i] += loss[: len(row)][asked].sum()
                right[i] += int(hit[: len(row)][asked].sum())
                hidden[i] += int(asked.sum())
    return Guesses(finite(nats) / math.log(2), right, hidden)


def _losses(
    subject: Subject, shown: Sequence[Ids], labels: Sequence[Ids]
) -> tuple[NDArray[np.float64], NDArray[np.bool_]]:
    """Nats and whether the first guess is right, for each place of each row; rows are padded and the padding masked."""
    longest = max(map(len, shown))
    ids = np.zeros((len(shown), longest), dtype=np.int64)
    real = np.zeros_like(ids)
    targets = np.full_like(ids, IGNORED)
    for row, (text, label) in enumerate(zip(shown, labels, strict=True)):
        ids[row, : len(text)], targets[row, : len(text)], real[row, : len(text)] = text, label, 1
    given, mask, wanted = (torch.from_numpy(part).to(subject.device) for part in (ids, real, targets))
    logits = subject.model(input_ids=given, attention_mask=mask).logits.float()
    nats = torch.nn.functional.cross_entropy(
        logits.flatten(0, 1), wanted.flatten(), ignore_index=IGNORED, reduction="none"
    ).view_as(wanted)
    return nats.double().cpu().numpy(), (logits.argmax(-1) == wanted).cpu().numpy()

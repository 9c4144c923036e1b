"""Perplexity of long text by window length, and of the same last segment as its context grows.

*Sliding window* (Press et al. 2021, with the stride of CoCA, arXiv 2309.08646, appendix B): a document is read in
windows of `length` tokens that end `stride` tokens apart; a window counts its last `stride` tokens, so each has
at least `length − stride` tokens of context. Every window starts anew at position 0. The last window ends where the
document ends and is as long as the others, so nothing is padded. What published protocols leave open is an option here:

* `bos`: a bos token in front of every window ("window"; it is one of the `length` tokens), of the first alone
  ("document"), or of none ("none": then nothing predicts a document's first token, and it is not counted). By default
  models trained here are read without, as their rows of text were: cut from one stream, few begin a document, while
  every row of facts has a bos, so that behind one a model expects facts. Others are read with one in every window;
* `first_window`: all its tokens count, those with little context too ("all", as in CoCA and YaRN's paper), or its
  last `stride` alone ("stride");
* `average`: exp(Σ NLL / Σ tokens) over all documents ("token"), or the mean over documents of each one's
  exp(NLL / tokens) ("document", as YaRN's evaluation program).

A window as long as the document is a single pass, whose average has tokens of every context length in it: "perplexity
at 8,192" is not the perplexity at position 8,192. Hence the second measure, Su's (kexue.fm/archives/9948): the *same*
last `segment` tokens of every document, read after `length − segment` tokens of context, for each length.

Bits per byte, `Σ NLL / (ln 2 · bytes)`, stand beside every perplexity: only they compare across tokenizers.

No key-value cache is used, for none is exact: from the second layer on the keys of a window's tokens depend on what
stood before them in *their* window, and the next window has lost its first `stride` tokens and counts positions
anew. (In a context with a fixed start that only grows, one pass gives every length: `loss_by_position`.)
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import Field

from clearhead.analysis.sections import Section
from clearhead.analysis.statistics import bootstrap_mean, bootstrap_ratio
from clearhead.data.store import TokenStore
from clearhead.evals.asking.losses import suffix_losses
from clearhead.evals.asking.running import batches, inference
from clearhead.evals.asking.texts import Ids, long_documents, utf8_size
from clearhead.evals.cells import Cell, CellEvaluation, LeftOut, Measured
from clearhead.evals.evaluation import EvaluationConfig, EvaluationResult
from clearhead.evals.finite import exponential
from clearhead.evals.probing.rescaling import rescaled
from clearhead.evals.reasons import Unmeasured
from clearhead.evals.subject import Subject, lengths_past_training
from clearhead.evals.text.perplexity.section import (
    Average,
    Bos,
    FirstWindow,
    PerplexityResult,
    Segment,
    SegmentCell,
    SlidingCell,
    perplexity_section,
)
from clearhead.runs.results import RunResults


class PerplexityConfig(EvaluationConfig):
    """lengths: windows in tokens (default: 1, 2, 4, 8 and 16 times the training length, as far as the text reaches).

    stride: tokens that a window counts (default: the training length); a window too short for it counts all it can.
    bos: default "none" for models trained here, "window" for others.
    segment: tokens at the end that every length predicts (default: half of the shortest length; 0 = not measured).
    max_tokens: of a document, from its start (default: the longest length). All lengths count the same documents, those
        that have as many; a length that fewer than `min_documents` have is left out.
    texts: files, directories or corpora instead of the run's validation documents.
    rope_parameters: evaluate under this rotary scaling, see `clearhead.evals.probing.rescaling`.
    """

    lengths: list[int] | None = Field(default=None, min_length=1)
    stride: int | None = Field(default=None, ge=1)
    segment: int | None = Field(default=None, ge=0)
    bos: Bos | None = None
    first_window: FirstWindow = "all"
    average: Average = "token"
    max_documents: int = Field(default=32, ge=1)
    min_documents: int = Field(default=4, ge=1)
    max_tokens: int | None = Field(default=None, ge=8)
    texts: list[str] | None = Field(default=None, min_length=1)
    rope_parameters: dict[str, Any] | None = None
    batch_tokens: int = Field(default=8192, ge=1)
    seed: int = 0


@dataclass(frozen=True)
class Window:
    """Text tokens start..stop − 1 are read, behind a bos or not; those from `counted` on count."""

    start: int
    stop: int
    counted: int
    bos: bool


@dataclass(frozen=True)
class WindowRow:
    """One input: its ids, the index of the first that counts, and the document it is of."""

    ids: Ids
    first: int
    document: int


class PerplexityValue(EvaluationResult):
    """One length: sliding windows, and the last segment where it was measured."""

    cell: SlidingCell
    ending: SegmentCell | None


@dataclass(frozen=True, kw_only=True)
class WindowedReading(Cell):
    """The same documents in windows of `tokens` tokens."""

    tokens: int
    text: WindowedText


@dataclass(frozen=True)
class WindowedText:
    """What all lengths read. bos: the token before a window, if any. segment: tokens at the end."""

    documents: list[Ids]
    names: list[str]
    bos: int | None
    rule: Bos
    stride: int
    segment: int


class Perplexity(CellEvaluation[PerplexityConfig, PerplexityResult, WindowedReading, PerplexityValue]):
    name = "perplexity"
    Config = PerplexityConfig
    Result = PerplexityResult
    Value = PerplexityValue
    tells_overflow = True

    def text(self, subject: Subject, config: PerplexityConfig) -> TokenStore | None:
        return subject.texts(config.texts)

    def cells(self, subject: Subject, config: PerplexityConfig) -> Iterator[WindowedReading | LeftOut]:
        lengths = lengths_past_training(subject, config.lengths)
        if lengths[0] < 8:
            raise Unmeasured(
                f"a window of {lengths[0]} tokens is too short to measure; give lengths of at least 8"
            )
        store = subject.texts(config.texts)
        rule = config.bos or ("window" if subject.external else "none")
        bos = None if rule == "none" else subject.tokenizer.bos_token_id
        head = int(bos is not None)
        within, skipped = reached(store, lengths, bos is not None, config.min_documents)
        if not within:
            raise Unmeasured(
                f"{next(iter(skipped.values()))}; lower evaluate.{self.name}.lengths or give longer texts"
            )
        wanted = max(config.max_tokens or within[-1], within[-1]) - head
        chosen, documents = long_documents(
            store, within[-1] - head, wanted, config.max_documents, config.seed
        )
        text = WindowedText(
            documents,
            [store.ids[i] for i in chosen],
            bos,
            rule if bos is not None else "none",
            config.stride or subject.training_length or 256,
            within[0] // 2 if config.segment is None else config.segment,
        )
        for length in sorted(lengths, key=within.__contains__):
            if reason := skipped.get(str(length)):
                yield LeftOut(str(length), reason)
            else:
                yield WindowedReading(name=str(length), length=length, tokens=length, text=text)

    def measure(self, subject: Subject, config: PerplexityConfig, cell: WindowedReading) -> PerplexityValue:
        length, text = cell.tokens, cell.text
        scaling, trained = config.rope_parameters, subject.training_length
        with rescaled(subject.model, scaling, trained=trained, length=length):
            rows = sliding_rows(text, length, config.first_window)
            found = measured(subject, text.documents, rows, config)
            if found is None:
                raise Unmeasured("the losses are not numbers")
            tail = None
            if 0 < text.segment < length - int(text.bos is not None):
                tail = measured(subject, text.documents, segment_rows(text, length), config)
        stride = min(text.stride, length - 1)
        return PerplexityValue(
            cell=SlidingCell(length=length, stride=stride, windows=len(rows), **found),
            ending=None if tail is None else SegmentCell(length=length, **tail),
        )

    def gather(
        self, subject: Subject, config: PerplexityConfig, measured: Measured[WindowedReading, PerplexityValue]
    ) -> PerplexityResult:
        text = measured.pairs[0][0].text
        endings = [value.ending for value in measured.values if value.ending is not None]
        return PerplexityResult(
            cells=[value.cell for value in measured.values],
            segment=Segment(tokens=text.segment, cells=endings),
            skipped_cells=measured.skipped,
            training_length=subject.training_length,
            bos=text.rule,
            first_window=config.first_window,
            average=config.average,
            rope_parameters=config.rope_parameters,
            texts=config.texts,
            n=len(text.documents),
            documents=text.names,
        )

    def section(self, run: RunResults) -> Section:
        title, question = (
            "Perplexity by length",
            "Does it predict text far longer than what it was trained on?",
        )
        values = self.results(run)
        if not values:
            return self.missing(run, title, question)
        return perplexity_section(self.name, title, question, run, values)


def reached(
    store: TokenStore, lengths: Sequence[int], bos: bool, least: int
) -> tuple[list[int], dict[str, str]]:
    """The lengths that at least `least` documents have, and why the others are left out."""
    sizes = np.diff(store.offsets) + int(bos)
    counts = {length: int((sizes >= length).sum()) for length in lengths}
    skipped = {
        str(
            length
        ): f"only {count} of {len(store)} documents have {length} tokens, at least {least} are needed"
        for length, count in counts.items()
        if count < least
    }
    return [length for length in lengths if counts[length] >= least], skipped


def windows(tokens: int, length: int, stride: int, bos: Bos, first_window: FirstWindow) -> list[Window]:
    """The windows over a document of `tokens` tokens; each token counts in at most one of them."""
    head = bos != "none"
    stop = min(length - head, tokens)
    counted = 0 if head else 1
    if first_window == "stride":
        counted = max(counted, stop - stride)
    found = [Window(0, stop, counted, head)]
    head = bos == "window"
    # Without a bos a window's own first token cannot be predicted, so it must have been counted before.
    step = min(stride, length - 1)
    while stop < tokens:
        before, stop = stop, min(stop + step, tokens)
        found.append(Window(max(0, stop - (length - head)), stop, before, head))
    return found


def sliding_rows(text: WindowedText, length: int, first_window: FirstWindow) -> list[WindowRow]:
    """The rows of all windows of all documents."""
    rows = []
    for index, document in enumerate(text.documents):
        for window in windows(len(document), length, text.stride, text.rule, first_window):
            ids = document[window.start : window.stop]
            if window.bos:
                ids = np.concatenate([[text.bos], ids]).astype(np.int64)
            rows.append(WindowRow(ids, window.counted - window.start + window.bos, index))
    return rows


def segment_rows(text: WindowedText, length: int) -> list[WindowRow]:
    """The last tokens of each document after as much context as `length` leaves."""
    head = [] if text.bos is None else [text.bos]
    return [
        WindowRow(
            np.concatenate([head, document[-(length - len(head)) :]]).astype(np.int64),
            length - text.segment,
            index,
        )
        for index, document in enumerate(text.documents)
    ]


def measured(
    subject: Subject, documents: Sequence[Ids], rows: list[WindowRow], config: PerplexityConfig
) -> dict[str, Any] | None:
    """Losses, tokens and bytes of each document, and the figures made of them; None if a loss is not a number."""
    nats = np.zeros(len(documents))
    tokens = np.zeros(len(documents), dtype=np.int64)
    # Rows of one length share a batch, so that none is padded: a longer neighbour would change a dynamic scaling.
    ordered = sorted(rows, key=lambda row: (len(row.ids), row.first))
    with inference(subject.model):
        for group in grouped(ordered, config.batch_tokens):
            ids = torch.from_numpy(np.stack([row.ids for row in group])).to(subject.device)
            first = min(row.first for row in group)
            table = suffix_losses(subject.model, ids, first).double().cpu().numpy()
            for row, losses in zip(group, table, strict=True):
                nats[row.document] += losses[row.first - first :].sum()
    for row in rows:
        tokens[row.document] += len(row.ids) - row.first
    # What counts is the end of a document, whole: decoding it in pieces would break characters of several tokens.
    sizes = np.array(
        [
            utf8_size(subject.tokenizer, ids[len(ids) - count :])
            for ids, count in zip(documents, tokens, strict=True)
        ]
    )
    return figures(nats, tokens, sizes, config.average) if np.isfinite(nats).all() else None


def grouped(rows: Sequence[WindowRow], batch_tokens: int) -> list[list[WindowRow]]:
    """Neighbours of equal length, at most `batch_tokens` tokens a group (always one row)."""
    groups: list[list[WindowRow]] = []
    by_length: dict[int, list[WindowRow]] = {}
    for row in rows:
        by_length.setdefault(len(row.ids), []).append(row)
    for length, same in by_length.items():
        groups += [[same[i] for i in span] for span in batches(len(same), batch_tokens // length)]
    return groups


def figures(
    nats: NDArray[np.float64], tokens: NDArray[np.int64], sizes: NDArray[np.int64], average: Average
) -> dict[str, Any]:
    """Perplexity and bits per byte with their intervals (bootstrap over documents)."""
    if average == "token":
        value = exponential(nats.sum() / tokens.sum())
        low, high = (exponential(bound) for bound in bootstrap_ratio(nats, tokens.astype(np.float64)))
    else:
        each = np.array([exponential(loss) for loss in nats / tokens])
        value = float(each.mean())
        low, high = bootstrap_mean(each)
    return {
        "perplexity": value,
        "low": low,
        "high": high,
        "bits_per_byte": float(nats.sum() / math.log(2) / sizes.sum()),
        "nats": [round(float(loss), 4) for loss in nats],
        "tokens": tokens.tolist(),
        "bytes": sizes.tolist(),
    }

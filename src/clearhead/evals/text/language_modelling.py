"""Validation bits per byte: how well a model predicts text it has not seen, whatever its tokenizer.

`bits per byte = Σ NLL / (ln 2 · Σ UTF-8 bytes)` over validation documents. A document is read in windows of
`length` tokens, a bos token first; a window starts `stride` tokens after the one before, and only its tokens that
no window has predicted yet are counted, so that every token counts once and, past the first window, has at least
`length - stride` tokens of context. The interval is a bootstrap over documents.
"""

from __future__ import annotations

import math
from itertools import groupby

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from clearhead.analysis.by_length import first_values
from clearhead.analysis.comparison import compare
from clearhead.analysis.sections import Section, SectionTable
from clearhead.evals.asking.losses import finite
from clearhead.evals.asking.running import batches, inference, to_batch, token_losses
from clearhead.evals.asking.texts import choose, utf8_size
from clearhead.evals.cells import LengthEvaluation, TextLength
from clearhead.evals.evaluation import EvaluationConfig, EvaluationResult
from clearhead.evals.reasons import Unmeasured
from clearhead.evals.subject import Subject
from clearhead.runs.results import RunResults


class LanguageModellingConfig(EvaluationConfig):
    """length: window in tokens (default: the training length). max_tokens: of one document, from its start."""

    length: int | None = Field(default=None, ge=2)
    stride: int | None = Field(default=None, ge=1)
    max_documents: int = Field(default=200, ge=1)
    max_tokens: int = Field(default=4096, ge=1)
    batch_tokens: int = Field(default=8192, ge=1)
    seed: int = 0


class LanguageModellingResult(EvaluationResult):
    """bits, bytes: of each document. perplexity: None where it is too large to be a number."""

    bits_per_byte: float
    perplexity: float | None
    length: int
    stride: int
    n: int
    tokens: int
    documents: list[str]
    bits: list[float]
    bytes: list[int]


class LanguageModelling(LengthEvaluation[LanguageModellingConfig, LanguageModellingResult]):
    name = "language_modelling"
    Config = LanguageModellingConfig
    Result = LanguageModellingResult

    def length(self, subject: Subject, config: LanguageModellingConfig) -> int:
        length = config.length or subject.training_length or 256
        stride = self._stride(config, length)
        if stride >= length:
            raise Unmeasured(f"stride {stride} must be shorter than the window of {length} tokens")
        return length

    def _stride(self, config: LanguageModellingConfig, length: int) -> int:
        return config.stride or max(1, length // 2)

    def measure(
        self, subject: Subject, config: LanguageModellingConfig, cell: TextLength
    ) -> LanguageModellingResult:
        length, stride = cell.tokens, self._stride(config, cell.tokens)
        store = subject.documents
        chosen = choose(len(store), config.max_documents, config.seed)
        documents = [np.asarray(store.document(i)[: config.max_tokens], dtype=np.int64) for i in chosen]
        # Only a document that was cut has to be decoded to know how much text its tokens are.
        sizes = [
            int(store.utf8_bytes[i])
            if len(document) == len(store.document(i))
            else utf8_size(subject.tokenizer, document)
            for i, document in zip(chosen, documents, strict=True)
        ]
        nats = finite(self._losses(subject, documents, length, stride, config.batch_tokens))
        mean = nats.sum() / sum(map(len, documents))
        bits = nats / math.log(2)
        return LanguageModellingResult(
            bits_per_byte=float(bits.sum() / sum(sizes)),
            # Past e^709 there is no such number; bits per byte say the same.
            perplexity=math.exp(mean) if mean < 709 else None,
            length=length,
            stride=stride,
            n=len(documents),
            tokens=sum(map(len, documents)),
            documents=[store.ids[i] for i in chosen],
            bits=[round(float(value), 4) for value in bits],
            bytes=sizes,
        )

    def _losses(
        self,
        subject: Subject,
        documents: list[NDArray[np.int64]],
        length: int,
        stride: int,
        batch_tokens: int,
    ) -> NDArray[np.float64]:
        """Total NLL in nats of each document."""
        bos = subject.tokenizer.bos_token_id
        head = [] if bos is None else [bos]
        windows: list[tuple[int, NDArray[np.int64], int]] = []
        for index, document in enumerate(documents):
            tokens = np.concatenate([np.array(head, dtype=np.int64), document])
            windows += [(index, *window) for window in cut(tokens, length, stride)]
        # Similar lengths side by side keep the padding small.
        windows.sort(key=lambda window: -len(window[1]))
        totals = np.zeros(len(documents))
        apart = subject.adapter.frequencies_depend_on_length()
        for size, same in groupby(windows, lambda window: len(window[1]) if apart else None):
            rows = list(same)
            with inference(subject.model, length=size):
                for span in batches(len(rows), batch_tokens // length):
                    part = [rows[i] for i in span]
                    ids = to_batch([row for _, row, _ in part], subject.device)
                    table = token_losses(subject.model, ids).double().cpu().numpy()
                    for (index, row, first), values in zip(part, table, strict=True):
                        totals[index] += values[first - 1 : len(row) - 1].sum()
        return totals

    def section(self, run: RunResults) -> Section:
        title, question = "Language modelling", "Does it predict unseen text better?"
        values = self.results(run)
        if not values:
            return self.missing(run, title, question)
        first = first_values(values)
        samples = {arm: {seed: v.bits for seed, v in seeds.items()} for arm, seeds in values.items()}
        result = compare(samples, "lower", denominators=first.bytes, digits=3)
        rows = [
            [
                arm.name,
                *(
                    f"{values[arm.name][seed].bits_per_byte:.3f}"
                    if seed in values.get(arm.name, {})
                    else None
                    for seed in arm.seeds
                ),
            ]
            for arm in run.arms
        ]
        headers = ["arm", *(f"seed {seed}" for seed in run.baseline.seeds)]
        notes = [
            f"{first.n} validation documents, {first.tokens:,} tokens, in windows of {first.length} tokens "
            f"that move on by {first.stride}; every token counts once. Intervals: bootstrap over "
            "documents or Student's t over seeds, whichever is wider; differences are paired by document and seed.",
            *run.skipped(self.name),
        ]
        return Section(
            self.name,
            title,
            question,
            result.sentence(),
            measure="bits per byte ↓",
            digits=3,
            headlines=result.headlines(),
            tables=[SectionTable("Validation bits per byte of each trained model", headers, rows)],
            notes=notes,
        )


def cut(tokens: NDArray[np.int64], length: int, stride: int) -> list[tuple[NDArray[np.int64], int]]:
    """Windows of a document as (tokens, index of the first token that counts); each token but the first counts once."""
    windows = []
    start, done = 0, 1
    while done < len(tokens):
        end = min(start + length, len(tokens))
        windows.append((tokens[start:end], done - start))
        start, done = start + stride, end
    return windows

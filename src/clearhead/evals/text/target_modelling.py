"""Bits per target byte of an encoder-decoder, and how often its own target is the right one.

`bits per target byte = Σ NLL of the target's tokens and its end / (ln 2 · Σ UTF-8 bytes of the target)` over held-out
rows. Exact match: the target that greedy decoding writes is the held-out one, but for white space at its ends; where
that begins or ends within a character, its tokens are.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from pydantic import Field

from clearhead.analysis.by_length import first_values
from clearhead.analysis.comparison import compare
from clearhead.analysis.sections import Section, SectionTable
from clearhead.data.masking import text_bytes
from clearhead.data.packing import IGNORED
from clearhead.evals.asking.losses import finite
from clearhead.evals.asking.running import batches, inference
from clearhead.evals.cells import LengthEvaluation, TextLength
from clearhead.evals.evaluation import EvaluationConfig, EvaluationResult
from clearhead.evals.reasons import Unmeasured
from clearhead.evals.subject import Subject
from clearhead.models.tasks import collate, task_of
from clearhead.runs.results import RunResults


class TargetModellingConfig(EvaluationConfig):
    """rows: held-out ones at most. written: for how many of them a target is written; 0 writes none."""

    rows: int = Field(default=1000, ge=1)
    written: int = Field(default=200, ge=0)
    batch: int = Field(default=32, ge=1)


class TargetModellingResult(EvaluationResult):
    """bits, bytes: of the target of each row. right: whether the written target is the held-out one, of the first."""

    bits_per_byte: float
    exact_match: float | None
    n: int
    bits: list[float]
    bytes: list[int]
    right: list[int]


class TargetModelling(LengthEvaluation[TargetModellingConfig, TargetModellingResult]):
    name = "target_modelling"
    tasks = ("seq2seq",)
    Config = TargetModellingConfig
    Result = TargetModellingResult

    def length(self, subject: Subject, config: TargetModellingConfig) -> int:
        return subject.training_length or 256

    def measure(
        self, subject: Subject, config: TargetModellingConfig, cell: TextLength
    ) -> TargetModellingResult:
        rows = subject.held_out(config.rows)
        if not rows:
            raise Unmeasured("the training held out no rows")
        tokenizer: Any = subject.tokenizer
        targets = [row["labels"][row["labels"] != IGNORED].tolist() for row in rows]
        bits, right = [], []
        with inference(subject.model, length=cell.tokens):
            for span in batches(len(rows), config.batch):
                batch = collate([rows[i] for i in span])
                inputs = {key: value.to(subject.device) for key, value in batch.items()}
                bits += self._bits(subject, dict(inputs))
                asked = max(0, min(len(span), config.written - span.start))
                if asked:
                    written = self._written(subject, inputs, asked, max(map(len, targets)))
                    wanted = targets[span.start : span.start + asked]
                    right += [int(same_text(tokenizer, a, b)) for a, b in zip(written, wanted, strict=True)]
        sizes = text_bytes(tokenizer, targets)
        return TargetModellingResult(
            bits_per_byte=float(finite(np.array(bits)).sum() / sum(sizes)),
            exact_match=sum(right) / len(right) if right else None,
            n=len(rows),
            bits=[round(value, 4) for value in bits],
            bytes=sizes,
            right=right,
        )

    def _bits(self, subject: Subject, inputs: dict[str, torch.Tensor]) -> list[float]:
        task = task_of("seq2seq")
        labels = inputs.pop("labels")
        losses, _ = task.losses(subject.model(**inputs, **task.forward).logits, labels)
        found: list[float] = (losses.double().sum(dim=1) / math.log(2)).tolist()
        return found

    def _written(
        self, subject: Subject, inputs: dict[str, torch.Tensor], asked: int, length: int
    ) -> list[list[int]]:
        made = subject.model.generate(  # type: ignore[operator]
            input_ids=inputs["input_ids"][:asked],
            attention_mask=inputs["attention_mask"][:asked],
            max_new_tokens=length,
            do_sample=False,
            num_beams=1,
        )
        ids: list[list[int]] = made.tolist()
        return ids

    def section(self, run: RunResults) -> Section:
        title, question = "Targets", "Does it write the right target for an unseen source?"
        values = self.results(run)
        if not values:
            return self.missing(run, title, question)
        first = first_values(values)
        samples = {arm: {seed: v.bits for seed, v in seeds.items()} for arm, seeds in values.items()}
        same = all(v.bytes == first.bytes for seeds in values.values() for v in seeds.values())
        sizes = first.bytes if same else [1] * first.n
        result = compare(samples, "lower", denominators=sizes, digits=3)
        matches = compare(
            {arm: {s: v.right for s, v in seeds.items()} for arm, seeds in values.items()},
            "higher",
            proportions=True,
            digits=3,
        ) if first.right else None  # fmt: skip
        rows = [
            [
                arm,
                result.estimates[arm].text(3),
                matches.estimates[arm].text(3) if matches else None,
            ]
            for arm in values
        ]
        unit = "bits per target byte" if same else "bits per target"
        return Section(
            self.name,
            title,
            question,
            result.sentence(),
            measure=f"{unit} ↓",
            digits=3,
            headlines=result.headlines(),
            tables=[SectionTable("Targets of held-out sources", ["arm", unit, "exact match"], rows)],
            notes=[
                f"{first.n} held-out rows a seed; a target is written for {len(first.right)} of them, greedily. "
                "Intervals: bootstrap over rows (Wilson for exact match) or Student's t over seeds, the wider; "
                "differences are paired by row and seed.",
                *([f"Exact match: {matches.sentence()}"] if matches else []),
                *run.skipped(self.name),
            ],
        )


def same_text(tokenizer: Any, one: list[int], other: list[int]) -> bool:
    """Whether both are one text, but for white space at its ends and special tokens.

    Any part of a character is decoded to U+FFFD, so that texts with one are compared by their tokens.
    """
    here, there = tokenizer.batch_decode([one, other], skip_special_tokens=True)
    if here.strip() != there.strip():
        return False
    special = set(tokenizer.all_special_ids)
    bare = [[token for token in ids if token not in special] for ids in (one, other)]
    return "\ufffd" not in here or bare[0] == bare[1]

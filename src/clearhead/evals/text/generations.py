"""What a model writes when it is let go on: how much it repeats itself, and whether it comes to an end.

Scores of multiple choice do not show a model whose text has fallen to pieces. The prompts are the openings of held-out
documents. A token is repeated when it ends a sequence of `gram` tokens that the text (prompt and what is written) has
had before; the repetition of a text is the share of such tokens among those written. A text is a loop when its last 32
tokens are one run of at most 16 tokens, again and again.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import Field
from transformers import GenerationConfig

from clearhead.analysis.comparison import compare
from clearhead.analysis.sections import Section, SectionTable
from clearhead.evals.asking.decoding import greedy
from clearhead.evals.asking.running import inference
from clearhead.evals.asking.texts import openings
from clearhead.evals.cells import Cell, CellEvaluation, Measured
from clearhead.evals.evaluation import EvaluationConfig, EvaluationResult
from clearhead.evals.subject import Subject
from clearhead.runs.results import RunResults

Mode = Literal["greedy", "sampled"]
TAIL, LONGEST_PERIOD = 32, 16


class GenerationsConfig(EvaluationConfig):
    """prompts: how many. prompt_tokens, new_tokens: of each. gram: tokens of a sequence that counts as repeated.

    temperature: of the sampled texts, which are drawn with `seed`; nothing is cut off the distribution.
    """

    modes: list[Mode] = Field(default=["greedy", "sampled"], min_length=1)
    prompts: int = Field(default=32, ge=1)
    prompt_tokens: int = Field(default=32, ge=2)
    new_tokens: int = Field(default=200, ge=TAIL)
    gram: int = Field(default=4, ge=1)
    temperature: float = Field(default=1.0, gt=0)
    batch: int = Field(default=16, ge=1)
    seed: int = 0


class GenerationsValue(EvaluationResult):
    """Of each text: the share of repeated tokens, the tokens written, whether the model ended it, whether it loops."""

    mode: Mode
    repetition: list[float]
    tokens: list[int]
    ended: list[bool]
    loops: list[bool]


class GenerationsResult(EvaluationResult):
    values_by_mode: list[GenerationsValue]
    new_tokens: int
    gram: int
    skipped: dict[str, str] = Field(default={})


@dataclass(frozen=True, kw_only=True)
class GenerationsCell(Cell):
    mode: Mode


class Generations(CellEvaluation[GenerationsConfig, GenerationsResult, GenerationsCell, GenerationsValue]):
    name = "generations"
    Config = GenerationsConfig
    Result = GenerationsResult
    Value = GenerationsValue

    def cells(self, subject: Subject, config: GenerationsConfig) -> list[GenerationsCell]:
        length = config.prompt_tokens + config.new_tokens
        return [GenerationsCell(name=mode, length=length, mode=mode) for mode in dict.fromkeys(config.modes)]

    def measure(self, subject: Subject, config: GenerationsConfig, cell: GenerationsCell) -> GenerationsValue:
        rows = openings(
            subject, config.prompt_tokens, config.prompts, config.seed, f"{self.name}.prompt_tokens"
        ).rows
        ends = _ends(subject)
        written: list[list[int]] = []
        with inference(subject.model), greedy(subject.model), torch.random.fork_rng():
            torch.manual_seed(config.seed)
            for first in range(0, len(rows), config.batch):
                written += _written(subject, rows[first : first + config.batch], config, cell.mode, ends)
        kept = [until(tokens, ends) for tokens in written]
        return GenerationsValue(
            mode=cell.mode,
            repetition=[
                repetition(row.tolist(), tokens, config.gram)
                for row, (tokens, _) in zip(rows, kept, strict=True)
            ],
            tokens=[len(tokens) for tokens, _ in kept],
            ended=[ended for _, ended in kept],
            loops=[loops(tokens) for tokens, _ in kept],
        )

    def gather(
        self,
        subject: Subject,
        config: GenerationsConfig,
        measured: Measured[GenerationsCell, GenerationsValue],
    ) -> GenerationsResult:
        return GenerationsResult(
            values_by_mode=measured.values,
            new_tokens=config.new_tokens,
            gram=config.gram,
            skipped=measured.skipped,
        )

    def section(self, run: RunResults) -> Section:
        title, question = "Free text", "Does it repeat itself when it writes?"
        values = self.results(run)
        if not values:
            return self.missing(run, title, question)
        results = [one for seeds in values.values() for one in seeds.values()]
        first = results[0].values_by_mode[0].mode
        samples = {
            arm: {seed: found for seed, one in seeds.items() if (found := _of(one, first)) is not None}
            for arm, seeds in values.items()
        }
        result = compare(
            {arm: {seed: one.repetition for seed, one in seeds.items()} for arm, seeds in samples.items()},
            "lower",
            digits=3,
        )
        rows = [
            [arm, value.mode, *_means([_of(one, value.mode) for one in seeds.values()])]
            for arm, seeds in values.items()
            for value in next(iter(seeds.values())).values_by_mode
        ]
        gram = results[0].gram
        notes = [
            f"{len(results[0].values_by_mode[0].tokens)} openings of held-out documents, at most "
            f"{results[0].new_tokens} new tokens each. Repeated: tokens that end a run of {gram} which the text has "
            "had before, as a share of those written; loops: texts whose end is one short run again and again. "
            "Repetition is compared, by prompt and seed; a text of the corpus repeats something too, so the lowest is "
            "not the best by itself.",
            *run.skipped(self.name),
        ]
        headers = ["arm", "decoding", "repeated", "loops", "tokens", "ended"]
        return Section(
            self.name,
            title,
            question,
            result.sentence(),
            measure=f"repeated {gram}-grams, {first} ↓",
            digits=3,
            headlines=result.headlines(),
            tables=[SectionTable("What is written, mean over prompts and seeds", headers, rows)],
            notes=notes,
        )


def _of(result: GenerationsResult, mode: str) -> GenerationsValue | None:
    return next((value for value in result.values_by_mode if value.mode == mode), None)


def _means(values: Sequence[GenerationsValue | None]) -> list[str]:
    there = [value for value in values if value is not None]

    def mean(parts: list[Any]) -> float:
        return float(np.mean([number for part in parts for number in part]))

    return [
        f"{mean([v.repetition for v in there]):.3f}",
        f"{mean([v.loops for v in there]):.0%}",
        f"{mean([v.tokens for v in there]):.0f}",
        f"{mean([v.ended for v in there]):.0%}",
    ]


def _ends(subject: Subject) -> list[int]:
    """The tokens that end a text: the model's, and the one that begins the next document."""
    config = subject.model.config
    found: list[int] = []
    for value in (getattr(config, "eos_token_id", None), subject.tokenizer.bos_token_id):
        found += value if isinstance(value, list) else [] if value is None else [int(value)]
    return list(dict.fromkeys(found))


def _written(
    subject: Subject, rows: NDArray[np.int64], config: GenerationsConfig, mode: Mode, ends: list[int]
) -> list[list[int]]:
    ids = torch.from_numpy(rows).to(subject.device)
    settings = GenerationConfig(
        do_sample=mode == "sampled",
        temperature=config.temperature if mode == "sampled" else None,
        top_k=0 if mode == "sampled" else None,
        max_new_tokens=config.new_tokens,
        eos_token_id=ends or None,
        pad_token_id=ends[0] if ends else 0,
    )
    found = subject.model.generate(ids, attention_mask=torch.ones_like(ids), generation_config=settings)  # type: ignore[operator]
    new: list[list[int]] = found[:, ids.shape[1] :].tolist()
    return new


def until(tokens: list[int], ends: Sequence[int]) -> tuple[list[int], bool]:
    """The tokens before the first that ends the text, and whether there is one."""
    for place, token in enumerate(tokens):
        if token in ends:
            return tokens[:place], True
    return tokens, False


def repetition(prompt: Sequence[int], tokens: Sequence[int], gram: int) -> float:
    """The share of `tokens` that end a run of `gram` tokens which prompt and text have had before; 0 of no tokens."""
    text = [*prompt, *tokens]
    seen: set[tuple[int, ...]] = set()
    repeated = 0
    for end in range(gram, len(text) + 1):
        run = tuple(text[end - gram : end])
        if end > len(prompt) and run in seen:
            repeated += 1
        seen.add(run)
    return repeated / len(tokens) if tokens else 0.0


def loops(tokens: Sequence[int]) -> bool:
    """Whether the last 32 tokens are one run of at most 16, again and again."""
    tail = list(tokens[-TAIL:])
    return len(tail) == TAIL and any(
        tail[period:] == tail[:-period] for period in range(1, LONGEST_PERIOD + 1)
    )

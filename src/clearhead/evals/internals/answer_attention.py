"""Attention to the answer: how much of the weight of a question's tokens lies on the answer in the paragraph.

A text is a paragraph and behind it a question whose answer stands in the paragraph once, as in extractive question
answering. For every token of the question, head and layer: the share of Σ |A| that lies on the answer's tokens, A
being the effective map, A1 − λ A2 of a differential head. Divided by the share that even attention would give (answer
tokens over visible tokens) it says how many times more than chance the answer is looked at. Nothing is trained for
this: it asks where attention goes by itself, about which the Differential Transformer makes its promise (arXiv
2410.05258, section 3.3, which measures it for needles).
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import Field

from clearhead.analysis.by_length import first_values
from clearhead.analysis.comparison import compare
from clearhead.analysis.sections import Section, SectionTable
from clearhead.data.store import TokenStore
from clearhead.evals.asking.articles import read_articles
from clearhead.evals.asking.running import inference
from clearhead.evals.asking.texts import choose
from clearhead.evals.cells import CellEvaluation, Measured, TextLength
from clearhead.evals.evaluation import EvaluationConfig, EvaluationResult
from clearhead.evals.reasons import Unmeasured
from clearhead.evals.subject import Subject
from clearhead.runs.results import RunResults

BETWEEN = "\n"
SHORTEST = 8
"""Tokens of the paragraph that a text has at least."""


class AnswerAttentionConfig(EvaluationConfig):
    """data: articles in SQuAD's form, .json or JSON lines. length: tokens of a text (default: the training length)."""

    data: str | None = None
    length: int | None = Field(default=None, ge=32)
    questions: int = Field(default=100, ge=1)
    seed: int = 0


class AnswerAttentionResult(EvaluationResult):
    """times: of each question, share over even share, mean over heads and layers. heads: by layer, over questions."""

    length: int
    n: int
    times: list[float]
    share: float
    heads: list[list[float]]


class AnswerAttentionValue(EvaluationResult):
    """shares, times: (question, layer, head)."""

    shares: list[list[list[float]]]
    times: list[list[list[float]]]


@dataclass(frozen=True, eq=False)
class AskedText:
    """Ids, the places of the answer, and where the question begins."""

    ids: NDArray[np.int64]
    answer: slice
    question: int


class AnswerAttention(
    CellEvaluation[AnswerAttentionConfig, AnswerAttentionResult, TextLength, AnswerAttentionValue]
):
    name = "answer_attention"
    tasks = ("causal", "masked", "classify")
    Config = AnswerAttentionConfig
    Result = AnswerAttentionResult
    Value = AnswerAttentionValue

    def cells(self, subject: Subject, config: AnswerAttentionConfig) -> Iterable[TextLength]:
        if config.data is None:
            raise Unmeasured(f"it reads articles with questions: name them in evaluate.{self.name}.data")
        length = config.length or subject.training_length or 256
        return [TextLength(name=f"{length} tokens", length=length, tokens=length)]

    def text(self, subject: Subject, config: AnswerAttentionConfig) -> TokenStore | None:
        return None

    def measure(
        self, subject: Subject, config: AnswerAttentionConfig, cell: TextLength
    ) -> AnswerAttentionValue:
        texts = self._texts(subject, config, cell.tokens)
        causal = subject.task == "causal"
        shares, times = [], []
        with inference(subject.model, length=cell.tokens):
            for text in texts:
                ids = torch.from_numpy(text.ids)[None].to(subject.device)
                maps = subject.model(input_ids=ids, output_attentions=True).attentions
                if not maps or any(layer is None for layer in maps):
                    raise Unmeasured(f"{type(subject.model).__name__} gives no attention maps")
                found = torch.stack([on_answer(layer[0], text) for layer in maps])
                shares.append(found.tolist())
                times.append((found / even(text, causal)).tolist())
        return AnswerAttentionValue(shares=_rounded(shares), times=_rounded(times))

    def _texts(self, subject: Subject, config: AnswerAttentionConfig, length: int) -> list[AskedText]:
        """Questions whose text fits, drawn by the seed. Raises Unmeasured where there is none."""
        assert config.data is not None
        articles = read_articles(config.data, unique=False)
        found = [
            text
            for article in articles
            for question in article.questions
            if (text := laid_out(subject, article.paragraphs[question.paragraph], question.text,
                                 question.answers[0], length)) is not None
        ]  # fmt: skip
        if not found:
            raise Unmeasured(f"no question and its answer fit into {length} tokens")
        return [found[i] for i in choose(len(found), config.questions, config.seed)]

    def gather(
        self,
        subject: Subject,
        config: AnswerAttentionConfig,
        measured: Measured[TextLength, AnswerAttentionValue],
    ) -> AnswerAttentionResult:
        cell, value = measured.pairs[0]
        times = np.array(value.times)
        return AnswerAttentionResult(
            length=cell.tokens,
            n=len(times),
            times=[round(float(one), 5) for one in times.mean(axis=(1, 2))],
            share=round(float(np.mean(value.shares)), 6),
            heads=[[round(float(one), 4) for one in layer] for layer in times.mean(axis=0)],
        )

    def section(self, run: RunResults) -> Section:
        title, question = "Attention to the answer", "Does a question look at its answer?"
        values = self.results(run)
        if not values:
            return self.missing(run, title, question)
        first = first_values(values)
        samples = {arm: {s: v.times for s, v in seeds.items()} for arm, seeds in values.items()}
        result = compare(samples, "higher")
        rows = []
        for arm, seeds in values.items():
            best = np.mean([max(map(max, v.heads)) for v in seeds.values()])
            share = np.mean([v.share for v in seeds.values()])
            rows.append([arm, result.estimates[arm].text(), f"{share:.4f}", f"{best:.2f}"])
        return Section(
            self.name,
            title,
            question,
            result.sentence(),
            measure="attention to the answer, times even attention ↑",
            headlines=result.headlines(),
            tables=[
                SectionTable(
                    "Weight of a question's tokens on its answer",
                    ["arm", "times even attention", "share of the weight", "best head, times even attention"],
                    rows,
                    "The best head is chosen on the same questions, so it is flattered.",
                )
            ],
            notes=[
                f"{first.n} questions, a paragraph and the question in {first.length} tokens at most; |weight|, mean "
                "over the question's tokens, heads and layers. Intervals: bootstrap over questions or Student's t over "
                "seeds, the wider; differences are paired by question and seed.",
                *run.skipped(self.name),
            ],
        )


def laid_out(subject: Subject, paragraph: str, question: str, answer: str, length: int) -> AskedText | None:
    """bos, the paragraph, a line's end and the question; the paragraph is cut around the answer where it is too long.

    None where the answer is not there exactly once, or does not fit.
    """
    if paragraph.count(answer) != 1:
        return None
    tokenizer: Any = subject.tokenizer
    made = tokenizer(paragraph, add_special_tokens=False, return_offsets_mapping=True)
    begin = paragraph.index(answer)
    inside = [
        i
        for i, (first, last) in enumerate(made["offset_mapping"])
        if last > begin and first < begin + len(answer)
    ]
    head = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
    tail = tokenizer.encode(f"{BETWEEN}{question}", add_special_tokens=False)
    room = length - len(head) - len(tail)
    if not inside or room < max(SHORTEST, len(inside)):
        return None
    ids = made["input_ids"]
    start = min(max(0, (inside[0] + inside[-1] + 1 - room) // 2), max(0, len(ids) - room))
    kept = ids[start : start + room]
    at = len(head) + inside[0] - start
    whole = np.array([*head, *kept, *tail], dtype=np.int64)
    return AskedText(whole, slice(at, at + len(inside)), len(head) + len(kept))


def on_answer(maps: torch.Tensor, text: AskedText) -> torch.Tensor:
    """(H, L, S) -> (H,): the share of |weight| on the answer, the mean over the question's tokens."""
    rows = maps[:, text.question :].double().abs()
    return (rows[..., text.answer].sum(-1) / rows.sum(-1).clamp(min=1e-300)).mean(-1).cpu()


def even(text: AskedText, causal: bool) -> float:
    """The share that even attention to all visible tokens gives the answer, the mean over the question's tokens."""
    size, length = text.answer.stop - text.answer.start, len(text.ids)
    visible = np.arange(text.question, length) + 1 if causal else np.full(length - text.question, length)
    return float((size / visible).mean())


def _rounded(values: list[list[list[float]]]) -> list[list[list[float]]]:
    return [[[round(one, 6) for one in layer] for layer in question] for question in values]

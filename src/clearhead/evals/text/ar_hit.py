"""Loss where the context already holds the answer, and everywhere else: the slices of DIFF's Table 6.

A token is an *AR hit* (associative recall; Zoology, Arora et al., arXiv 2312.04927) when it ends an n-gram whose n
tokens, this one included, stood earlier in the same text: a model that looks up what followed the last time can know
it. *Others* are all other tokens. The paper says "the last token of an n-gram that was previously seen in the
context" and not what n is; bigrams (n = 2) are the definition here, as in Zoology, and longer n-grams are counted
beside them. Zoology leaves out bigrams that are frequent in the training text; that text is not known for every
model, so none is left out here.

A text is the first `length` tokens of a document, a bos token first, which is part of no n-gram. Loss in nats per
token; arms read the same texts, so hits and others are the same tokens for all, and differences are paired by text.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from clearhead.analysis.by_length import Values, first_values
from clearhead.analysis.comparison import Comparison, compare
from clearhead.analysis.sections import BarChart, BarSeries, Section, SectionTable
from clearhead.analysis.statistics import Estimate
from clearhead.evals.asking.losses import row_losses
from clearhead.evals.asking.texts import openings
from clearhead.evals.cells import LengthEvaluation, TextLength
from clearhead.evals.evaluation import EvaluationConfig, EvaluationResult
from clearhead.evals.reasons import Unmeasured
from clearhead.evals.subject import Subject
from clearhead.runs.results import RunResults

LONGEST = 4096
Part = Literal["all", "hit", "others"]
PARTS: tuple[Part, ...] = ("all", "hit", "others")
FEWEST_DOCUMENTS = 4

PUBLISHED = SectionTable(
    "The Differential Transformer paper's table 6 (1.4B parameters, validation loss, for the direction only)",
    ["model", "all", "AR-Hit", "others"],
    [
        ["Transformer, 16 heads", "3.087", "0.898", "3.272"],
        ["Transformer, 8 heads", "3.088", "0.899", "3.273"],
        ["Transformer, 8 heads, head norm", "3.086", "0.899", "3.271"],
        ["DIFF V1, 8 heads, head norm", "3.062", "0.880", "3.247"],
        ["DIFF V1, 8 heads, no head norm", "3.122", "0.911", "3.309"],
        ["DIFF V1, λ_init = 0.8", "3.065", "0.883", "3.250"],
        ["DIFF V1, λ_init = 0.5", "3.066", "0.882", "3.251"],
    ],
    "Another scale, corpus and tokenizer; which n-grams is not stated: losses compare within a table only.",
)


class ArHitConfig(EvaluationConfig):
    """length: tokens of a text (default: the training length, at most 4,096). n: of the n-grams of the first screen.

    longer: further n-grams that are counted.
    """

    length: int | None = Field(default=None, ge=8)
    n: int = Field(default=2, ge=1)
    longer: list[int] = Field(default=[3, 4])
    max_documents: int = Field(default=128, ge=1)
    batch_tokens: int = Field(default=8192, ge=1)
    seed: int = 0


class Slices(EvaluationResult):
    """Nats and numbers of tokens of both slices, by text."""

    hit_nats: list[float]
    hit_tokens: list[int]
    others_nats: list[float]
    others_tokens: list[int]

    def nats(self, part: Part) -> NDArray[np.float64]:
        return _added(self.hit_nats, self.others_nats, part)

    def tokens(self, part: Part) -> NDArray[np.float64]:
        return _added(self.hit_tokens, self.others_tokens, part)


class ArHitResult(EvaluationResult):
    """slices: by n of the n-grams."""

    length: int
    n: int
    n_gram: int
    documents: list[str]
    slices: dict[str, Slices]


class ArHit(LengthEvaluation[ArHitConfig, ArHitResult]):
    name = "ar_hit"
    Config = ArHitConfig
    Result = ArHitResult

    def length(self, subject: Subject, config: ArHitConfig) -> int:
        return config.length or min(subject.training_length or 256, LONGEST)

    def measure(self, subject: Subject, config: ArHitConfig, cell: TextLength) -> ArHitResult:
        length = cell.tokens
        sizes = [config.n, *(n for n in config.longer if n != config.n)]
        read = openings(subject, length, config.max_documents, config.seed, f"{self.name}.length", least=0)
        # Without a bos nothing predicts a text's first token.
        hits = {n: [seen_before(text, n)[1 - length :] for text in read.texts] for n in sizes}
        # Both slices of a text are needed for a difference between them.
        kept = [i for i, mask in enumerate(hits[config.n]) if mask.any() and not mask.all()]
        if len(kept) < FEWEST_DOCUMENTS:
            raise Unmeasured(
                f"only {len(kept)} documents have {length} tokens, of which some repeat an n-gram of "
                f"{config.n} and some do not, at least {FEWEST_DOCUMENTS} are needed; "
                f"lower evaluate.{self.name}.length"
            )
        table = row_losses(subject, read.rows[kept], config.batch_tokens)
        return ArHitResult(
            length=length,
            n=len(kept),
            n_gram=config.n,
            documents=[read.documents[i] for i in kept],
            slices={str(n): sliced(table, np.stack([hits[n][i] for i in kept])) for n in sizes},
        )

    def section(self, run: RunResults) -> Section:
        title, question = "Recall from the context", "Does it use what its context has already said?"
        values = self.results(run)
        if not values:
            return self.missing(run, title, question)
        first = first_values(values)
        n = str(first.n_gram)
        hit, others = compared(values, n, "hit"), compared(values, n, "others")
        rest = f"On all other tokens: {others.sentence()}"
        share = sum(first.slices[n].hit_tokens) / (first.n * len_of(first, n))
        return Section(
            self.name,
            title,
            question,
            f"Loss on tokens that end {_grams(first.n_gram)} seen before in the text: {hit.sentence()} {rest}",
            measure="nats per recalled token ↓",
            digits=3,
            headlines=hit.headlines(),
            charts=[_bars(hit, others)],
            tables=[_table(values, first), PUBLISHED],
            notes=[
                f"The first {first.length} tokens of {first.n} documents; {share:.0%} of them are hits. A hit "
                f"ends {_grams(first.n_gram)} of which all tokens, the last included, stood earlier in the text. "
                "Intervals: bootstrap over documents or Student's t over seeds, the wider; differences are paired by "
                "document.",
                *run.skipped(self.name),
            ],
        )


def seen_before(tokens: NDArray[np.integer], n: int) -> NDArray[np.bool_]:
    """(L,) -> (L,): whether tokens p − n + 1 … p stood in this order, ending before p."""
    found = np.zeros(len(tokens), dtype=bool)
    known: set[tuple[int, ...]] = set()
    ids = tokens.tolist()
    for end in range(n, len(ids) + 1):
        gram = tuple(ids[end - n : end])
        found[end - 1] = gram in known
        known.add(gram)
    return found


def sliced(losses: NDArray[np.float64], hits: NDArray[np.bool_]) -> Slices:
    """(texts, tokens) losses and hits -> sums of nats and numbers of tokens of both slices, by text."""
    return Slices(
        hit_nats=[round(float(v), 4) for v in (losses * hits).sum(axis=1)],
        hit_tokens=hits.sum(axis=1).tolist(),
        others_nats=[round(float(v), 4) for v in (losses * ~hits).sum(axis=1)],
        others_tokens=(~hits).sum(axis=1).tolist(),
    )


def compared(values: Values[ArHitResult], n: str, part: Part) -> Comparison:
    """Nats per token of one slice, or of all tokens, by arm."""
    samples = {
        arm: {seed: v.slices[n].nats(part) for seed, v in seeds.items()} for arm, seeds in values.items()
    }
    return compare(samples, "lower", denominators=first_values(values).slices[n].tokens(part), digits=3)


def _added(hit: Sequence[float], others: Sequence[float], part: Part) -> NDArray[np.float64]:
    parts = {"hit": [hit], "others": [others], "all": [hit, others]}[part]
    return np.sum(parts, axis=0, dtype=np.float64)  # type: ignore[no-any-return]


def len_of(values: ArHitResult, n: str) -> int:
    """Tokens of a text that are predicted."""
    return int(values.slices[n].hit_tokens[0] + values.slices[n].others_tokens[0])


def _grams(n: int) -> str:
    return {1: "a token", 2: "a bigram", 3: "a trigram"}.get(n, f"a {n}-gram")


def _bars(hit: Comparison, others: Comparison) -> BarChart:
    def series(arm: str) -> BarSeries:
        both: list[Estimate] = [hit.estimates[arm], others.estimates[arm]]
        return BarSeries(arm, [e.value for e in both], [e.low for e in both], [e.high for e in both], arm)

    return BarChart(
        "ar-hit",
        "Loss on what the context holds already, and on the rest",
        "nats per token",
        ["AR hit", "others"],
        [series(arm) for arm in hit.estimates],
    )


def _table(values: Values[ArHitResult], first: ArHitResult) -> SectionTable:
    rows: list[list[str | None]] = []
    for n in first.slices:
        made = [compared(values, n, part) for part in PARTS] if _enough(first, n) else None
        for arm in values:
            cells: list[str | None] = [None] * 3
            if made is not None:
                shown = [one.estimates[arm] for one in made]
                cells = [f"{estimate.value:.3f} ({estimate.interval(3)})" for estimate in shown]
            rows.append([f"{arm}, {_grams(int(n))}", *cells])
    return SectionTable("Loss by slice, nats per token", ["arm and n-gram", "all", "AR hit", "others"], rows)


def _enough(values: ArHitResult, n: str) -> bool:
    """Whether resamples of the texts practically always have tokens of both slices, so that the averages exist."""
    found = values.slices[n]
    lacking = sum(min(pair) == 0 for pair in zip(found.hit_tokens, found.others_tokens, strict=True))
    return lacking == 0 or (values.n >= 16 and lacking <= values.n / 4)

"""Attention allocation: how much of its attention a model gives to the answer, and how much to everything else.

Measured on needle documents, at the query position that has to predict the first token of the answer, on the
*effective* maps (`A1 - λ A2` for differential attention, the softmax map otherwise). The keys fall into four parts:

- *answer*: the asked value in the context,
- *first token*: position 0, where softmax attention parks what it does not need,
- *question*: from the start of the question to the query position,
- *noise*: the rest of the context (other needles included).

Effective weights can be negative and their row need not sum to 1, and the Differential Transformer paper does not say
how its Table 3 normalises them. Here, with a_j the effective weights of one query and head:

- `absolute` (default): Σ_{j in part} |a_j| / Σ_j |a_j|, which is a share for every variant;
- `net`: Σ_{j in part} a_j / Σ_j |a_j|: what a part adds less what it takes away, per weight that is spent;
- `positive`: Σ_{j in part} max(a_j, 0) / Σ_j max(a_j, 0): negative weights count for nothing;
- `row`: Σ_{j in part} a_j / Σ_j a_j, for V1 the weights over 1 - λ; parts sum to 1 but may be negative;
- `signed`: Σ_{j in part} a_j, the weights as they act; a row sums to 1 - λ for V1.

For maps without negative weights all five are the same. Shares are averaged over heads, layers and documents with equal
weight. *Negative share* is Σ |min(a_j, 0)| / Σ |a_j|.

Any causal language model that gives its attention maps can be measured (`probing.attention_rows`).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import Field
from torch import Tensor

from clearhead.analysis.by_length import Values, first_values
from clearhead.analysis.comparison import Comparison, compare
from clearhead.analysis.sections import (
    BarChart,
    BarSeries,
    HeatMap,
    LineChart,
    Panel,
    Reference,
    Section,
    SectionTable,
    Series,
)
from clearhead.analysis.statistics import Estimate
from clearhead.data.needles import NeedleSample
from clearhead.evals.asking.needle_documents import documents, too_short
from clearhead.evals.asking.running import batches, inference
from clearhead.evals.cells import LengthEvaluation, TextLength
from clearhead.evals.evaluation import EvaluationConfig, EvaluationResult
from clearhead.evals.probing.attention_rows import query_rows
from clearhead.evals.reasons import Unmeasured, unless
from clearhead.evals.subject import Subject
from clearhead.runs.results import RunResults

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Normalisation = Literal["absolute", "net", "positive", "row", "signed"]
SHARES = ("absolute", "positive")
"""Normalisations whose parts are shares: none negative, their sum 1."""
LONGEST = 2048
"""Tokens of a document unless the length is named: maps grow with its square."""
PARTS = ("answer", "question", "first token", "noise")

PUBLISHED = SectionTable(
    "The Differential Transformer paper's own figures (3B parameters, for the direction only)",
    ["depth of the answer", "Transformer: answer", "DIFF V1: answer", "Transformer: noise", "DIFF V1: noise"],
    [
        ["0%", "0.03", "0.27", "0.51", "0.01"],
        ["25%", "0.03", "0.30", "0.54", "0.02"],
        ["50%", "0.03", "0.31", "0.52", "0.02"],
        ["75%", "0.07", "0.32", "0.49", "0.02"],
        ["100%", "0.09", "0.40", "0.49", "0.01"],
    ],
    "Another scale, corpus and needle format, normalisation not stated: not comparable number by number.",
)


class AllocationConfig(EvaluationConfig):
    """length: tokens of a document (default: the training length, at most 2,048). samples: documents per depth.

    key_tokens, value_tokens: default as in training.
    """

    length: int | None = Field(default=None, ge=8)
    depths: list[float] = Field(default=[0.0, 0.25, 0.5, 0.75, 1.0], min_length=1)
    needles: int = Field(default=4, ge=1)
    key_tokens: int | None = Field(default=None, ge=1)
    value_tokens: int | None = Field(default=None, ge=1)
    samples: int = Field(default=20, ge=1)
    normalisation: Normalisation = "absolute"
    batch_tokens: int = Field(default=4096, ge=1)
    seed: int = 3000


class AllocationResult(EvaluationResult):
    """parts: a share of each document. Results of earlier versions have no level and nothing by depth and layer."""

    normalisation: Normalisation
    length: int
    needles: int
    n: int
    depths: list[float]
    parts: dict[str, list[float]]
    by_depth: dict[str, list[float]]
    uniform: dict[str, float] | None = None
    by_depth_and_layer: dict[str, list[list[float]]] | None = None
    by_layer: dict[str, list[float]]
    answer_by_head: list[list[float]]
    negative: float
    negative_by_layer: list[float]


class Allocation(LengthEvaluation[AllocationConfig, AllocationResult]):
    name = "allocation"
    Config = AllocationConfig
    Result = AllocationResult

    def length(self, subject: Subject, config: AllocationConfig) -> int:
        return config.length or min(subject.training_length or 256, LONGEST)

    def measure(self, subject: Subject, config: AllocationConfig, cell: TextLength) -> AllocationResult:
        length = cell.tokens
        spec = replace(
            subject.needles.spec(length, config.needles, 1),
            key_tokens=config.key_tokens or subject.needles.key_tokens,
            value_tokens=config.value_tokens or subject.needles.value_tokens,
        )
        unless(too_short(spec, subject.tokenizer))
        if (found := len(subject.documents.tokens)) < length:
            raise Unmeasured(f"the text has {found} tokens in all, fewer than a document of {length}")
        by_depth, uniform = [], []
        for depth in config.depths:
            samples = documents(subject, spec, depth, config.samples, config.seed)
            uniform += [evenly(sample) for sample in samples]
            # (samples, layers, heads, parts), (samples, layers, heads)
            by_depth.append(
                allocate(subject.model, samples, subject.device, config.normalisation, config.batch_tokens)
            )
        every = np.concatenate([shares for shares, _ in by_depth])
        negatives = np.concatenate([negative for _, negative in by_depth])
        return AllocationResult(
            normalisation=config.normalisation,
            length=length,
            needles=config.needles,
            n=len(every),
            depths=config.depths,
            parts={part: _rounded(every[..., i].mean(axis=(1, 2))) for i, part in enumerate(PARTS)},
            by_depth={
                part: [float(shares[..., i].mean()) for shares, _ in by_depth] for i, part in enumerate(PARTS)
            },
            uniform=dict(zip(PARTS, _rounded(np.mean(uniform, axis=0)), strict=True)),
            # (depths, layers)
            by_depth_and_layer={
                part: [_rounded(shares[..., i].mean(axis=(0, 2))) for shares, _ in by_depth]
                for i, part in enumerate(PARTS)
            },
            by_layer={part: _rounded(every[..., i].mean(axis=(0, 2))) for i, part in enumerate(PARTS)},
            answer_by_head=[_rounded(row) for row in every[..., 0].mean(axis=0)],
            negative=float(negatives.mean()),
            negative_by_layer=_rounded(negatives.mean(axis=(0, 2))),
        )

    def section(self, run: RunResults) -> Section:
        title, question = "Attention allocation", "Does it look at the answer and away from the noise?"
        values = self.results(run)
        if not values:
            return self.missing(run, title, question)
        first = first_values(values)
        answer = _compare(values, "answer", "higher")
        noise = _compare(values, "noise", "lower")
        level = f" Uniform attention gives it {first.uniform['answer']:.3f}." if first.uniform else ""
        shares = "; ".join(f"{arm} {estimate.value:.2f}" for arm, estimate in noise.estimates.items())
        text = f"{answer.sentence()}{level} Share given to noise: {shares}."
        return Section(
            self.name,
            title,
            question,
            text,
            measure="attention to the answer ↑",
            headlines=answer.headlines(),
            charts=[
                _stacked(values),
                _bars({"answer": answer.estimates, "noise": noise.estimates}),
                *_by_depth(values, first),
                *_by_depth_and_layer(values, first),
            ],
            tables=[_table(run, values), PUBLISHED],
            notes=[
                f"From the effective maps at the position that predicts the first token of the answer, {first.n} "
                f"documents of {first.length} tokens with {first.needles} facts, averaged over heads and layers. "
                f"{NORMALISATIONS[first.normalisation]} Noise is the rest of the context.",
                *run.skipped(self.name),
            ],
        )


NORMALISATIONS: dict[str, str] = {
    "absolute": "Normalisation: |weight| over the sum of |weights| of the query and head, so parts sum to 1.",
    "net": "Normalisation: weight over the sum of |weights| of the query and head; negative weights count as such.",
    "positive": "Normalisation: positive weight over the sum of positive weights; negative weights count for nothing.",
    "row": "Normalisation: weight over the sum of the weights of the query and head; negative weights count as such.",
    "signed": "Normalisation: none, the effective weights as they act; a differential row sums to 1 − λ.",
}


def split_row(
    row: Tensor, sample: NeedleSample, normalisation: Normalisation = "absolute"
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Shares of one query. `row` (H, S): effective weights of each head over all keys up to the query position.

    Returns the shares (H, parts) in the order of `PARTS` and the share of negative weight (H,).
    """
    weights = row.double().cpu().numpy()
    size = np.abs(weights).sum(axis=-1, keepdims=True)
    negative = (np.clip(-weights, 0, None).sum(axis=-1, keepdims=True) / np.maximum(size, 1e-30))[:, 0]
    if normalisation == "absolute":
        weights = np.abs(weights) / np.maximum(size, 1e-30)
    elif normalisation == "net":
        weights = weights / np.maximum(size, 1e-30)
    elif normalisation == "positive":
        weights = np.clip(weights, 0, None)
        weights = weights / np.maximum(weights.sum(axis=-1, keepdims=True), 1e-30)
    elif normalisation == "row":
        weights = weights / weights.sum(axis=-1, keepdims=True)
    answer = weights[:, sample.needle_spans[0]].sum(axis=-1)
    question = weights[:, sample.question_spans[0]].sum(axis=-1)
    first = weights[:, 0]
    rest = weights.sum(axis=-1) - answer - question - first
    return np.stack([answer, question, first, rest], axis=-1), negative


def evenly(sample: NeedleSample) -> NDArray[np.float64]:
    """(parts,): the shares when the query attends to every key that it sees alike, the level to compare with."""
    keys = sample.answers[0].start
    shares, _ = split_row(torch.full((1, keys), 1 / keys, dtype=torch.float64), sample)
    return shares[0]


def allocate(
    model: PreTrainedModel,
    samples: Sequence[NeedleSample],
    device: torch.device,
    normalisation: Normalisation = "absolute",
    batch_tokens: int = 4096,
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Shares (samples, layers, heads, parts) and negative shares (samples, layers, heads) of every document.

    Raises ValueError for a model that gives no attention maps.
    """
    shares, negatives = [], []
    with inference(model, "eager", length=len(samples[0].input_ids)):
        for part in batches(len(samples), batch_tokens // len(samples[0].input_ids)):
            chosen = [samples[i] for i in part]
            ids = torch.from_numpy(np.stack([sample.input_ids for sample in chosen])).to(device)
            queries = torch.tensor([sample.answers[0].start - 1 for sample in chosen])
            for index, layers in enumerate(zip(*query_rows(model, ids, queries), strict=True)):
                seen = int(queries[index]) + 1
                found = [split_row(row[:, :seen], chosen[index], normalisation) for row in layers]
                shares.append(np.stack([share for share, _ in found]))
                negatives.append(np.stack([negative for _, negative in found]))
    return np.stack(shares), np.stack(negatives)


def _rounded(values: NDArray[np.float64]) -> list[float]:
    return [round(float(value), 6) for value in values]


def _mean(found: Iterable[Any]) -> NDArray[np.float64]:
    """Mean over seeds of lists of one shape."""
    return np.asarray(np.mean(list(found), axis=0))


def _compare(values: Values[AllocationResult], part: str, better: Literal["higher", "lower"]) -> Comparison:
    samples = {arm: {seed: v.parts[part] for seed, v in seeds.items()} for arm, seeds in values.items()}
    normalisation = first_values(values).normalisation
    return compare(samples, better, shares=normalisation in SHARES)


def _stacked(values: Values[AllocationResult]) -> BarChart:
    shares = {
        arm: {part: float(_mean(v.parts[part] for v in seeds.values()).mean()) for part in PARTS}
        for arm, seeds in values.items()
    }
    return BarChart(
        "allocation-parts",
        "Where the attention goes",
        "share of attention",
        list(shares),
        [BarSeries(part, [shares[arm][part] for arm in shares]) for part in PARTS],
        "At the position that has to give the answer; mean over layers, heads, documents and seeds.",
        stacked=True,
    )


def _bars(parts: dict[str, dict[str, Estimate]]) -> BarChart:
    """Answer and noise side by side, with the intervals."""
    arms = list(next(iter(parts.values())))
    series = [
        BarSeries(
            arm,
            [estimates[arm].value for estimates in parts.values()],
            [estimates[arm].low for estimates in parts.values()],
            [estimates[arm].high for estimates in parts.values()],
            arm,
        )
        for arm in arms
    ]
    return BarChart(
        "allocation-answer-and-noise",
        "Attention to the answer and to noise",
        "share of attention",
        list(parts),
        series,
    )


def _by_depth(values: Values[AllocationResult], first: AllocationResult) -> list[LineChart]:
    depths = [100 * depth for depth in first.depths]
    return [
        LineChart(
            f"allocation-{part}-by-depth",
            f"Attention to {'the answer' if part == 'answer' else part}, by depth",
            "depth of the answer in the context (%)",
            "share of attention",
            [
                Series(arm, depths, _mean(v.by_depth[part] for v in seeds.values()).tolist(), arm=arm)
                for arm, seeds in values.items()
            ],
            markers=True,
            # Results of earlier versions have no level.
            references=[Reference("uniform attention", first.uniform[part])] if first.uniform else [],
        )
        for part in ("answer", "noise")
    ]


def _by_depth_and_layer(values: Values[AllocationResult], first: AllocationResult) -> list[HeatMap]:
    # A heat map shows shares; results of earlier versions have no numbers by depth and layer.
    if first.normalisation not in SHARES or not all(
        v.by_depth_and_layer for seeds in values.values() for v in seeds.values()
    ):
        return []
    charts = []
    for part in ("answer", "noise"):
        grids = {
            arm: _mean(v.by_depth_and_layer[part] for v in seeds.values() if v.by_depth_and_layer)
            for arm, seeds in values.items()
        }
        charts.append(
            HeatMap(
                f"allocation-{part}-by-depth-and-layer",
                f"Attention to {'the answer' if part == 'answer' else part}, by depth and layer",
                "depth of the answer",
                "layer",
                [
                    Panel(
                        arm,
                        [f"{depth:.0%}" for depth in first.depths],
                        [str(layer) for layer in range(grid.shape[1])],
                        grid.T.tolist(),
                        arm,
                    )
                    for arm, grid in grids.items()
                ],
                "Layers counted from 0; mean over heads, documents and seeds.",
            )
        )
    return charts


def _table(run: RunResults, values: Values[AllocationResult]) -> SectionTable:
    """Per arm and layer: every part, the share of negative weight and the head that looks at the answer most."""
    rows: list[list[str | None]] = []
    for arm in run.arms:
        seeds = values.get(arm.name)
        if not seeds:
            rows.append([arm.name, *[None] * (len(PARTS) + 3)])
            continue
        parts = [_mean(v.by_layer[part] for v in seeds.values()) for part in PARTS]
        negative = _mean(v.negative_by_layer for v in seeds.values())
        for layer in range(len(negative)):
            best = float(np.mean([max(v.answer_by_head[layer]) for v in seeds.values()]))
            numbers = [*(float(part[layer]) for part in parts), float(negative[layer]), best]
            rows.append([arm.name, str(layer), *(f"{number:.3f}" for number in numbers)])
    headers = ["arm", "layer", *PARTS, "negative weight", "answer, best head"]
    return SectionTable("Allocation by layer", headers, rows)

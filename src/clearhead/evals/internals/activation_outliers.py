"""Activation outliers: the largest and the median attention logits and hidden states of a model that reads text.

The quantities of the Differential Transformer paper's Table 5, as its authors explained them (microsoft/unilm issue
1666), with what they leave open settled here:

* *attention logits*: |q kᵀ / √d| after scaling and before the softmax, of every query with each key that it sees
  (itself included; in a layer with a window those within it), all heads and layers pooled; of differential attention
  both streams, |q1 k1ᵀ / √d| and |q2 k2ᵀ / √d|, pooled. What is added to a logit by position (ALiBi) is not part of it;
* *hidden states*: |x| of every component of every token after each layer (attention, feed-forward and residuals),
  before the final norm. The input of the first layer (the embeddings) is shown beside them and not pooled.

*Top-k* is the k-th largest of all values. Both it and the median are exact, over all tokens, in constant memory
(`probing.magnitudes`): every text is read twice. Values are compared in float32, whatever the model
computes in. Extreme values of a pool have no sampling interval worth the name, so arms are compared by another
number: the largest |logit| of each text, averaged over texts, paired by text.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, Literal

import numpy as np
import torch
from pydantic import Field
from torch import Tensor, nn
from transformers import PreTrainedModel

from clearhead.analysis.by_length import Values, first_values
from clearhead.analysis.comparison import compare
from clearhead.analysis.sections import LineChart, Section, SectionTable, Series
from clearhead.analysis.statistics import ratio
from clearhead.evals.asking.running import inference
from clearhead.evals.asking.texts import openings
from clearhead.evals.cells import LengthEvaluation, TextLength
from clearhead.evals.evaluation import EvaluationConfig, EvaluationResult
from clearhead.evals.probing.magnitudes import Magnitudes
from clearhead.evals.probing.recorder import Recorded, recorded
from clearhead.evals.probing.windows import windows
from clearhead.evals.subject import Subject
from clearhead.runs.results import RunResults

TOPS = (1, 2, 3, 10, 100)
Kind = Literal["logits", "hidden"]
KINDS: dict[Kind, str] = {"logits": "attention logits", "hidden": "hidden states"}
AT_ONCE = 2**20
"""Logits held at a time."""
LONGEST = 2048
"""Tokens of a text unless the length is named: the work grows with its square."""

PUBLISHED = SectionTable(
    "The Differential Transformer paper's table 5 (3B parameters, 0.4M tokens, for the direction only)",
    ["model and activation", *(f"top-{k}" for k in TOPS), "median"],
    [
        ["Transformer, attention logits", "318.0", "308.2", "304.9", "284.7", "251.5", "5.4"],
        ["DIFF V1, attention logits", "38.8", "38.8", "37.3", "32.0", "27.4", "3.3"],
        ["Transformer, hidden states", "3608.6", "3607.4", "3603.6", "3552.1", "2448.2", "0.6"],
        ["DIFF V1, hidden states", "1688.2", "1672.5", "1672.1", "1624.3", "740.9", "1.2"],
    ],
    "Another scale, corpus and training budget; length of a text and visibility of keys not stated.",
)


class ActivationOutliersConfig(EvaluationConfig):
    """tokens: read in all. length: tokens of a text (default: the training length, at most 2,048)."""

    tokens: int = Field(default=2**16, ge=1)
    length: int | None = Field(default=None, ge=2)
    seed: int = 0


class Sizes(EvaluationResult):
    """Of many values: the k-th largest of some k, their median, how many there were."""

    top: dict[str, float | None]
    median: float
    count: int


class Activations(Sizes):
    """One kind of activation. by_text: the largest of each text. by_layer: of hidden states the input first."""

    by_text: list[float]
    by_layer: list[Sizes]


class ActivationOutliersResult(EvaluationResult):
    length: int
    tokens: int
    n: int
    documents: list[str]
    logits: Activations
    hidden: Activations

    def of(self, kind: Kind) -> Activations:
        return self.logits if kind == "logits" else self.hidden


class ActivationOutliers(LengthEvaluation[ActivationOutliersConfig, ActivationOutliersResult]):
    name = "activation_outliers"
    Config = ActivationOutliersConfig
    Result = ActivationOutliersResult

    def length(self, subject: Subject, config: ActivationOutliersConfig) -> int:
        return config.length or min(subject.training_length or 256, LONGEST)

    def measure(
        self, subject: Subject, config: ActivationOutliersConfig, cell: TextLength
    ) -> ActivationOutliersResult:
        length = cell.tokens
        read = openings(subject, length, -(-config.tokens // length), config.seed, f"{self.name}.length")
        found = ActivationTally(
            subject.model, [torch.from_numpy(row[None]).to(subject.device) for row in read.rows]
        )
        return ActivationOutliersResult(
            length=length,
            tokens=read.rows.size,
            n=len(read.rows),
            documents=read.documents,
            logits=found.result("logits"),
            hidden=found.result("hidden"),
        )

    def section(self, run: RunResults) -> Section:
        title, question = "Activation outliers", "Does it compute with fewer extreme values?"
        values = self.results(run)
        if not values:
            return self.missing(run, title, question)
        first = first_values(values)
        results = {
            kind: compare(
                {arm: {s: v.of(kind).by_text for s, v in seeds.items()} for arm, seeds in values.items()},
                "lower",
                digits=1,
            )
            for kind in KINDS
        }
        return Section(
            self.name,
            title,
            question,
            f"Largest attention logit of a text: {results['logits'].sentence()} "
            f"Largest hidden state: {results['hidden'].sentence()}",
            measure="largest |attention logit| of a text ↓",
            digits=1,
            headlines=results["logits"].headlines(),
            charts=[_chart(values, kind) for kind in KINDS],
            tables=[_table(values), PUBLISHED],
            notes=[
                f"{first.n} texts of {first.length} tokens ({first.tokens:,} in all), each from its start. "
                "Logits: |q k / √d| of every query with each key that it sees, heads, layers and both streams of a "
                "differential layer pooled, before the softmax. Hidden states: after each layer, before the final "
                "norm. Top-k is the k-th largest of all values and the median their middle, both exact; mean over "
                "seeds. Only the last column has an interval (bootstrap over texts or Student's t over seeds, the "
                "wider); differences are paired by text.",
                *run.skipped(self.name),
            ],
        )


class ActivationTally:
    """Everything that is counted of one model on `rows`, (1, L) ids each: two readings."""

    def __init__(self, model: PreTrainedModel, rows: list[Tensor]) -> None:
        layers = decoder_layers(model)
        self.parts: dict[Kind, list[Magnitudes]] = {
            "logits": [Magnitudes(max(TOPS)) for _ in layers],
            # The input of the first layer stands first.
            "hidden": [Magnitudes(max(TOPS)) for _ in range(len(layers) + 1)],
        }
        self.by_text: dict[Kind, list[float]] = {kind: [0.0] * len(rows) for kind in KINDS}
        self.whole: dict[Kind, Magnitudes] = {}
        self._windows = windows(model)
        self._reading = 0
        with (
            inference(model, length=rows[0].shape[1]),
            recorded(model, self._logits),
            _hidden(layers, self._hidden_states),
        ):
            for again in (False, True):
                if again:
                    self.whole = {kind: Magnitudes.pooled(self._pooled(kind)) for kind in KINDS}
                for self._reading, row in enumerate(rows):
                    self._last: tuple[Tensor, ...] = ()
                    model.base_model(input_ids=row, use_cache=False)

    def _pooled(self, kind: Kind) -> list[Magnitudes]:
        return self.parts[kind][1:] if kind == "hidden" else self.parts[kind]

    def _logits(self, streams: Recorded) -> None:
        # Hugging Face's DiffLlama asks twice for the same maps, once for each half of its values.
        if self._last and self._last[0] is streams.q[0]:
            return
        self._last = streams.q
        for logits in visible_logits(streams, self._windows[streams.layer]):
            self._add("logits", streams.layer, logits)

    def _hidden_states(self, place: int, states: Tensor) -> None:
        self._add("hidden", place, states)

    def _add(self, kind: Kind, place: int, x: Tensor) -> None:
        part = self.parts[kind][place]
        counts = kind == "logits" or place > 0
        if self.whole:
            part.add_again(x)
            if counts:
                self.whole[kind].add_again(x)
            return
        most = part.add(x)
        if counts:
            self.by_text[kind][self._reading] = max(self.by_text[kind][self._reading], most)

    def result(self, kind: Kind) -> Activations:
        """One kind of activation. Raises ValueError for layers without any."""
        if not all(part.count for part in self.parts[kind]):
            raise ValueError("some layers of the model gave no attention logits to look at")
        whole = _sizes(self.whole[kind])
        return Activations(
            top=whole.top,
            median=whole.median,
            count=whole.count,
            by_text=[round(value, 6) for value in self.by_text[kind]],
            by_layer=[_sizes(part) for part in self.parts[kind]],
        )


def decoder_layers(model: PreTrainedModel) -> nn.ModuleList:
    """The list of the model's layers; ValueError for a model that has none of that length."""
    count = int(model.config.get_text_config().num_hidden_layers)
    for module in model.base_model.modules():
        if isinstance(module, nn.ModuleList) and len(module) == count:
            return module
    raise ValueError(f"{type(model).__name__} has no list of {count} layers whose states could be looked at")


@contextmanager
def _hidden(layers: nn.ModuleList, record: Any) -> Iterator[None]:
    """Inside, `record` gets (0, the first layer's input) and (i, the output of the i-th layer)."""

    def before(module: nn.Module, arguments: tuple[Any, ...], options: dict[str, Any]) -> None:
        record(0, arguments[0] if arguments else options["hidden_states"])

    def after(place: int) -> Any:
        def hook(module: nn.Module, arguments: Any, output: Any) -> None:
            record(place, output[0] if isinstance(output, tuple) else output)

        return hook

    with ExitStack() as stack:
        stack.callback(layers[0].register_forward_pre_hook(before, with_kwargs=True).remove)
        for index, layer in enumerate(layers):
            stack.callback(layer.register_forward_hook(after(index + 1)).remove)
        yield


def visible_logits(streams: Recorded, window: int | None) -> Iterator[Tensor]:
    """The scaled logits of one text (a batch of 1) under a causal mask and a window, some at a time, flat."""
    for q, k in zip(streams.q, streams.k, strict=True):
        heads, groups, length = q.shape[1], k.shape[1], q.shape[2]
        step = max(1, AT_ONCE // length)
        for head in range(heads):
            keys = k[0, head // (heads // groups)].float()
            for start in range(0, length, step):
                queries = q[0, head, start : start + step].float()
                first, stop = 0 if window is None else max(0, start + 1 - window), start + len(queries)
                logits = queries @ keys[first:stop].T * streams.scale
                seen = torch.ones_like(logits, dtype=torch.bool).tril(diagonal=start - first)
                if window is not None:
                    seen = seen.triu(diagonal=start - first + 1 - window)
                yield logits[seen]


def _sizes(found: Magnitudes) -> Sizes:
    return Sizes(top={str(k): found.top(k) for k in TOPS}, median=found.median(), count=found.count)


def _shown(found: list[float | None]) -> str | None:
    """The mean over seeds; None where one has not as many values."""
    numbers = [value for value in found if value is not None]
    return f"{np.mean(numbers):.2f}" if len(numbers) == len(found) else None


def _table(values: Values[ActivationOutliersResult]) -> SectionTable:
    rows: list[list[str | None]] = []
    for kind, label in KINDS.items():
        for arm, seeds in values.items():
            found = [v.of(kind) for v in seeds.values()]
            tops = [[one.top[str(k)] for one in found] for k in TOPS]
            estimate = ratio([one.by_text for one in found], np.ones(len(found[0].by_text)))
            rows.append(
                [
                    f"{arm}, {label}",
                    *(_shown(top) for top in tops),
                    f"{np.mean([one.median for one in found]):.3f}",
                    f"{found[0].count:,}",
                    f"{estimate.value:.2f} ({estimate.interval()})",
                ]
            )
    headers = [
        "model and activation",
        *(f"top-{k}" for k in TOPS),
        "median",
        "values",
        "mean of the texts' largest",
    ]
    return SectionTable("Largest and median activations", headers, rows)


def _chart(values: Values[ActivationOutliersResult], kind: Kind) -> LineChart:
    series = []
    for arm, seeds in values.items():
        tops = [[place.top["1"] or 0.0 for place in v.of(kind).by_layer] for v in seeds.values()]
        first = 0 if kind == "hidden" else 1
        series.append(
            Series(arm, list(range(first, first + len(tops[0]))), np.mean(tops, axis=0).tolist(), arm=arm)
        )
    return LineChart(
        f"activation-outliers-{kind}",
        f"Largest of the {KINDS[kind]}, by layer",
        "layer (0: its input)" if kind == "hidden" else "layer",
        f"largest |{'logit' if kind == 'logits' else 'hidden state'}|",
        series,
        "Layers counted from 1; mean over seeds.",
        markers=True,
    )

"""Activation outliers: the largest and the median attention logits and hidden states of a model that reads text.

The quantities of the Differential Transformer paper's Table 5, as its authors explained them (microsoft/unilm issue
1666), with what they leave open settled here:

* *attention logits*: |q kᵀ / √d| after scaling and before the softmax, of every query with each key that it sees
  (itself included), all heads and layers pooled; of differential attention both streams, |q1 k1ᵀ / √d| and |q2 k2ᵀ /
  √d|, pooled. What is added to a logit by position (ALiBi) is not part of it;
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
from typing import Any

import numpy as np
import torch
from pydantic import Field
from torch import Tensor, nn
from transformers import PreTrainedModel

from clearhead.analysis.by_length import Values, first_values
from clearhead.analysis.comparison import compare
from clearhead.analysis.sections import LineChart, Section, Series, Table
from clearhead.analysis.statistics import ratio
from clearhead.evals.asking.running import inference
from clearhead.evals.asking.texts import long_documents
from clearhead.evals.evaluation import Evaluation, EvaluationConfig
from clearhead.evals.probing.magnitudes import Magnitudes
from clearhead.evals.probing.recorder import Recorded, recorded
from clearhead.evals.reasons import reason_of
from clearhead.evals.subject import Subject
from clearhead.runs.results import RunResults

TOPS = (1, 2, 3, 10, 100)
KINDS = {"logits": "attention logits", "hidden": "hidden states"}
AT_ONCE = 2**20
"""Logits held at a time."""
LONGEST = 2048
"""Tokens of a text unless the length is named: the work grows with its square."""

PUBLISHED = Table(
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


class ActivationOutliers(Evaluation[ActivationOutliersConfig]):
    name = "activation_outliers"
    Config = ActivationOutliersConfig

    def run(self, subject: Subject, config: ActivationOutliersConfig) -> dict[str, Any]:
        length = config.length or min(subject.training_length or 256, LONGEST)
        if reason := subject.too_long(length) or narrow_window(subject.model, length):
            return {"skipped": reason}
        bos = subject.tokenizer.bos_token_id
        head = [] if bos is None else [bos]
        texts = -(-config.tokens // length)
        size = length - len(head)
        chosen, documents = long_documents(subject.documents, size, size, texts, config.seed)
        if not documents:
            return {"skipped": f"no document has {length} tokens; lower evaluate.{self.name}.length"}
        rows = [torch.from_numpy(np.concatenate([head, d]).astype(np.int64))[None] for d in documents]
        try:
            found = Tally(subject.model, [row.to(subject.device) for row in rows])
            return {
                "length": length,
                "tokens": length * len(rows),
                "n": len(rows),
                "documents": [subject.documents.ids[i] for i in chosen],
                "logits": found.result("logits"),
                "hidden": found.result("hidden"),
            }
        except ValueError as error:
            return {"skipped": reason_of(error)}

    def section(self, run: RunResults) -> Section:
        title, question = "Activation outliers", "Does it compute with fewer extreme values?"
        values = run.values(self.name)
        if not values:
            return self.missing(run, title, question)
        first = first_values(values)
        results = {
            kind: compare(
                {arm: {s: v[kind]["by_text"] for s, v in seeds.items()} for arm, seeds in values.items()},
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
                f"{first['n']} texts of {first['length']} tokens ({first['tokens']:,} in all), each from its start. "
                "Logits: |q k / √d| of every query with each key that it sees, heads, layers and both streams of a "
                "differential layer pooled, before the softmax. Hidden states: after each layer, before the final "
                "norm. Top-k is the k-th largest of all values and the median their middle, both exact; mean over "
                "seeds. Only the last column has an interval (bootstrap over texts or Student's t over seeds, the "
                "wider); differences are paired by text.",
                *run.skipped(self.name),
            ],
        )


def narrow_window(model: Any, length: int) -> str | None:
    """Why logits of `length` tokens would be counted that no softmax takes, or None."""
    known = model.config.to_dict()
    window = known.get("sliding_window") if known.get("use_sliding_window", True) else None
    own = [kind.window for kind in getattr(model.config, "layer_kinds", ()) if kind.window is not None]
    window = min(own) if own else window
    if window is not None and window < length:
        return f"the model attends within a window of {window} tokens; give a length of at most {window}"
    return None


class Tally:
    """Everything that is counted of one model on `rows`, (1, L) ids each: two readings."""

    def __init__(self, model: PreTrainedModel, rows: list[Tensor]) -> None:
        layers = decoder_layers(model)
        self.parts = {
            "logits": [Magnitudes(max(TOPS)) for _ in layers],
            # The input of the first layer stands first.
            "hidden": [Magnitudes(max(TOPS)) for _ in range(len(layers) + 1)],
        }
        self.by_text: dict[str, list[float]] = {kind: [0.0] * len(rows) for kind in KINDS}
        self.whole: dict[str, Magnitudes] = {}
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

    def _pooled(self, kind: str) -> list[Magnitudes]:
        return self.parts[kind][1:] if kind == "hidden" else self.parts[kind]

    def _logits(self, streams: Recorded) -> None:
        # Hugging Face's DiffLlama asks twice for the same maps, once for each half of its values.
        if self._last and self._last[0] is streams.q[0]:
            return
        self._last = streams.q
        for logits in visible_logits(streams):
            self._add("logits", streams.layer, logits)

    def _hidden_states(self, place: int, states: Tensor) -> None:
        self._add("hidden", place, states)

    def _add(self, kind: str, place: int, x: Tensor) -> None:
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

    def result(self, kind: str) -> dict[str, Any]:
        """JSON values of one kind of activation."""
        if not all(part.count for part in self.parts[kind]):
            raise ValueError("some layers of the model gave no attention logits to look at")
        return {
            **_numbers(self.whole[kind]),
            "by_text": [round(value, 6) for value in self.by_text[kind]],
            "by_layer": [_numbers(part) for part in self.parts[kind]],
        }


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


def visible_logits(streams: Recorded) -> Iterator[Tensor]:
    """The scaled logits of one text (a batch of 1) under a causal mask, some at a time, flat."""
    for q, k in zip(streams.q, streams.k, strict=True):
        heads, groups, length = q.shape[1], k.shape[1], q.shape[2]
        step = max(1, AT_ONCE // length)
        for head in range(heads):
            keys = k[0, head // (heads // groups)].float()
            for start in range(0, length, step):
                queries = q[0, head, start : start + step].float()
                stop = start + len(queries)
                logits = queries @ keys[:stop].T * streams.scale
                seen = torch.ones_like(logits, dtype=torch.bool).tril(diagonal=start)
                yield logits[seen]


def _numbers(found: Magnitudes) -> dict[str, Any]:
    tops = {str(k): found.top(k) for k in TOPS}
    return {"top": tops, "median": found.median(), "count": found.count}


def _table(values: Values) -> Table:
    rows: list[list[str | None]] = []
    for kind, label in KINDS.items():
        for arm, seeds in values.items():
            found = [v[kind] for v in seeds.values()]
            tops = [[one["top"][str(k)] for one in found] for k in TOPS]
            estimate = ratio([one["by_text"] for one in found], np.ones(len(found[0]["by_text"])))
            rows.append(
                [
                    f"{arm}, {label}",
                    *(None if None in top else f"{np.mean(top):.2f}" for top in tops),
                    f"{np.mean([one['median'] for one in found]):.3f}",
                    f"{found[0]['count']:,}",
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
    return Table("Largest and median activations", headers, rows)


def _chart(values: Values, kind: str) -> LineChart:
    series = []
    for arm, seeds in values.items():
        tops = [[place["top"]["1"] for place in v[kind]["by_layer"]] for v in seeds.values()]
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

"""Quality against bits: how few bits can attention logits, weights, or keys and values have before a model gets worse?

The Differential Transformer paper quantises attention logits alone, dynamically, with absmax scaling, and asks
HellaSwag; it holds that smaller outliers leave more of the bits to the values that matter. Here the same logits are
rounded (`probing.rounding` says exactly how), and beside them, each alone, weights and the key-value
cache, all of it emulated: values are rounded and then used at full precision. Two measurements, on the same texts for
every model and number of bits:

* *bits per byte* of the first `length` tokens of long documents (a bos token first);
* *needle accuracy*: one fact of the kind that training used, anywhere in a document of `length` tokens, exact
  match.

Every difference is from the same model unquantised, computed by the same attention, paired by document. A dynamic
step is made from all logits of a text, later tokens' included, as in any evaluation that scores whole texts.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import Field

from clearhead.analysis.by_length import Values, first_values, left_out
from clearhead.analysis.comparison import compare
from clearhead.analysis.sections import LineChart, Reference, Section, Series, Table
from clearhead.analysis.statistics import Estimate, paired_difference, proportion, ratio, verdict
from clearhead.data.needles import NeedleSample, NeedleSpec, chance_level
from clearhead.evals.asking.losses import suffix_losses
from clearhead.evals.asking.needle_documents import documents as needle_documents
from clearhead.evals.asking.needle_documents import exact_match, marks, too_short
from clearhead.evals.asking.running import batches, inference
from clearhead.evals.asking.texts import long_documents, utf8_size
from clearhead.evals.evaluation import Evaluation, EvaluationConfig
from clearhead.evals.finite import watched
from clearhead.evals.probing.rounding import Scheme, quantised
from clearhead.evals.reasons import reason_of
from clearhead.evals.subject import Subject
from clearhead.runs.results import RunResults

Bits = Annotated[int, Field(ge=2, le=16)]
TARGETS = {
    "logits": "attention logits",
    "weights": "weights (emulated)",
    "cache": "keys and values (emulated)",
}
FULL = 32
"""Where a chart puts what is not quantised."""
LONGEST = 2048
FEWEST_DOCUMENTS = 4

PUBLISHED = Table(
    "The Differential Transformer paper's own result (3B parameters, attention logits, HellaSwag zero-shot)",
    ["bits", "Transformer", "DIFF V1"],
    [
        ["16 and 8", "as unquantised", "as unquantised"],
        ["6", "drops clearly", "as unquantised"],
        ["4", "about 25 points below DIFF V1 at 4 bits", "about the Transformer at 6 bits"],
    ],
    "Read off a figure, which gives no numbers; another scale and task: for the direction only.",
)


class QuantisationConfig(EvaluationConfig):
    """logits, weights, cache: bits to try for each, from 2 to 16; an empty list leaves it out.

    length: tokens of a text (default: the training length, at most 2,048: maps are written out).
    documents: texts for bits per byte. samples: needle documents (0 = not asked).
    per: what shares a step of the logits, see `clearhead.evals.probing.rounding`. group: likewise of the weights.
    """

    logits: list[Bits] = Field(default=[16, 8, 6, 4])
    weights: list[Bits] = Field(default=[8, 4])
    cache: list[Bits] = Field(default=[8, 4])
    length: int | None = Field(default=None, ge=8)
    documents: int = Field(default=32, ge=1)
    samples: int = Field(default=50, ge=0)
    per: Literal["tensor", "head"] = "tensor"
    group: int | None = Field(default=None, ge=1)
    batch_tokens: int = Field(default=4096, ge=1)
    seed: int = 5000


class Quantisation(Evaluation[QuantisationConfig]):
    name = "quantisation"
    Config = QuantisationConfig
    tells_overflow = True

    def run(self, subject: Subject, config: QuantisationConfig) -> dict[str, Any]:
        length = config.length or min(subject.training_length or 256, LONGEST)
        if reason := subject.too_long(length):
            return {"skipped": reason}
        wanted = {"logits": config.logits, "weights": config.weights, "cache": config.cache}
        if not any(wanted.values()):
            return {"skipped": "nothing is to be quantised; give bits for logits, weights or cache"}
        bos = subject.tokenizer.bos_token_id
        head = [] if bos is None else [bos]
        size = length - len(head)
        chosen, texts = long_documents(subject.documents, size, size, config.documents, config.seed)
        if len(texts) < FEWEST_DOCUMENTS:
            return {
                "skipped": f"only {len(texts)} documents have {length} tokens, at least {FEWEST_DOCUMENTS} are "
                f"needed; lower evaluate.{self.name}.length"
            }
        rows = np.stack([np.concatenate([head, text]) for text in texts]).astype(np.int64)
        spec = subject.needles.spec(length, 1, 1)
        needles, skipped = self._needles(subject, config, spec)
        cells: list[dict[str, Any]] = []
        schemes = [("none", None, Scheme())] + [
            (target, bits, Scheme(**{target: bits}, per=config.per, group=config.group))  # type: ignore[arg-type]
            for target in TARGETS
            for bits in wanted[target]
        ]
        for target, bits, scheme in schemes:
            try:
                with quantised(subject.model, scheme) as active, watched(subject.model) as watch:
                    nats = losses(subject, rows, config.batch_tokens)
                    hits = (
                        exact_match(subject.model, needles, subject.device, config.batch_tokens)
                        if needles
                        else []
                    )
                if watch.reason is not None:
                    raise ValueError(watch.reason)
                if not active.calls:
                    raise ValueError(
                        f"the attention of {type(subject.model).__name__} does not go through Hugging Face's attention "
                        "interface, so its logits cannot be quantised"
                    )
            except ValueError as error:
                skipped[target if bits is None else f"{target}, {bits} bits"] = reason_of(error)
                continue
            cell = {"target": target, "bits": bits, "nats": [round(float(v), 4) for v in nats]}
            cells.append({**cell, "correct": marks(hits)})
        if len(cells) < 2 or cells[0]["target"] != "none":
            return {"skipped": "; ".join(dict.fromkeys(skipped.values()))}
        return {
            "cells": cells,
            "skipped_cells": skipped,
            "length": length,
            "n": len(rows),
            "documents": [subject.documents.ids[i] for i in chosen],
            # Nothing predicts the first token of a text without a bos.
            "bytes": [utf8_size(subject.tokenizer, text[1 - len(head) :]) for text in texts],
            "needles": len(needles),
            "chance": chance_level(spec, subject.tokenizer) if needles else None,
        }

    def _needles(
        self, subject: Subject, config: QuantisationConfig, spec: NeedleSpec
    ) -> tuple[list[NeedleSample], dict[str, str]]:
        """The needle documents, or none and the reason why."""
        if not config.samples:
            return [], {}
        try:
            if reason := too_short(spec, subject.tokenizer):
                return [], {"needles": reason}
            return needle_documents(subject, spec, None, config.samples, config.seed), {}
        except ValueError as error:
            return [], {"needles": reason_of(error)}

    def section(self, run: RunResults) -> Section:
        title, question = "Quantisation", "Does it stand being computed with few bits?"
        values = run.values(self.name)
        if not values:
            return self.missing(run, title, question)
        first = first_values(values)
        target, bits = hardest(first["cells"])
        costs = {
            arm: {
                s: _bits(cell) - _bits(v["cells"][0])
                for s, v in seeds.items()
                if (cell := _cell(v, target, bits))
            }
            for arm, seeds in values.items()
        }
        costs = {arm: seeds for arm, seeds in costs.items() if seeds}
        result = compare(costs, "lower", denominators=first["bytes"], digits=3)
        own = "; ".join(
            f"{arm} {verdict(difference, 'lower', digits=3)}" for arm, difference in result.estimates.items()
        )
        asked = f"{TARGETS[target]} at {bits} bits"
        chance = "" if first["chance"] is None else f" Chance of a needle: {first['chance']:.1e}."
        return Section(
            self.name,
            title,
            question,
            f"Bits per byte with {asked}, against the same model unquantised (n={first['n']}): {own}."
            + (f" What that costs, compared: {result.sentence()}" if result.differences else ""),
            measure=f"bits per byte lost, {asked} ↓",
            digits=3,
            headlines=result.headlines(),
            charts=_charts(values),
            tables=[_table(values), PUBLISHED],
            notes=[
                f"The first {first['length']} tokens of {first['n']} documents, and {first['needles']} documents of as "
                f"many tokens with one fact.{chance} Absmax, symmetric; logits with a step for each layer, stream and "
                "text, weights for each output channel, keys and values for each token and head; each alone. Rounded, "
                "then used at full precision: an emulation, neither faster nor smaller. Differences are from the same "
                "model unquantised, paired by document; intervals: bootstrap or Wilson over documents or Student's t "
                "over seeds, the wider.",
                *left_out(values),
                *run.skipped(self.name),
            ],
        )


def losses(subject: Subject, rows: NDArray[np.int64], batch_tokens: int) -> NDArray[np.float64]:
    """NLL in nats of each text, but for its first token; rows of one length, so nothing is padded."""
    found = []
    with inference(subject.model, length=rows.shape[1]):
        for span in batches(len(rows), batch_tokens // rows.shape[1]):
            ids = torch.from_numpy(rows[span.start : span.stop]).to(subject.device)
            found.append(suffix_losses(subject.model, ids, 1).double().sum(dim=1).cpu().numpy())
    nats = np.concatenate(found)
    if not np.isfinite(nats).all():
        raise ValueError("the losses are not numbers")
    return nats


def hardest(cells: Sequence[Mapping[str, Any]]) -> tuple[str, int]:
    """What the first screen shows: fewest bits of the logits, as in the paper, else of what was tried first."""
    target = next((c["target"] for c in cells if c["target"] == "logits"), cells[1]["target"])
    return target, min(c["bits"] for c in cells if c["target"] == target)


def _cell(values: Mapping[str, Any], target: str, bits: int | None) -> Mapping[str, Any] | None:
    return next((c for c in values["cells"] if (c["target"], c["bits"]) == (target, bits)), None)


def _bits(cell: Mapping[str, Any]) -> NDArray[np.float64]:
    return np.asarray(cell["nats"]) / math.log(2)


def _found(
    seeds: Mapping[int, Mapping[str, Any]], target: str, bits: int | None
) -> list[tuple[Mapping[str, Any], Mapping[str, Any]]]:
    """(this cell, the unquantised one) of each seed that has it."""
    pairs = [(_cell(v, target, bits), v["cells"][0]) for v in seeds.values()]
    return [(cell, base) for cell, base in pairs if cell is not None]


def _loss(seeds: Mapping[int, Mapping[str, Any]], target: str, bits: int | None) -> Estimate | None:
    size = next(iter(seeds.values()))["bytes"]
    found = _found(seeds, target, bits)
    return ratio([_bits(cell) for cell, _ in found], size) if found else None


def _accuracy(seeds: Mapping[int, Mapping[str, Any]], target: str, bits: int | None) -> Estimate | None:
    counts = [(c["correct"].count("1"), len(c["correct"])) for c, _ in _found(seeds, target, bits)]
    return proportion(counts) if counts and counts[0][1] else None


def _marks(cell: Mapping[str, Any]) -> list[float]:
    return [float(mark) for mark in cell["correct"]]


def _charts(values: Values) -> list[LineChart]:
    first = first_values(values)
    charts = []
    for target, label in TARGETS.items():
        tried = sorted({c["bits"] for c in first["cells"] if c["target"] == target})
        if not tried:
            continue
        for read, slug, name in (
            (_loss, "loss", "bits per byte"),
            (_accuracy, "needles", "needle accuracy"),
        ):
            series = []
            for arm, seeds in values.items():
                points = [*(read(seeds, target, bits) for bits in tried), read(seeds, "none", None)]
                if any(points):
                    y, low, high = (
                        [None if p is None else getattr(p, part) for p in points]
                        for part in ("value", "low", "high")
                    )
                    series.append(Series(arm, [*tried, FULL], y, low, high, arm))
            if series:
                charts.append(
                    LineChart(
                        f"quantisation-{target}-{slug}", f"{name[0].upper()}{name[1:]} by bits, {label}",
                        f"bits ({FULL}: not quantised)", name, series, log_x=True, markers=True,
                        references=[Reference("not quantised", FULL, "x")],
                    )
                )  # fmt: skip
    return charts


def _table(values: Values) -> Table:
    """A row for each arm, target and number of bits, with the differences from the unquantised model."""
    rows: list[list[str | None]] = []
    for arm, seeds in values.items():
        cells = next(iter(seeds.values()))["cells"]
        size = next(iter(seeds.values()))["bytes"]
        for target, bits in ((c["target"], c["bits"]) for c in cells):
            loss, accuracy = _loss(seeds, target, bits), _accuracy(seeds, target, bits)
            change = answers = None
            if bits is not None:
                found = _found(seeds, target, bits)
                ours, theirs = ([_bits(pair[i]) for pair in found] for i in (0, 1))
                change = verdict(paired_difference(ours, theirs, size), "lower", digits=3)
                if accuracy is not None:
                    said, meant = ([_marks(pair[i]) for pair in found] for i in (0, 1))
                    answers = verdict(paired_difference(said, meant), "higher")
            rows.append(
                [
                    f"{arm}, {'not quantised' if bits is None else f'{TARGETS[target]}, {bits} bits'}",
                    None if loss is None else f"{loss.value:.3f} ({loss.interval(3)})",
                    change if bits is not None else "–",
                    None if accuracy is None else f"{accuracy.value:.2f} ({accuracy.interval()})",
                    answers if bits is not None else "–",
                ]
            )
    headers = ["arm and bits", "bits per byte", "change", "needle accuracy", "change of accuracy"]
    return Table("Quality against bits", headers, rows, "'–' marks the reference of the changes.")

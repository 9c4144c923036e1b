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
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import Field

from clearhead.analysis.by_length import Values, first_values, left_out
from clearhead.analysis.comparison import compare
from clearhead.analysis.sections import LineChart, Reference, Section, SectionTable, Series
from clearhead.analysis.statistics import Estimate, paired_difference, proportion, ratio, verdict
from clearhead.data.needles import NeedleSample, NeedleSpec, chance_level
from clearhead.evals.asking.losses import finite, suffix_losses
from clearhead.evals.asking.needle_documents import documents as needle_documents
from clearhead.evals.asking.needle_documents import exact_match, marks, too_short
from clearhead.evals.asking.running import batches, inference
from clearhead.evals.asking.texts import Openings, openings, utf8_size
from clearhead.evals.cells import Cell, CellEvaluation, LeftOut, Measured
from clearhead.evals.evaluation import EvaluationConfig, EvaluationResult
from clearhead.evals.finite import watched
from clearhead.evals.probing.rounding import Scheme, quantised
from clearhead.evals.reasons import Unmeasured, all_of, reason_of, unless
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

PUBLISHED = SectionTable(
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


class QuantisationCell(EvaluationResult):
    """One scheme: loss of each text, and one character an answer. target "none", bits None: not quantised."""

    target: str
    bits: int | None
    nats: list[float]
    correct: str


class QuantisationResult(EvaluationResult):
    """cells: the unquantised model first. chance: of a needle, None where none was asked."""

    cells: list[QuantisationCell]
    skipped_cells: dict[str, str] = Field(default={})
    length: int
    n: int
    documents: list[str]
    bytes: list[int]
    needles: int
    chance: float | None


@dataclass(frozen=True, kw_only=True)
class Quantised(Cell):
    """The same texts and needles under one scheme."""

    target: str
    bits: int | None
    read: Openings
    needles: list[NeedleSample]


class Quantisation(CellEvaluation[QuantisationConfig, QuantisationResult, Quantised, QuantisationCell]):
    name = "quantisation"
    Config = QuantisationConfig
    Result = QuantisationResult
    Value = QuantisationCell
    tells_overflow = True

    def cells(self, subject: Subject, config: QuantisationConfig) -> Iterator[Quantised | LeftOut]:
        length = config.length or min(subject.training_length or 256, LONGEST)
        unless(subject.too_long(length))
        wanted = {"logits": config.logits, "weights": config.weights, "cache": config.cache}
        if not any(wanted.values()):
            raise Unmeasured("nothing is to be quantised; give bits for logits, weights or cache")
        option = f"{self.name}.length"
        read = openings(subject, length, config.documents, config.seed, option, least=FEWEST_DOCUMENTS)
        needles, reason = self._needles(subject, config, subject.needles.spec(length, 1, 1))
        if reason is not None:
            yield LeftOut("needles", reason)
        schemes = [("none", None), *((target, bits) for target in TARGETS for bits in wanted[target])]
        for target, bits in schemes:
            name = target if bits is None else f"{target}, {bits} bits"
            yield Quantised(name=name, target=target, bits=bits, read=read, needles=needles)

    def measure(self, subject: Subject, config: QuantisationConfig, cell: Quantised) -> QuantisationCell:
        few = {} if cell.bits is None else {cell.target: cell.bits}
        scheme = Scheme(**few, per=config.per, group=config.group)  # type: ignore[arg-type]
        model, device, hits = subject.model, subject.device, []
        with quantised(model, scheme) as active, watched(model) as watch:
            nats = losses(subject, cell.read.rows, config.batch_tokens)
            if cell.needles:
                hits = exact_match(model, cell.needles, device, config.batch_tokens)
        unless(watch.reason)
        if not active.calls:
            raise Unmeasured(
                f"the attention of {type(model).__name__} does not go through Hugging Face's attention "
                "interface, so its logits cannot be quantised"
            )
        rounded = [round(float(v), 4) for v in nats]
        return QuantisationCell(target=cell.target, bits=cell.bits, nats=rounded, correct=marks(hits))

    def gather(
        self, subject: Subject, config: QuantisationConfig, measured: Measured[Quantised, QuantisationCell]
    ) -> QuantisationResult:
        cells = measured.values
        if len(cells) < 2 or cells[0].target != "none":
            raise Unmeasured(all_of(measured.skipped))
        read, needles = measured.pairs[0][0].read, measured.pairs[0][0].needles
        length = read.rows.shape[1]
        return QuantisationResult(
            cells=cells,
            skipped_cells=measured.skipped,
            length=length,
            n=len(read.rows),
            documents=read.documents,
            bytes=[utf8_size(subject.tokenizer, read.predicted(i)) for i in range(len(read.texts))],
            needles=len(needles),
            chance=chance_level(subject.needles.spec(length, 1, 1), subject.tokenizer) if needles else None,
        )

    def _needles(
        self, subject: Subject, config: QuantisationConfig, spec: NeedleSpec
    ) -> tuple[list[NeedleSample], str | None]:
        """The needle documents, or none and the reason why if they were asked for."""
        if not config.samples:
            return [], None
        try:
            if reason := too_short(spec, subject.tokenizer):
                return [], reason
            return needle_documents(subject, spec, None, config.samples, config.seed), None
        except ValueError as error:
            return [], reason_of(error)

    def section(self, run: RunResults) -> Section:
        title, question = "Quantisation", "Does it stand being computed with few bits?"
        values = self.results(run)
        if not values:
            return self.missing(run, title, question)
        first = first_values(values)
        target, bits = hardest(first.cells)
        costs = {
            arm: {
                s: _bits(cell) - _bits(v.cells[0])
                for s, v in seeds.items()
                if (cell := _cell(v, target, bits))
            }
            for arm, seeds in values.items()
        }
        costs = {arm: seeds for arm, seeds in costs.items() if seeds}
        result = compare(costs, "lower", denominators=first.bytes, digits=3)
        own = "; ".join(
            f"{arm} {verdict(difference, 'lower', digits=3)}" for arm, difference in result.estimates.items()
        )
        asked = f"{TARGETS[target]} at {bits} bits"
        chance = "" if first.chance is None else f" Chance of a needle: {first.chance:.1e}."
        return Section(
            self.name,
            title,
            question,
            f"Bits per byte with {asked}, against the same model unquantised (n={first.n}): {own}."
            + (f" What that costs, compared: {result.sentence()}" if result.differences else ""),
            measure=f"bits per byte lost, {asked} ↓",
            digits=3,
            headlines=result.headlines(),
            charts=_charts(values),
            tables=[_table(values), PUBLISHED],
            notes=[
                f"The first {first.length} tokens of {first.n} documents, and {first.needles} documents of as "
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
    return finite(np.concatenate(found))


def hardest(cells: Sequence[QuantisationCell]) -> tuple[str, int]:
    """What the first screen shows: fewest bits of the logits, as in the paper, else of what was tried first."""
    target = next((c.target for c in cells if c.target == "logits"), cells[1].target)
    return target, min(c.bits for c in cells if c.target == target and c.bits is not None)


def _cell(values: QuantisationResult, target: str, bits: int | None) -> QuantisationCell | None:
    return next((c for c in values.cells if (c.target, c.bits) == (target, bits)), None)


def _bits(cell: QuantisationCell) -> NDArray[np.float64]:
    return np.asarray(cell.nats) / math.log(2)


def _found(
    seeds: Mapping[int, QuantisationResult], target: str, bits: int | None
) -> list[tuple[QuantisationCell, QuantisationCell]]:
    """(this cell, the unquantised one) of each seed that has it."""
    pairs = [(_cell(v, target, bits), v.cells[0]) for v in seeds.values()]
    return [(cell, base) for cell, base in pairs if cell is not None]


def _loss(seeds: Mapping[int, QuantisationResult], target: str, bits: int | None) -> Estimate | None:
    size = next(iter(seeds.values())).bytes
    found = _found(seeds, target, bits)
    return ratio([_bits(cell) for cell, _ in found], size) if found else None


def _accuracy(seeds: Mapping[int, QuantisationResult], target: str, bits: int | None) -> Estimate | None:
    counts = [(c.correct.count("1"), len(c.correct)) for c, _ in _found(seeds, target, bits)]
    return proportion(counts) if counts and counts[0][1] else None


def _marks(cell: QuantisationCell) -> list[float]:
    return [float(mark) for mark in cell.correct]


def _charts(values: Values[QuantisationResult]) -> list[LineChart]:
    first = first_values(values)
    charts = []
    for target, label in TARGETS.items():
        tried = sorted({c.bits for c in first.cells if c.target == target and c.bits is not None})
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


def _table(values: Values[QuantisationResult]) -> SectionTable:
    """A row for each arm, target and number of bits, with the differences from the unquantised model."""
    rows: list[list[str | None]] = []
    for arm, seeds in values.items():
        cells = next(iter(seeds.values())).cells
        size = next(iter(seeds.values())).bytes
        for target, bits in ((c.target, c.bits) for c in cells):
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
    return SectionTable("Quality against bits", headers, rows, "'–' marks the reference of the changes.")

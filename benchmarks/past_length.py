"""What `recipes/extrapolation.toml` measured, as tables: every arm against the first, past the training length.

    clearhead compare recipes/extrapolation.toml
    python benchmarks/past_length.py runs/extrapolation [--save docs/results/extrapolation]

Reads a run directory, also an unfinished one: seeds that are missing somewhere are left out everywhere, so that all
arms are read with the same ones. `--save` writes `tables.md`, every measurement with its intervals and the values of
each seed, and `runs.json`, one record an arm and seed. Intervals and verdicts are those of the report.
"""

import argparse
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from clearhead.analysis.comparison import Comparison, Samples, compare
from clearhead.analysis.statistics import Better, decimal, verdict
from clearhead.evals.composed.scaling_factors import ScalingFactors, swing
from clearhead.evals.internals.logit_outliers import NUMBERS, ScaledLogits, mean_over_layers
from clearhead.evals.retrieval.passkey.section import PasskeyCell, PasskeyResult, cell_of, hits
from clearhead.runs.results import RunResults, SeedResults, load_run

Values = dict[str, Any]
Numbers = Callable[[Values], list[float]]
"""The values of an evaluation of one model -> a number for each of its samples."""
MASTERY = 0.9
LOGITS: dict[str, Better] = {"outlier": "lower", "near": "higher"}
SIGNS = "▲ better, ▼ worse than the first arm (the 95 % interval of the paired difference has no 0 in it)."


@dataclass(frozen=True)
class Measured:
    """One comparison: what the columns of a summary are called by, and the samples of each arm and seed."""

    group: str
    column: str
    better: Better
    digits: int
    samples: Samples
    shares: bool = False
    denominators: Sequence[float] | None = None

    def compare(self) -> Comparison:
        return compare(
            self.samples,
            self.better,
            denominators=self.denominators,
            proportions=self.shares,
            digits=self.digits,
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run", type=Path)
    parser.add_argument("--save", type=Path, help="directory for tables.md and runs.json")
    options = parser.parse_args()
    run = load_run(options.run)
    seeds = complete_seeds(run)
    if not seeds:
        raise SystemExit(
            f"{options.run}: no seed has been evaluated with every arm; run clearhead compare again"
        )
    measured = measurements(run, seeds)
    head = f"{len(run.arms)} arms, seeds {', '.join(map(str, seeds))}. {SIGNS}"
    summary = [head, f"## Learning\n\n{mastery(run, seeds)}", *summaries(measured, run.arms[0].name)]
    print("\n\n".join(summary))
    if options.save is not None:
        details = [f"### {one.group}, {one.column}\n\n{detail(one)}" for one in measured]
        title = "# Past the training length, in tables"
        pages = "\n\n".join([title, *summary, "## Every measurement", *details])
        (options.save / "tables.md").write_text(pages + "\n", encoding="utf-8")
        lines = [json.dumps(record(arm.name, seed, arm.seeds[seed])) for arm in run.arms for seed in seeds]
        (options.save / "runs.json").write_text("[\n" + ",\n".join(lines) + "\n]\n", encoding="utf-8")


def complete_seeds(run: RunResults) -> list[int]:
    """Seeds that every arm has been evaluated with."""
    return [
        seed
        for seed in run.arms[0].seeds
        if all(arm.seeds[seed].status.get("state") == "evaluated" for arm in run.arms)
    ]


def measurements(run: RunResults, seeds: Sequence[int]) -> list[Measured]:
    """Everything that is compared, in the order of the tables."""

    def samples(evaluation: str, numbers: Numbers) -> Samples:
        """Arms of which every seed has the numbers; an arm that cannot be measured so is left out."""
        found = {}
        for arm in run.arms:
            rows = {seed: numbers(arm.seeds[seed].results[evaluation]["values"]) for seed in seeds}
            if all(rows.values()):
                found[arm.name] = rows
        return found

    def text(length: int, factor: str | None = None) -> Measured:
        evaluation = "perplexity" if factor is None else "scaling_factors"
        size = samples(evaluation, documents(length, factor, "bytes"))
        return Measured(
            f"Bits per byte, {reading(factor)}",
            f"{length:,}",
            "lower",
            3,
            samples(evaluation, documents(length, factor, "bits")),
            denominators=[float(one) for one in size[run.arms[0].name][seeds[0]]],
        )

    def passkey(length: int, factor: str | None = None) -> Measured:
        evaluation = "passkey" if factor is None else "scaling_factors"
        return Measured(
            f"Passkeys found, {reading(factor)}",
            f"{length:,}",
            "higher",
            2,
            samples(evaluation, keys(length, factor)),
            shares=True,
        )

    def growth(long: Measured, short: Measured) -> Measured:
        """What a model loses past the training length, whatever it had there: the same documents, longer windows."""
        more = {
            arm: {seed: list(np.subtract(row, short.samples[arm][seed])) for seed, row in rows.items()}
            for arm, rows in long.samples.items()
        }
        title = f"Bits per byte more than in windows of {short.column}, as trained"
        return Measured(title, long.column, "lower", 3, more, denominators=long.denominators)

    first = {name: found["values"] for name, found in run.arms[0].seeds[seeds[0]].results.items()}
    factors = first["scaling_factors"]["factors"]
    stretched = [factor for factor in factors if float(factor) > 1]
    read = [cell["length"] for cell in factors["1"]["perplexity"]["cells"]]
    asked = [cell["length"] for cell in factors["1"]["passkey"]["cells"]]
    made = [text(cell["length"]) for cell in first["perplexity"]["cells"]]
    made += [growth(one, made[0]) for one in made[1:]]
    made += [text(length, factor) for factor in stretched for length in read]
    made += [passkey(cell["length"]) for cell in first["passkey"]["cells"]]
    made += [passkey(length, factor) for factor in stretched for length in asked]
    for length in read:
        swings = samples("scaling_factors", partial(swings_of, length=length))
        made.append(Measured("Swing of the loss over factors above 1", f"{length:,}", "lower", 3, swings))
    for index, scaling in enumerate(one["scaling"] for one in first["logit_outliers"]["scalings"]):
        for name, better in LOGITS.items():
            numbers = samples("logit_outliers", logits(index, name))
            made.append(Measured("Attention logits", f"{name}, {scaling}", better, 2, numbers))
    made.append(Measured("Collinearity", "mean", "higher", 2, samples("initial_angles", collinearity)))
    return made


def reading(factor: str | None) -> str:
    return "as trained" if factor is None else f"dynamic NTK {factor}"


def summaries(measured: Sequence[Measured], baseline: str) -> list[str]:
    """A matrix for each group: arms by columns, the mean and a sign."""
    made = []
    for group in dict.fromkeys(one.group for one in measured):
        columns = [one for one in measured if one.group == group]
        found = [one.compare() for one in columns]
        arms = list(dict.fromkeys(arm for comparison in found for arm in comparison.estimates))
        rows = [["arm", *(one.column for one in columns)], ["---"] * (len(columns) + 1)]
        for arm in arms:
            cells = [cell(comparison, arm, baseline) for comparison in found]
            rows.append([arm, *cells])
        made.append(f"## {group}\n\n" + "\n".join(f"| {' | '.join(row)} |" for row in rows))
    return made


def cell(found: Comparison, arm: str, baseline: str) -> str:
    """``0.93 ▲``."""
    if arm not in found.estimates:
        return "–"
    number = decimal(found.estimates[arm].value, found.digits)
    if arm == baseline or arm not in found.differences:
        return number
    difference = found.differences[arm]
    if difference.contains_zero:
        return number
    return f"{number} {'▲' if (difference.value > 0) == (found.better == 'higher') else '▼'}"


def detail(one: Measured) -> str:
    """A row an arm: its estimate, every seed alone, and the difference from the first arm."""
    result = one.compare()
    total = None if one.denominators is None else sum(one.denominators)
    rows = ["| arm | mean | seeds | difference |", "|---|---|---|---|"]
    for name, estimate in result.estimates.items():
        each = [
            f"{sum(row):.0f}/{len(row)}"
            if one.shares
            else decimal(sum(row) / (total or len(row)), one.digits)
            for row in one.samples[name].values()
        ]
        difference = result.differences.get(name)
        said = "" if difference is None else verdict(difference, one.better, digits=one.digits)
        mean = f"{decimal(estimate.value, one.digits)} ({estimate.interval(one.digits)})"
        rows.append(f"| {name} | {mean} | {', '.join(each)} | {said} |")
    return "\n".join(rows)


def mastery(run: RunResults, seeds: Sequence[int]) -> str:
    """When each model answered 0.9 of the training's questions, and what it answered at the end."""
    rows = [
        f"| arm | learning rate | million tokens until {MASTERY} of the questions, by seed | at the end |",
        "|---|---|---|---|",
    ]
    for arm in run.arms:
        runs = [arm.seeds[seed] for seed in seeds]
        when = ["never" if (at := mastered_at(one)) is None else f"{at / 1e6:.1f}" for one in runs]
        last = [f"{probes(one)[-1][1]:.2f}" for one in runs]
        rows.append(f"| {arm.name} | {learning_rate(runs[0]):g} | {', '.join(when)} | {', '.join(last)} |")
    return "\n".join(rows)


def probes(run: SeedResults) -> list[tuple[int, float]]:
    """(tokens, share of the questions answered) while training."""
    return [(r["tokens"], r["probe"]["needle_accuracy"]) for r in run.metrics if "probe" in r]


def mastered_at(run: SeedResults) -> int | None:
    return next((tokens for tokens, value in probes(run) if value >= MASTERY), None)


def learning_rate(run: SeedResults) -> float:
    """The largest that was logged: the schedule's peak, to three digits."""
    return float(f"{max(r['learning_rate'] for r in run.metrics if 'learning_rate' in r):.3g}")


def documents(length: int, factor: str | None, what: str) -> Numbers:
    """Bits, or bytes, of each document in windows of a length."""

    def read(values: Values) -> list[float]:
        source = values if factor is None else values["factors"].get(factor, {}).get("perplexity", {})
        one = next((one for one in source.get("cells", []) if one["length"] == length), None)
        if one is None:
            return []
        return list(one["bytes"]) if what == "bytes" else [nats / math.log(2) for nats in one["nats"]]

    return read


def swings_of(values: Values, length: int) -> list[float]:
    """The swing of each document over the factors."""
    return swing(ScalingFactors().read(values), length)


def keys(length: int, factor: str | None) -> Numbers:
    """1 for each passkey that was found, 0 for the others."""

    def read(values: Values) -> list[float]:
        source = values if factor is None else values["factors"].get(factor, {}).get("passkey", {})
        return (
            hits(cell_of(PasskeyResult.model_validate(source), "native", length), inside=None)
            if source
            else []
        )

    return read


def logits(scaling: int, name: str) -> Numbers:
    def read(values: Values) -> list[float]:
        scalings = values.get("scalings", [])
        return layers_mean(scalings[scaling], name).tolist() if len(scalings) > scaling else []

    return read


def layers_mean(scaling: Values, name: str) -> NDArray[np.float64]:
    return mean_over_layers(ScaledLogits.model_validate(scaling), NUMBERS[name])


def collinearity(values: Values) -> list[float]:
    layers = values.get("layers", [])
    return list(np.mean([layer["cosine"] for layer in layers], axis=0)) if layers else []


def record(arm: str, seed: int, run: SeedResults) -> dict[str, Any]:
    """What one model's tables are made from, without its single documents."""
    values = {name: result["values"] for name, result in run.results.items()}
    angles = collinearity(values["initial_angles"])

    def bits(source: Values) -> dict[str, float]:
        return {str(one["length"]): round(one["bits_per_byte"], 4) for one in source.get("cells", [])}

    def right(source: Values) -> dict[str, str]:
        return {
            str(one["length"]): f"{sum(hits(PasskeyCell.model_validate(one), inside=None)):.0f}/{one['n']}"
            for one in source.get("cells", [])
        }

    return {
        "arm": arm,
        "seed": seed,
        "learning_rate": learning_rate(run),
        "mastered_at": mastered_at(run),
        "needle_accuracy": round(probes(run)[-1][1], 4),
        "bits_per_byte": bits(values["perplexity"]),
        "passkeys": right(values["passkey"]),
        "dynamic_ntk": {
            factor: {
                "bits_per_byte": bits(by.get("perplexity", {})),
                "passkeys": right(by.get("passkey", {})),
            }
            for factor, by in values["scaling_factors"].get("factors", {}).items()
            if float(factor) > 1 and by
        },
        "logits": {
            one["scaling"]: {name: round(float(layers_mean(one, name).mean()), 3) for name in LOGITS}
            for one in values["logit_outliers"].get("scalings", [])
        },
        "collinearity": round(float(np.mean(angles)), 4) if angles else None,
    }


if __name__ == "__main__":
    main()

"""What `recipes/retrofit.toml` measured, as tables: every way to go on against training the plain models on.

    clearhead compare recipes/retrofit/base.toml --out runs/retrofit-base
    clearhead compare recipes/retrofit.toml --out runs/retrofit
    clearhead compare recipes/retrofit/scratch.toml --out runs/retrofit-scratch
    python benchmarks/retrofit_tables.py [--runs runs] [--save docs/results/retrofit]

The unit is a model: one number for each arm and seed, differences from the arm "plain" with the same seed, Student's t
over seeds. p-values of one measure are adjusted for the number of comparisons (Holm). Models that were differential
from the start share no weights with the plain ones, so that they are compared without pairs (Welch). Seeds that are
missing in an arm are left out everywhere. `--save` writes `tables.md` and `models.json`, every number of every model.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from scipy import stats

from clearhead.analysis.statistics import decimal, holm
from clearhead.runs.results import ArmResults, load_run

PLAIN = "plain"
# What trains few numbers has a control that trains as few.
CONTROLS = {"DiffLoRA": "LoRA", "DEX alone": "W_O alone"}
Results = Mapping[str, Mapping[str, Any]]
"""Evaluation -> its values, of one model."""


@dataclass(frozen=True)
class Measure:
    """One number of a model. better: which way is good; None where neither is."""

    name: str
    read: Callable[[Results], float | None]
    digits: int = 2
    better: Literal["lower", "higher"] | None = None


@dataclass(frozen=True)
class Difference:
    """An arm's mean and how far it is from the plain models'. p, adjusted: None where nothing varies."""

    mean: float
    difference: float
    low: float
    high: float
    p: float | None
    adjusted: float | None = None


def facts(needles: int, length: int) -> Callable[[Results], float | None]:
    def read(results: Results) -> float | None:
        cells = [
            cell
            for cell in results["needles"]["cells"]
            if cell["needles"] == needles and cell["length"] == length
        ]
        return sum(cell["hits"] for cell in cells) / sum(cell["n"] for cell in cells)

    return read


def mean_of(evaluation: str, *path: str) -> Callable[[Results], float | None]:
    """The mean of a list in an evaluation's values; None where the evaluation says nothing."""

    def read(results: Results) -> float | None:
        found: Any = results.get(evaluation, {})
        for key in path:
            found = found.get(key) if isinstance(found, Mapping) else None
        return None if found is None else float(np.mean(found))

    return read


def written(mode: str, key: str) -> Callable[[Results], float | None]:
    def read(results: Results) -> float | None:
        for one in results["generations"]["values_by_mode"]:
            if one["mode"] == mode:
                return float(np.mean(one[key]))
        return None

    return read


def found_numbers(results: Results) -> float | None:
    cells = results.get("multi_needle", {}).get("cells", [])
    hits = [hit for cell in cells for hit in cell["found"]]
    return float(np.mean(hits)) if hits else None


def passkeys(results: Results) -> float | None:
    cells = results.get("passkey", {}).get("cells", [])
    marks = "".join(cell["correct"]["exact"] for cell in cells)
    return marks.count("1") / len(marks) if marks else None


MEASURES = [
    Measure("bits per byte", mean_of("language_modelling", "bits_per_byte"), 3, "lower"),
    *(
        Measure(f"{count} fact{'s'[: count > 1]}, {length} tokens", facts(count, length), 3, "higher")
        for count in (1, 4)
        for length in (64, 128, 256)
    ),
    Measure("attention to the answer", mean_of("allocation", "parts", "answer"), 3, "higher"),
    Measure("attention to noise", mean_of("allocation", "parts", "noise"), 3, "lower"),
    Measure("largest logit of a text", mean_of("activation_outliers", "logits", "by_text"), 1, "lower"),
    Measure("largest hidden state", mean_of("activation_outliers", "hidden", "by_text"), 1, "lower"),
    Measure("passkeys found", passkeys, 2, "higher"),
    Measure("numbers of cities found", found_numbers, 2, "higher"),
    Measure("repeated 4-grams, greedy", written("greedy", "repetition"), 3, "lower"),
    Measure("repeated 4-grams, sampled", written("sampled", "repetition"), 3, "lower"),
    Measure("texts in a loop, greedy", written("greedy", "loops"), 3, "lower"),
    Measure("tokens written, greedy", written("greedy", "tokens"), 1),
    Measure("divergence from the original", mean_of("kept", "divergence"), 3),
    Measure("same likeliest token", mean_of("kept", "agreement"), 3),
]


def numbers_of(arm: ArmResults, measure: Measure, seeds: Sequence[int]) -> list[float] | None:
    """One number a seed, or None where a model has none."""
    found = []
    for seed in seeds:
        results = {name: record["values"] for name, record in arm.seeds[seed].results.items()}
        number = measure.read(results)
        if number is None:
            return None
        found.append(number)
    return found


def paired(ours: Sequence[float], plain: Sequence[float]) -> Difference:
    """Ours minus the plain models' with the same seeds."""
    apart = np.asarray(ours) - np.asarray(plain)
    if np.ptp(apart) == 0:
        return Difference(float(np.mean(ours)), float(apart[0]), float(apart[0]), float(apart[0]), None)
    test = stats.ttest_1samp(apart, 0.0)
    low, high = test.confidence_interval(0.95)
    return Difference(float(np.mean(ours)), float(apart.mean()), float(low), float(high), float(test.pvalue))


def unpaired(ours: Sequence[float], plain: Sequence[float]) -> Difference:
    """Ours minus the plain models', which share nothing with them."""
    apart = float(np.mean(ours) - np.mean(plain))
    if np.ptp(ours) == 0 and np.ptp(plain) == 0:
        return Difference(float(np.mean(ours)), apart, apart, apart, None)
    test = stats.ttest_ind(ours, plain, equal_var=False)
    low, high = test.confidence_interval(0.95)
    return Difference(float(np.mean(ours)), apart, float(low), float(high), float(test.pvalue))


def adjust(found: Mapping[str, Difference]) -> dict[str, Difference]:
    """With p-values for the whole family of arms."""
    tested = [name for name, one in found.items() if one.p is not None]
    values = dict(zip(tested, holm([float(found[name].p or 0.0) for name in tested]), strict=True))
    return {
        name: Difference(one.mean, one.difference, one.low, one.high, one.p, values.get(name))
        for name, one in found.items()
    }


def told(one: Difference, measure: Measure) -> str:
    """The difference in a cell: its interval, and ▲ or ▼ where it is detected after the adjustment."""
    digits = measure.digits
    if one.p is None:
        return f"{decimal(one.difference, digits)} with every seed"
    text = f"{decimal(one.difference, digits)} ({decimal(one.low, digits)} to {decimal(one.high, digits)})"
    if one.adjusted is None or one.adjusted >= 0.05:
        return text
    better = measure.better is not None and (one.difference < 0) == (measure.better == "lower")
    sign = "" if measure.better is None else "▲ " if better else "▼ "
    return f"**{sign}{text}**"


def tables(arms: Mapping[str, ArmResults], scratch: set[str], seeds: Sequence[int]) -> Iterator[str]:
    """One table a measure."""
    for measure in MEASURES:
        values = {name: numbers_of(arm, measure, seeds) for name, arm in arms.items()}
        plain = values[PLAIN]
        if plain is None:
            continue
        others = {name: value for name, value in values.items() if value is not None and name != PLAIN}
        against = {
            name: (unpaired if name in scratch else paired)(value, plain) for name, value in others.items()
        }
        against |= {
            f"{name}, against {control}": paired(others[name], others[control])
            for name, control in CONTROLS.items()
            if name in others and control in others
        }
        found = adjust(against)
        arrow = {"lower": " ↓", "higher": " ↑", None: ""}[measure.better]
        rows = [f"### {measure.name}{arrow}", "", "| arm | mean | minus plain (95 %) | p, adjusted |"]
        rows += ["|---|---|---|---|", f"| {PLAIN} | {decimal(float(np.mean(plain)), measure.digits)} | | |"]
        for name, one in found.items():
            p = "–" if one.adjusted is None else f"{one.p:.2g}, {one.adjusted:.2g}"
            rows.append(f"| {name} | {decimal(one.mean, measure.digits)} | {told(one, measure)} | {p} |")
        yield "\n".join(rows)


def complete_seeds(arms: Sequence[ArmResults]) -> list[int]:
    """Seeds with which every arm has been evaluated."""
    return [
        seed
        for seed in arms[0].seeds
        if all(seed in arm.seeds and arm.seeds[seed].status.get("state") == "evaluated" for arm in arms)
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--runs", type=Path, default=Path("runs"), help="where the three runs are")
    parser.add_argument("--save", type=Path, help="directory for tables.md and models.json")
    options = parser.parse_args()
    arms = {arm.name: arm for arm in load_run(options.runs / "retrofit").arms}
    before = {f"{arm.name}, before": arm for arm in load_run(options.runs / "retrofit-base").arms}
    scratch: dict[str, ArmResults] = {}
    if (options.runs / "retrofit-scratch" / "recipe.toml").exists():
        scratch = {
            f"{arm.name} from the start": arm for arm in load_run(options.runs / "retrofit-scratch").arms
        }
    everything = {**arms, **scratch}
    seeds = complete_seeds(list(everything.values()))
    if not seeds:
        raise SystemExit(
            f"{options.runs}: no seed has been evaluated with every arm; run the comparisons again"
        )
    head = (
        f"Seeds {', '.join(map(str, seeds))}. ▲ better, ▼ worse than the plain models trained on, or than the control "
        "that a row names, where the p-value adjusted for the comparisons of the measure (Holm) is below 0.05; the "
        "intervals are not adjusted."
    )
    found = [head, *tables(everything, set(scratch), seeds)]
    print("\n\n".join(found))
    if options.save is not None:
        options.save.mkdir(parents=True, exist_ok=True)
        title = "# Retrofitted models, in tables"
        (options.save / "tables.md").write_text("\n\n".join([title, *found]) + "\n", encoding="utf-8")
        lines = [json.dumps(one) for one in records({**before, **everything}, seeds)]
        (options.save / "models.json").write_text("[\n" + ",\n".join(lines) + "\n]\n", encoding="utf-8")


def records(arms: Mapping[str, ArmResults], seeds: Sequence[int]) -> Iterator[dict[str, Any]]:
    """Every number of every model, and what it cost."""
    for name, arm in arms.items():
        for seed in seeds:
            results = {key: record["values"] for key, record in arm.seeds[seed].results.items()}
            numbers: dict[str, float | None] = {}
            for measure in MEASURES:
                try:
                    value = measure.read(results)
                except KeyError:
                    value = None
                numbers[measure.name] = None if value is None else round(value, 6)
            trained = arm.seeds[seed].cost.get("trained_parameters")
            yield {"arm": name, "seed": seed, "trained_parameters": trained, **numbers}


if __name__ == "__main__":
    main()

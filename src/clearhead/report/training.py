"""The report's sections that come from training itself: learning curves, λ by layer and cost."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from clearhead.analysis.sections import BarChart, BarSeries, LineChart, Section, SectionTable, Series
from clearhead.analysis.statistics import count
from clearhead.runs.results import ArmResults, RunResults, SeedResults

POINTS = 60
"""A curve is averaged over this many equal spans of tokens: single logged steps are noise."""
SETTLED = 0.15
"""The vertical axis starts from what is reached after this share of the budget: the first fall would flatten it."""

Curve = tuple[NDArray[np.float64], NDArray[np.float64]]


def learning_curves(run: RunResults) -> Section:
    """Bits per byte of the text and probe accuracy against tokens, one line per arm with the range of its seeds."""
    slug, title, question = "learning", "Learning curves", "How did training go?"
    held_out = _bands(
        run, lambda record: record.get("probe", {}).get("validation_bits_per_byte"), smooth=False
    )
    text = held_out or _bands(run, lambda record: record.get("bits_per_byte"))
    probe = _bands(run, lambda record: record.get("probe", {}).get("needle_accuracy"), smooth=False)
    loss = [] if text else _bands(run, lambda record: record.get("loss"))
    task = run.recipe.get("task", "causal")
    byte = {"masked": "masked byte", "seq2seq": "target byte"}.get(task, "byte")
    label_of = "example" if task == "classify" else "token"
    charts = []
    band = "Mean over seeds; the band spans from the lowest to the highest seed."
    for series, name, label in (
        (text, "bits-per-byte", f"bits per {byte} of {'validation' if held_out else 'training'} text"),
        (loss, "loss", f"training loss (nats per {label_of})"),
    ):
        if series:
            charts.append(
                LineChart(
                    f"learning-{name}",
                    label[0].upper() + label[1:] + " while training",
                    "training tokens (millions)",
                    label,
                    series,
                    f"{band} The start may lie above the chart.",
                    y_range=_settled(series),
                )
            )
    if probe:
        charts.append(
            LineChart(
                "learning-needle-accuracy",
                "Retrieval while training",
                "training tokens (millions)",
                "needle exact match",
                probe,
                f"Probe on validation needles. {band}",
                y_range=(0.0, 1.0),
            )
        )
    if not charts:
        return Section(slug, title, question, "No training log yet.", missing=True)
    trained = [float(m[-1]["tokens"]) for arm in run.arms for m in [_log(arm)] if m]
    seeds = max(sum(bool(seed.metrics) for seed in arm.seeds.values()) for arm in run.arms)
    budget = f"{max(trained) / 1e6:.2f} million tokens"
    answer = f"Every arm saw up to {budget}, the same in the same order; {count(seeds, 'seed')}."
    return Section(slug, title, question, answer, charts=charts)


def _log(arm: ArmResults) -> list[dict[str, Any]]:
    return next((seed.metrics for seed in arm.seeds.values() if seed.metrics), [])


def _bands(
    run: RunResults, read: Callable[[dict[str, Any]], float | None], *, smooth: bool = True
) -> list[Series]:
    found = []
    for arm in run.arms:
        curves = []
        for seed in arm.seeds.values():
            points = [(m["tokens"] / 1e6, value) for m in seed.metrics if (value := read(m)) is not None]
            if points:
                x, y = (np.array(side, dtype=np.float64) for side in zip(*points, strict=True))
                curves.append(_averaged(x, y) if smooth else (x, y))
        if curves:
            found.append(_band(arm.name, curves))
    return found


def _averaged(x: NDArray[np.float64], y: NDArray[np.float64]) -> Curve:
    """Means over at most `POINTS` equal spans of x; empty spans are left out."""
    if len(x) <= POINTS:
        return x, y
    spans = np.minimum((POINTS * x / x[-1]).astype(int), POINTS - 1)
    sizes = np.bincount(spans, minlength=POINTS)
    keep = sizes > 0
    return tuple(np.bincount(spans, weights=side, minlength=POINTS)[keep] / sizes[keep] for side in (x, y))  # type: ignore[return-value]


def _band(name: str, curves: Sequence[Curve]) -> Series:
    """Mean and range over seeds on the grid of the shortest run."""
    grid = min((x for x, _ in curves), key=lambda x: float(x[-1]))
    table = np.stack([np.interp(grid, x, y) for x, y in curves])
    low, high = (table.min(axis=0).tolist(), table.max(axis=0).tolist()) if len(curves) > 1 else (None, None)
    return Series(name, grid.tolist(), table.mean(axis=0).tolist(), low, high, name)


def _settled(series: Sequence[Series]) -> tuple[float, float]:
    values = [
        value
        for one in series
        for x, value in zip(one.x, one.high or one.y, strict=True)
        if value is not None and x >= SETTLED * one.x[-1]
    ]
    lows = [value for one in series for value in (one.low or one.y) if value is not None]
    return min(lows), max(values)


def lambdas(run: RunResults) -> Section | None:
    """λ by layer at the end of training, for the arms that have one; `None` when no arm logs it."""
    note = "Mean over seeds, with the lowest and the highest seed. λ is how much of the second map is taken away."
    found = _by_layer(run, "lambda", lambda record: record.get("lambda"), "λ", note)
    if found is None:
        return None
    chart, means = found
    answer = f"Mean λ by layer, from the first layer on: {means}."
    return Section("lambda", "How much is subtracted", "How large did λ become?", answer, charts=[chart])


def diagnostics(run: RunResults) -> list[Section]:
    """What other numbers the variants log of their layers (`Variant.diagnostics`), one section each."""
    names = {
        name
        for arm in run.arms
        for seed in arm.seeds.values()
        for record in seed.metrics
        for name in record.get("diagnostics", {})
    }
    note = "Mean over seeds, with the lowest and the highest seed."
    sections = []
    for name in sorted(names):

        def read(record: dict[str, Any], name: str = name) -> Any:
            return record.get("diagnostics", {}).get(name)

        found = _by_layer(run, name, read, name, note)
        if found is not None:
            chart, means = found
            answer = f"Mean by layer, from the first layer on: {means}."
            sections.append(
                Section(
                    f"diagnostic-{name}", f"Logged: {name}", f"What became of {name}?", answer, charts=[chart]
                )
            )
    return sections


def _by_layer(
    run: RunResults, name: str, read: Callable[[dict[str, Any]], Any], label: str, note: str
) -> tuple[BarChart, str] | None:
    """A number of each layer in the last record that has it: a chart of the arms, and their means as text."""
    final: dict[str, list[dict[int, float]]] = {}
    for arm in run.arms:
        for seed in arm.seeds.values():
            logged = [values for record in seed.metrics if (values := read(record))]
            if logged:
                final.setdefault(arm.name, []).append(
                    {int(layer): float(v) for layer, v in logged[-1].items() if v is not None}
                )
    if not final:
        return None
    layers = sorted({layer for seeds in final.values() for seed in seeds for layer in seed})
    series = []
    for arm_name, seeds in final.items():
        columns = [[seed[layer] for seed in seeds if layer in seed] for layer in layers]
        mean = [float(np.mean(column)) if column else None for column in columns]
        low = [min(column) if column else None for column in columns]
        high = [max(column) if column else None for column in columns]
        series.append(BarSeries(arm_name, mean, low, high, arm_name))
    means = "; ".join(
        f"{arm_name} "
        + ", ".join(
            f"{np.mean(found):.2f}"
            for layer in layers
            if (found := [seed[layer] for seed in seeds if layer in seed])
        )
        for arm_name, seeds in final.items()
    )
    title = f"{label} at the end of training"
    chart = BarChart(f"{name}-by-layer", title, label, [f"layer {layer}" for layer in layers], series, note)
    return chart, means


def cost(run: RunResults) -> Section:
    """What each arm costs, as a table, with the ratio to the first arm."""
    slug, title, question = "cost", "Cost", "What does it cost?"
    columns: list[tuple[str, str, Callable[[float], str]]] = [
        ("parameters", "parameters", lambda v: f"{v:,.0f}"),
        ("FLOPs per token", "flops_per_token", lambda v: f"{v:,.3g}" if v < 1e4 else scaled(v)),
        ("tokens/s in training", "tokens_per_second", lambda v: f"{v:,.0f}"),
        ("peak memory", "peak_memory_bytes", bytes_text),
        ("KV cache per token", "kv_bytes_per_token", bytes_text),
        ("training time", "seconds", duration),
    ]
    means = {arm.name: {key: _mean(arm, key) for _, key, _ in columns} for arm in run.arms}
    if not any(value is not None for row in means.values() for value in row.values()):
        return Section(slug, title, question, "No results yet.", missing=True)
    base = means[run.baseline.name]
    rows: list[list[str | None]] = []
    for arm in run.arms:
        cells: list[str | None] = [arm.name]
        for _, key, show in columns:
            value, reference = means[arm.name][key], base[key]
            if value is None:
                cells.append(None)
            elif reference and arm is not run.baseline and key != "seconds":
                cells.append(f"{show(value)} (×{value / reference:.2f})")
            else:
                cells.append(show(value))
        rows.append(cells)
    speeds = [
        f"{arm.name} {_percent(means[arm.name]['tokens_per_second'], base['tokens_per_second'])}"
        for arm in run.arms[1:]
        if means[arm.name]["tokens_per_second"] and base["tokens_per_second"]
    ]
    answer = (
        f"Training speed against {run.baseline.name} on this machine: {', '.join(speeds)}."
        if speeds
        else "See the table; a comparison needs two arms with their costs."
    )
    table = SectionTable(
        "Cost of each arm",
        ["arm", *(name for name, _, _ in columns)],
        rows,
        f"Means over seeds; (×) is the ratio to {run.baseline.name}. Speed is the median over the intervals that were "
        "logged, so pauses do not count. Speed and memory are of this machine, with several runs side by side: no "
        "benchmark.",
    )
    return Section(slug, title, question, answer, tables=[table])


def _mean(arm: ArmResults, key: str) -> float | None:
    read = _speed if key == "tokens_per_second" else lambda seed: seed.cost.get(key)
    values = [float(value) for seed in arm.seeds.values() if (value := read(seed)) is not None]
    return float(np.mean(values)) if values else None


def _speed(seed: SeedResults) -> float | None:
    """Tokens per second of a finished training, as it went between pauses."""
    logged = [rate for record in seed.metrics if (rate := record.get("tokens_per_second")) is not None]
    return float(np.median(logged)) if logged and seed.cost else seed.cost.get("tokens_per_second")


def _percent(value: float | None, reference: float | None) -> str:
    return "–" if value is None or not reference else f"{100 * value / reference:.0f} %"


def scaled(value: float) -> str:
    """`1.24 M`: a large number with its decimal prefix."""
    for size, unit in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= size:
            return f"{value / size:.3g} {unit}"
    return f"{value:.3g}"


def bytes_text(value: float) -> str:
    """`1.5 MB`: bytes in decimal units."""
    return f"{scaled(value)}B" if value >= 1e3 else f"{value:.0f} B"


def duration(seconds: float) -> str:
    """`3 min 20 s`."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s" if minutes else f"{rest} s"

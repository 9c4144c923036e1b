"""The report's sections of a scaling study: the equivalence ratios, the laws, and how far to trust them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from clearhead.analysis.scaling.equivalence import Currency, Equivalence
from clearhead.analysis.scaling.law import Axis
from clearhead.analysis.scaling.points import NoiseFloor, Refused
from clearhead.analysis.scaling.study import CURRENCIES, ArmScaling, FittedLaw, ScalingAnalysis
from clearhead.analysis.sections import Headline, LineChart, Reference, Section, SectionTable, Series
from clearhead.analysis.statistics import count
from clearhead.report.training import scaled
from clearhead.runs.study import Study

PAPER = {
    "parameters": "The Differential Transformer's paper reads 62.2 % (6.8B) and 59.5 % (7.8B) of the parameters",
    "tokens": "The Differential Transformer's paper reads 63.7 % of the tokens (a 3B model, 160B tokens)",
    "flops": "The Differential Transformer's paper counts no FLOPs",
}
PAPER_NOTE = (
    "off its fitted curves, without intervals (arXiv 2410.05258, section 3.2): models four orders of magnitude "
    "larger, on another corpus."
)
QUESTIONS = {
    "parameters": "How many of the parameters does an arm need?",
    "tokens": "How many of the training tokens does an arm need?",
    "flops": "How much of the training compute does an arm need?",
}
MEASURES = {
    "parameters": "parameters for the first arm's loss, as a share of its own ↓",
    "tokens": "tokens for the first arm's loss, as a share of its own ↓",
    "flops": "training FLOPs for the first arm's loss, as a share of its own ↓",
}
LABELS: dict[Axis, str] = {
    "parameters": "parameters without embeddings",
    "tokens": "training tokens",
    "flops": "training FLOPs",
}
SMOOTH = 40


def ratio_section(analysis: ScalingAnalysis, currency: Currency) -> Section:
    """One currency: what each arm needs of what the first arm needs for the same loss, as a function of its size."""
    baseline, *arms = analysis.arms
    title = f"The same loss with fewer {'FLOPs' if currency == 'flops' else currency}"
    quoted = {arm.name: arm.quoted(currency) for arm in arms}
    found = {name: one for name, one in quoted.items() if isinstance(one, Equivalence)}
    sentences = [_sentence(one, baseline.name) for one in found.values()]
    sentences += [
        f"{name}: no ratio, {one.reason}." for name, one in quoted.items() if isinstance(one, Refused)
    ]
    headlines = [Headline(name, None, _verdict(one), _short(one)) for name, one in found.items()]
    series = [line for arm in arms if (line := _ratio_line(arm, currency)) is not None]
    chart = LineChart(
        f"scaling-ratio-{currency}",
        f"What an arm needs of {baseline.name}'s {'FLOPs' if currency == 'flops' else currency} for the same loss",
        LABELS["parameters"],
        "ratio",
        series,
        "With 95 % intervals. Where a line ends, the first arm has no data to compare with.",
        log_x=True,
        references=[Reference("as many", 1.0)],
    )
    return Section(
        f"scaling-{currency}",
        title,
        QUESTIONS[currency],
        " ".join(sentences) or "One arm has nothing to be compared with.",
        charts=[chart] if series else [],
        tables=[_ratio_table(arms, currency)] if arms else [],
        notes=[f"{PAPER[currency]}, {PAPER_NOTE}"],
        missing=not found,
        headlines=headlines,
        measure=MEASURES[currency],
    )


def law_section(analysis: ScalingAnalysis) -> Section:
    """The laws: losses against N and against D on two logarithmic axes, and the constants with their intervals."""
    charts = [chart for axis in ("parameters", "tokens") if (chart := _law_chart(analysis, axis)) is not None]
    rows: list[list[str | None]] = []
    for arm in analysis.arms:
        fits: list[tuple[str, FittedLaw | Refused]] = [("L(N, D)", arm.joint)]
        fits += [(f"L({letter})", arm.single[axis]) for letter, axis in _SINGLE]
        for name, fit in fits:
            if isinstance(fit, Refused):
                rows.append([arm.name, name, *[None] * 5, fit.reason])
                continue
            constants = dict(fit.constants)
            pairs = [constants.pop("E"), *constants.values()]
            cells: list[str | None] = [f"{v:.3g} ({low:.2g} to {high:.2g})" for v, low, high in pairs]
            rows.append(
                [arm.name, name, *cells, *[None] * (5 - len(cells)), f"p = {fit.residuals.pvalue:.2g}"]
            )
    joint = [arm.name for arm in analysis.arms if isinstance(arm.joint, FittedLaw)]
    refused = [arm.name for arm in analysis.arms if isinstance(arm.joint, Refused)]
    answer = f"L = E + A/N^α + B/D^β fits {', '.join(joint)}." if joint else "The joint law fits no arm."
    if joint and refused:
        answer += f" It does not fit {', '.join(refused)}."
    headers = ["arm", "law", "E", "A", "its exponent", "B", "its exponent", "lack of fit"]
    table = SectionTable(
        "Constants with 95 % intervals",
        headers,
        rows,
        "N: parameters without embeddings, D: tokens, C: training FLOPs; losses in nats a token. L(N) and L(C) are at "
        "the largest budget, L(D) at the largest size. Over a range this narrow E and the exponents trade against each "
        "other: wide intervals here go with narrow ones of the ratios, which are inside the data.",
    )
    return Section(
        "scaling-laws",
        "The laws",
        "Which law do the losses follow?",
        answer,
        charts=charts,
        tables=[table],
        missing=not joint,
    )


def trust_section(analysis: ScalingAnalysis) -> Section:
    """The noise floor, the residuals on both axes, and the prediction of the size that a fit did not see."""
    noise = analysis.noise
    if isinstance(noise, Refused):
        text = f"It cannot be said: {noise.reason}."
        return Section("scaling-trust", "How far to trust them", "Do the laws hold?", text, missing=True)
    fitted = [(arm, arm.joint) for arm in analysis.arms if isinstance(arm.joint, FittedLaw)]
    charts = [_residual_chart(fitted, axis, noise) for axis in ("parameters", "tokens")] if fitted else []
    rows: list[list[str | None]] = []
    inside = total = 0
    for arm in analysis.arms:
        if isinstance(arm.held_out, Refused):
            rows.append([arm.name, None, None, None, None, arm.held_out.reason])
            continue
        for one in arm.held_out:
            inside, total = inside + one.inside, total + 1
            rows.append(
                [
                    arm.name,
                    f"{one.size}, {scaled(one.tokens)}",
                    f"{one.measured:.4f}",
                    f"{one.predicted:.4f} ({one.low:.4f} to {one.high:.4f})",
                    f"{100 * (one.predicted / one.measured - 1):+.2f} %".replace("-", "−"),
                    "inside" if one.inside else "outside",
                ]
            )
    table = SectionTable(
        "The largest size, predicted by a fit to the others",
        ["arm", "size and tokens", "measured", "predicted", "error", "its interval"],
        rows,
        "Intervals are 95 % of the law's own uncertainty and the seeds'; several models of one arm err together.",
    )
    answer = (
        f"Another seed moves a loss by {100 * noise.deviation:.2f} % (standard deviation, "
        f"{count(noise.freedom, 'degree')} of freedom)."
    )
    if fitted:
        spread = ", ".join(f"{arm.name} {100 * fit.residuals.deviation:.2f} %" for arm, fit in fitted)
        answer += f" Residuals about the joint law: {spread}."
    if total:
        answer += f" Of {total} held-out cells {inside} lie inside their interval."
    return Section(
        "scaling-trust", "How far to trust them", "Do the laws hold?", answer, charts=charts, tables=[table]
    )


def scaling_sections(study: Study, analysis: ScalingAnalysis) -> list[Section]:
    """All sections of a study's report; what is missing is shown as missing."""
    if not study.points:
        text = "No model has been trained and evaluated yet."
        return [Section("scaling", "Scaling", "How does the loss fall with size?", text, missing=True)]
    sections = [ratio_section(analysis, currency) for currency in CURRENCIES]
    sections += [law_section(analysis), trust_section(analysis)]
    if study.missing:
        sections[-1] = replace(sections[-1], notes=[*sections[-1].notes, *study.missing])
    return sections


_SINGLE: tuple[tuple[str, Axis], ...] = (("N", "parameters"), ("D", "tokens"), ("C", "flops"))


def _sentence(one: Equivalence, baseline: str) -> str:
    at = f"at {scaled(one.parameters)} parameters and {scaled(one.tokens)} tokens"
    what = "FLOPs" if one.currency == "flops" else one.currency
    beyond = " (an end of the interval lies outside the data)" if one.beyond else ""
    return f"{one.arm} {at}: {_short(one)} of {baseline}'s {what} for the same loss{beyond}; {_verdict(one)}."


def _short(one: Equivalence) -> str:
    return f"{100 * one.value:.0f} % ({100 * one.low:.0f} to {100 * one.high:.0f})"


def _verdict(one: Equivalence) -> str:
    if one.high < 1:
        return "fewer"
    return "more" if one.low > 1 else "no difference detected"


def _ratio_line(arm: ArmScaling, currency: Currency) -> Series | None:
    found = [one for one in arm.curves[currency] if isinstance(one, Equivalence)]
    if not found:
        return None
    return Series(
        arm.name,
        [one.parameters for one in found],
        [one.value for one in found],
        [one.low for one in found],
        [one.high for one in found],
        arm.name,
    )


def _ratio_table(arms: Sequence[ArmScaling], currency: Currency) -> SectionTable:
    rows: list[list[str | None]] = []
    for arm in arms:
        for one in arm.curves[currency]:
            if isinstance(one, Equivalence):
                size, tokens = scaled(one.parameters), scaled(one.tokens)
                rows.append([arm.name, size, tokens, scaled(one.baseline), _short(one), _verdict(one)])
            else:
                rows.append([arm.name, None, None, None, None, one.reason])
    what = "FLOPs" if currency == "flops" else currency
    return SectionTable(
        "By size",
        ["arm", "parameters", "tokens", f"{what} the first arm needs", "ratio", ""],
        rows,
        "95 % intervals, each by itself: a wild bootstrap over runs.",
    )


def _law_chart(analysis: ScalingAnalysis, axis: Axis) -> LineChart | None:
    """Measured means as markers, the joint law as lines: against N at the largest budget, D at the largest size."""
    series = []
    for arm in analysis.arms:
        fit = arm.joint if isinstance(arm.joint, FittedLaw) else arm.single[axis]
        if isinstance(fit, Refused):
            continue
        points = fit.points
        fixed: Axis = "tokens" if axis == "parameters" else "parameters"
        top = max(getattr(point, fixed) for point in points)
        chosen = [point for point in points if getattr(point, fixed) == top]
        values = sorted({getattr(point, axis) for point in chosen})
        means = [float(np.mean([p.loss for p in chosen if getattr(p, axis) == value])) for value in values]
        grid = [float(one) for one in np.geomspace(values[0], values[-1], SMOOTH)]
        law = [fit.law.loss(**{axis: one, fixed: top}) for one in grid]
        series += [
            Series(arm.name, values, means, arm=arm.name, drawn="points"),
            Series(f"{arm.name}, law", grid, law, arm=arm.name, drawn="line"),
        ]
    if not series:
        return None
    against = "size at the largest budget" if axis == "parameters" else "tokens at the largest size"
    return LineChart(
        f"scaling-loss-{axis}",
        f"Validation loss against {against}",
        LABELS[axis],
        "nats a token",
        series,
        "Markers: means over seeds. Lines: the joint law, or that of this axis alone where the joint one does not fit.",
        log_x=True,
        log_y=True,
        markers=True,
    )


def _residual_chart(
    fitted: Sequence[tuple[ArmScaling, FittedLaw]], axis: Axis, noise: NoiseFloor
) -> LineChart:
    series = []
    for arm, fit in fitted:
        x = np.array([getattr(point, axis) for point in fit.points])
        values = sorted(set(x.tolist()))
        columns = [100 * fit.residuals.values[x == value] for value in values]
        series.append(
            Series(
                arm.name,
                values,
                [float(column.mean()) for column in columns],
                [float(column.min()) for column in columns],
                [float(column.max()) for column in columns],
                arm.name,
            )
        )
    return LineChart(
        f"scaling-residuals-{axis}",
        f"Residuals of the joint law against {'size' if axis == 'parameters' else 'tokens'}",
        LABELS[axis],
        "measured over predicted, − 1, in %",
        series,
        f"Mean, lowest and highest over the other axis and the seeds; another seed moves a loss by "
        f"{100 * noise.deviation:.2f} %.",
        log_x=True,
        markers=True,
        references=[Reference("", 0.0)],
    )

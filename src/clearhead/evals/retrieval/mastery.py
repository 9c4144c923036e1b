"""Tokens until mastery: how much training a model needs before it retrieves.

Retrieval is measured while training, every `train.probe_every` steps. A model has mastered it at the first probe with
an accuracy of at least `threshold`; a model that never does is censored at the last token it saw. Mastery comes as a
sudden transition whose moment depends on the seed, so an arm is the survival curve of its seeds (Kaplan-Meier,
pointwise log-log intervals) and arms are compared by the log-rank test against the first one, Holm-adjusted. The true
moment lies up to one probe interval before the recorded one, for every arm alike.
"""

from __future__ import annotations

from typing import Any

from pydantic import Field

from clearhead.analysis.by_length import Values, first_values
from clearhead.analysis.comparison import join
from clearhead.analysis.sections import Headline, LineChart, Section, SectionTable, Series
from clearhead.analysis.statistics import Survival, holm, kaplan_meier, logrank, seeds_clause
from clearhead.evals.evaluation import Evaluation, EvaluationConfig, EvaluationResult, Say
from clearhead.evals.reasons import Unmeasured
from clearhead.evals.subject import Subject
from clearhead.runs.results import RunResults

SIGNIFICANT = 0.05
PROBE = "needle_accuracy"


class MasteryConfig(EvaluationConfig):
    """threshold: exact-match accuracy on the probe that counts as mastery."""

    threshold: float = Field(default=0.9, gt=0, le=1)


class MasteryResult(EvaluationResult):
    """tokens: until mastery, or seen in all. budget: of training."""

    threshold: float
    mastered: bool
    tokens: int
    budget: int | None
    final_accuracy: float
    best_accuracy: float
    n: int


class Mastery(Evaluation[MasteryConfig, MasteryResult]):
    """No evaluation of cells: it reads the log of the training and asks the model nothing, so nothing can be too long,
    have no room in memory or be interrupted.
    """

    name = "mastery"
    Config = MasteryConfig
    Result = MasteryResult

    def result(self, subject: Subject, config: MasteryConfig, progress: Say | None = None) -> MasteryResult:
        probes = probe_curve(subject.metrics)
        if not probes:
            raise Unmeasured("no probe was measured while training; set train.probe_every")
        reached = next((tokens for tokens, accuracy in probes if accuracy >= config.threshold), None)
        return MasteryResult(
            threshold=config.threshold,
            mastered=reached is not None,
            tokens=probes[-1][0] if reached is None else reached,
            budget=subject.budget,
            final_accuracy=probes[-1][1],
            best_accuracy=max(accuracy for _, accuracy in probes),
            n=len(probes),
        )

    def section(self, run: RunResults) -> Section:
        title, question = "Tokens until mastery", "Does it learn to retrieve sooner?"
        values = self.results(run)
        if not values:
            return self.missing(run, title, question)
        threshold = first_values(values).threshold
        times = {arm: [float(v.tokens) for v in seeds.values()] for arm, seeds in values.items()}
        events = {arm: [bool(v.mastered) for v in seeds.values()] for arm, seeds in values.items()}
        curves = {arm: kaplan_meier(times[arm], events[arm]) for arm in values}
        baseline = next(iter(values))
        others = [arm for arm in values if arm != baseline]
        raw = [logrank(times[arm], events[arm], times[baseline], events[baseline]) for arm in others]
        adjusted = dict(zip(others, holm(raw), strict=True))
        return Section(
            self.name,
            title,
            question,
            _answer(curves, adjusted, threshold),
            measure="median tokens until mastery ↓",
            headlines=[
                Headline(
                    arm,
                    None,
                    _verdict(adjusted.get(arm)),
                    _median(curve),
                    f"{curve.events} of {curve.n} runs",
                )
                for arm, curve in curves.items()
            ],
            charts=[_chart(curves, threshold)] if any(curve.events for curve in curves.values()) else [],
            tables=[_table(run, values, curves, adjusted)],
            notes=[
                f"Mastery is the first probe with an exact match of at least {threshold:.0%}; a run that never gets "
                "there is censored where it ended. Kaplan-Meier curves over seeds with pointwise 95 % log-log bounds; "
                f"two-sided log-rank tests against {baseline}, adjusted by Holm's method.",
                *run.skipped(self.name),
            ],
        )


def probe_curve(metrics: list[dict[str, Any]]) -> list[tuple[int, float]]:
    """(tokens seen, probe accuracy) of every probe in a `metrics.jsonl`, in order."""
    return sorted(
        (int(m["tokens"]), float(m["probe"][PROBE]))
        for m in metrics
        if m.get("probe", {}).get(PROBE) is not None
    )


def _answer(curves: dict[str, Survival], adjusted: dict[str, float], threshold: float) -> str:
    seeds = seeds_clause(min(curve.n for curve in curves.values()))
    if not any(curve.events for curve in curves.values()):
        return f"No run of any arm reached {threshold:.0%} within the budget, so there is nothing to compare. {seeds}"
    reached = "; ".join(f"{arm} {curve.events} of {curve.n}" for arm, curve in curves.items())
    parts = [f"Runs that reached {threshold:.0%} within the budget: {reached}."]
    baseline = next(iter(curves))
    different = [arm for arm, p in adjusted.items() if p < SIGNIFICANT]
    unclear = [arm for arm in adjusted if arm not in different]
    parts += [
        f"{arm} differs from {baseline} (log-rank, Holm-adjusted p = {adjusted[arm]:.2g})."
        for arm in different
    ]
    if unclear:
        against = "" if different else f" from {baseline}"
        parts.append(f"No difference{against} detected for {join(unclear)} (log-rank).")
    return " ".join([*parts, seeds])


def _verdict(p: float | None) -> str:
    if p is None:
        return ""
    return f"{'different' if p < SIGNIFICANT else 'no difference detected'} (p = {p:.2g})"


def _median(curve: Survival) -> str:
    return "not reached" if curve.median is None else f"{curve.median / 1e6:.2f} M"


def _chart(curves: dict[str, Survival], threshold: float) -> LineChart:
    # The share that HAS mastered rises, which reads more easily than survival: 1 - S, so the bounds swap. A curve stays
    # where it is after its last run, up to the end of the longest one.
    end = max(curve.times[-1] for curve in curves.values())

    def rising(values: tuple[float, ...]) -> list[float]:
        return [1 - value for value in (*values, values[-1])]

    series = [
        Series(
            arm,
            [time / 1e6 for time in (*curve.times, end)],
            rising(curve.probability),
            rising(curve.high),
            rising(curve.low),
            arm,
        )
        for arm, curve in curves.items()
    ]
    return LineChart(
        "mastery",
        f"Share of runs that have reached {threshold:.0%}",
        "training tokens (millions)",
        "share of runs",
        series,
        "One minus the Kaplan-Meier estimate over seeds, with pointwise 95 % bounds.",
        step=True,
        y_range=(0.0, 1.0),
    )


def _table(
    run: RunResults,
    values: Values[MasteryResult],
    curves: dict[str, Survival],
    adjusted: dict[str, float],
) -> SectionTable:
    rows: list[list[str | None]] = []
    for arm in run.arms:
        curve = curves.get(arm.name)
        if curve is None:
            rows.append([arm.name, None, None, None, None])
            continue
        finals = [v.final_accuracy for v in values[arm.name].values()]
        rows.append(
            [
                arm.name,
                f"{curve.events} of {curve.n}",
                _median(curve),
                f"{sum(finals) / len(finals):.2f} ({min(finals):.2f} to {max(finals):.2f})",
                f"{adjusted[arm.name]:.3g}" if arm.name in adjusted else "–",
            ]
        )
    headers = ["arm", "mastered", "median tokens", "last probe: mean (range)", "p against the first arm"]
    return SectionTable("Mastery by arm", headers, rows)

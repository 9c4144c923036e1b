"""The report: a pure function of the files of a run directory, as one HTML file that needs nothing else."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from clearhead.analysis.scaling.record import record
from clearhead.analysis.scaling.study import analyse
from clearhead.analysis.sections import Headline, Section, SectionTable
from clearhead.analysis.statistics import count, decimal
from clearhead.registry import names, resolve
from clearhead.report.charts import render
from clearhead.report.palette import all_inks, arm_inks
from clearhead.report.scaling import scaling_sections
from clearhead.report.training import cost, diagnostics, lambdas, learning_curves
from clearhead.runs.directory import LOOK_PAGE
from clearhead.runs.files import write_json, write_text
from clearhead.runs.recipe_data import corpus_name
from clearhead.runs.results import RunResults, load_run
from clearhead.runs.study import is_study, load_study

MISSING = "–"
# Evaluations that ask for facts in the form of the training's own retrieval rows.
RETRIEVAL = ("needles", "allocation", "mastery")


def build_report(run_dir: str | Path, *, reload_every: float | None = None) -> Path:
    """Write `report.html`, `summary.json` and `charts/*.{pdf,png}` of a run directory; returns the page's path.

    reload_every: seconds after which an open page loads itself again, for a run that still goes on.
    What has not been measured yet is shown as missing. Raises FileNotFoundError for a directory that is no run, and
    ValueError that names the file when one of its files is broken.
    """
    root = Path(run_dir)
    if is_study(root):
        return _study_report(root, reload_every)
    run = load_run(root)
    questions = evaluation_sections(run)
    logged = (lambdas(run), *diagnostics(run))
    sections = [section for section in (learning_curves(run), *questions, *logged, cost(run)) if section]
    target = _write(
        root,
        _Page(run.name, run.recipe, run.env, setting(run), state(run), arms_of(run)),
        questions,
        sections,
        reload_every,
    )
    write_json(root / "summary.json", summary(run, sections))
    return target


def arms_of(run: RunResults) -> list[str]:
    """The names of the arms, in the recipe's order."""
    return [arm.name for arm in run.arms]


@dataclass(frozen=True)
class _Page:
    """What a page says beside its sections."""

    name: str
    recipe: dict[str, Any]
    env: dict[str, Any]
    setting: str
    state: str
    arms: list[str]


def _study_report(root: Path, reload_every: float | None) -> Path:
    """The report of a scaling study, and `scaling.json`, its laws and ratios for programs."""
    study = load_study(root)
    analysis = analyse(study.points)
    sections = scaling_sections(study, analysis)
    recipe = study.recipe
    widths, budgets = len(recipe.scaling.widths), len(recipe.scaling.budgets)  # type: ignore[union-attr]
    parts = (count(len(recipe.arms), "arm"), count(widths, "size"), count(budgets, "budget"))
    where = f"corpus {recipe.corpus.named}"
    done, total = study.states["evaluated"], study.states.total()
    page = _Page(
        recipe.name,
        {"description": recipe.description},
        study.env,
        " · ".join((*parts, count(len(recipe.seeds), "seed"), where)),
        "All families trained and evaluated."
        if done == total
        else f"{done} of {total} families evaluated. What is missing is shown as missing.",
        [arm.name for arm in recipe.arms],
    )
    # The ratios and whether the laws hold are the answers; the laws themselves are a detail.
    questions = [section for section in sections if section.slug != "scaling-laws"]
    target = _write(root, page, questions, sections, reload_every)
    table = _table(page.arms, page.name, page.state, [section for section in sections if section.headlines])
    write_json(root / "summary.json", _summary(page.name, page.state, sections, table))
    write_json(root / "scaling.json", record(analysis))
    return target


def _write(
    root: Path, page: _Page, questions: list[Section], sections: list[Section], reload_every: float | None
) -> Path:
    """The page and its charts; returns the page's path."""
    inks = arm_inks(page.arms)
    drawn = {
        chart.slug: Markup(render(chart, inks, root / "charts"))
        for section in sections
        for chart in section.charts
    }
    _drop_stale(root / "charts", set(drawn))
    environment = Environment(
        loader=PackageLoader("clearhead.report"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    text = environment.get_template("report.html").render(
        name=page.name,
        description=page.recipe.get("description", ""),
        state=page.state,
        setting=page.setting,
        questions=questions,
        sections=sections,
        charts=drawn,
        arms={arm: ink.name for arm, ink in inks.items()},
        inks=all_inks(),
        number=headline_number,
        recipe=(root / "recipe.toml").read_text(encoding="utf-8"),
        environment=dict(_flat(page.env)),
        missing=MISSING,
        look=LOOK_PAGE if (root / LOOK_PAGE).exists() else None,
        reload_every=reload_every,
    )
    target = root / "report.html"
    write_text(target, text)
    return target


def evaluation_sections(run: RunResults) -> list[Section]:
    """One section for each evaluation that the recipe asks for, in its order, and then for others with results."""
    asked = run.recipe.get("evaluate", {}).get("suites", [])
    measured = sorted({name for arm in run.arms for seed in arm.seeds.values() for name in seed.results})
    known = names("evaluations")
    suites = dict.fromkeys([*asked, *(name for name in measured if name in known)])
    sections = {name: resolve("evaluations", name)().section(run) for name in suites}
    if learned_retrieval(run):
        return list(sections.values())
    return [untaught(section) if name in RETRIEVAL else section for name, section in sections.items()]


def learned_retrieval(run: RunResults) -> bool:
    """Whether retrieval rows were trained on, or whether nothing is known of the training: a model from elsewhere."""
    data = run.recipe.get("data")
    return not data or any(data.get(key, 0) for key in ("needle_share", "pair_share", "pairs_first"))


def untaught(section: Section) -> Section:
    """Without headlines: of arms that were not trained to look anything up, the numbers say little."""
    said = "Nothing in the training of these arms asked for retrieval (data.needle_share, data.pair_share)."
    return replace(section, answer=f"{said} {section.answer}", measure="", headlines=())


def _table(arms: list[str], name: str, state: str, questions: list[Section]) -> SectionTable:
    measured = [section for section in questions if section.measure]
    rows: list[list[str | None]] = []
    for arm in arms:
        row: list[str | None] = [arm]
        for section in measured:
            found = [headline for headline in section.headlines if headline.arm == arm]
            row.append(cell(found[0], section.digits) if found else None)
        rows.append(row)
    return SectionTable(name, ["arm", *(section.measure for section in measured)], rows, state)


def headline_number(headline: Headline, digits: int) -> str:
    """The number itself, without its interval."""
    if headline.text or headline.estimate is None:
        return headline.text or MISSING
    return decimal(headline.estimate.value, digits)


def cell(headline: Headline, digits: int) -> str:
    """The number with its interval."""
    number = headline_number(headline, digits)
    return (
        f"{number} ({headline.estimate.interval(digits)})"
        if headline.estimate and not headline.text
        else number
    )


def summary(run: RunResults, sections: list[Section]) -> dict[str, Any]:
    """`summary.json`: every answer with its numbers, for programs."""
    asked = [section for section in sections if section.headlines]
    return _summary(run.name, state(run), sections, _table(arms_of(run), run.name, state(run), asked))


def _summary(name: str, state: str, sections: list[Section], table: SectionTable) -> dict[str, Any]:
    return {
        "name": name,
        "state": state,
        "answers": [
            {
                "section": section.slug,
                "question": section.question,
                "answer": section.answer,
                "missing": section.missing,
                "measure": section.measure,
                "arms": [
                    {
                        "arm": headline.arm,
                        "text": headline_number(headline, section.digits),
                        "verdict": headline.verdict,
                        **(asdict(headline.estimate) if headline.estimate else {}),
                    }
                    for headline in section.headlines
                ],
            }
            for section in sections
        ],
        "table": {"headers": list(table.headers), "rows": [list(row) for row in table.rows]},
    }


def state(run: RunResults) -> str:
    """One sentence on how much of the run is there."""
    states = Counter(seed.status.get("state", "queued") for arm in run.arms for seed in arm.seeds.values())
    total = states.total()
    if states["evaluated"] == total:
        return f"All {count(total, 'run')} trained and evaluated."
    parts = [f"{number} {name}" for name, number in states.items() if name != "evaluated"]
    done = f"{states['evaluated']} of {count(total, 'run')} evaluated"
    return f"{done}; {', '.join(parts)}. What is missing is shown as missing."


def setting(run: RunResults) -> str:
    """One line: arms, seeds, budget, corpus."""
    tokens = run.recipe.get("train", {}).get("tokens")
    source = corpus_name(run.recipe.get("corpus", {}))
    parts = [count(len(run.arms), "arm"), count(len(run.baseline.seeds), "seed")]
    if tokens:
        parts.append(f"{tokens / 1e6:.3g} million training tokens each")
    if source:
        parts.append(f"corpus {source}")
    return " · ".join(parts)


def _flat(values: dict[str, Any], prefix: str = "") -> list[tuple[str, str]]:
    """Nested JSON as (dotted name, text) pairs."""
    pairs = []
    for key, value in values.items():
        name = f"{prefix}{key}"
        if isinstance(value, dict):
            pairs += _flat(value, f"{name}.")
        elif value not in (None, [], ""):
            pairs.append((name, value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)))
    return pairs


def _drop_stale(folder: Path, slugs: set[str]) -> None:
    """Remove chart files of an earlier report that this one does not have."""
    for path in folder.glob("*"):
        if path.suffix in (".pdf", ".png") and path.stem not in slugs:
            path.unlink()

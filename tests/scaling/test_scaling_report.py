"""The report of a study: ratios with intervals, refusals with reasons, and nothing that was not measured."""

import json
import math
from pathlib import Path

import pytest

from clearhead.analysis.scaling.points import ScalingPoint
from clearhead.analysis.scaling.study import ScalingAnalysis, analyse
from clearhead.report.build import build_report
from clearhead.report.scaling import law_section, ratio_section, scaling_sections, trust_section
from clearhead.runs.grid import branch_directory, family_directory, sizes
from clearhead.runs.recipe import Recipe
from clearhead.runs.recipe_io import dump_toml, parse_recipe
from tests.scaling.synthetic import BUDGETS, study
from tests.scaling.tiny import raw_recipe


@pytest.fixture(scope="module")
def analysis() -> ScalingAnalysis:
    return analyse(study(0), draws=60)


def test_ratios_say_where_they_hold(analysis: ScalingAnalysis) -> None:
    section = ratio_section(analysis, "parameters")
    (headline,) = section.headlines
    assert headline.arm == "arm" and headline.verdict == "fewer"
    assert "of base's parameters for the same loss" in section.answer
    assert 58 <= int(headline.text.split(" %")[0]) <= 72
    assert any("62.2 %" in note for note in section.notes)
    (chart,) = section.charts
    (line,) = chart.series  # type: ignore[union-attr]
    # It ends where the baseline has no models as good as the arm's.
    assert max(line.x) < 498e3
    reasons = [row[-1] for row in section.tables[0].rows if row[1] is None]
    assert reasons and all("outside its data" in str(reason) for reason in reasons)


def test_laws_and_trust(analysis: ScalingAnalysis) -> None:
    laws = law_section(analysis)
    assert laws.answer == "L = E + A/N^α + B/D^β fits base, arm."
    assert all(chart.log_x and chart.log_y for chart in laws.charts)  # type: ignore[union-attr]
    assert len(laws.tables[0].rows) == 8
    trust = trust_section(analysis)
    assert "Another seed moves a loss by 0.4" in trust.answer
    assert len(trust.tables[0].rows) == 2 * len(BUDGETS)


def test_refusals_are_said() -> None:
    refused = analyse(study(5, bump=0.03), draws=20)
    section = ratio_section(refused, "tokens")
    assert section.missing and not section.headlines and not section.charts
    assert "arm: no ratio, arm: the law does not fit" in section.answer
    assert law_section(refused).answer.endswith("It does not fit arm.")
    single = analyse(study(6, seeds=1), draws=20)
    assert trust_section(single).missing and "two seeds" in trust_section(single).answer


def write_study(root: Path, recipe: Recipe, points: list[ScalingPoint]) -> None:
    (root / "recipe.toml").write_text(dump_toml(recipe))
    names, arms = [size.name for size in sizes(recipe)], dict(zip(("base", "arm"), recipe.arms, strict=True))
    for point in points:
        size = names[int(point.size[1:])]
        folder = root / family_directory(size, arms[point.arm].slug, point.seed)
        (branch := folder / branch_directory(int(point.tokens)) / "results").mkdir(parents=True)
        (folder / "status.json").write_text(json.dumps({"state": "evaluated"}))
        (folder / "size.json").write_text(
            json.dumps(
                {"non_embedding_parameters": point.parameters, "flops_per_token": 6 * point.parameters}
            )
        )
        values = {"bits": [point.loss / math.log(2) * 1000], "tokens": 1000}
        (branch / "language_modelling.json").write_text(json.dumps({"values": values, "config": {}}))


@pytest.mark.long
def test_the_page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        "clearhead.report.build.render", lambda chart, arms, folder: f"<svg>{chart.slug}</svg>"
    )
    scaling = {"widths": [16, 24, 32, 40, 48, 56], "budgets": [int(tokens) for tokens in BUDGETS]}
    recipe = parse_recipe({**raw_recipe("text", scaling=scaling), "seeds": [0, 1, 2]}, source="test")
    write_study(tmp_path, recipe, study(0))
    page = build_report(tmp_path).read_text()
    for text in (
        "All families trained and evaluated.",
        "scaling-ratio-tokens",
        "of Transformer&#39;s parameters",
    ):
        assert text in page
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert [row[0] for row in summary["table"]["rows"]] == ["Transformer", "DIFF V1"]
    written = json.loads((tmp_path / "scaling.json").read_text())
    assert [arm["arm"] for arm in written["arms"]] == ["Transformer", "DIFF V1"]
    ratios = written["arms"][1]["ratios"]["parameters"]
    assert 0.58 < ratios[0]["value"] < 0.72 and "outside its data" in ratios[-1]["refused"]
    assert written["arms"][0]["joint"]["constants"].keys() == {"E", "A", "α", "B", "β"}
    assert summary["table"]["rows"][0][1] is None and "%" in summary["table"]["rows"][1][1]


def test_a_study_without_results(tmp_path: Path) -> None:
    recipe = parse_recipe(raw_recipe("text"), source="test")
    (tmp_path / "recipe.toml").write_text(dump_toml(recipe))
    page = build_report(tmp_path).read_text()
    assert "No model has been trained and evaluated yet." in page and "0 of 4 families evaluated" in page


def test_sections_of_nothing() -> None:
    from collections import Counter

    from clearhead.runs.study import Study

    recipe = parse_recipe(raw_recipe("text"), source="test")
    (section,) = scaling_sections(Study(recipe, {}, [], Counter()), analyse([]))
    assert section.missing

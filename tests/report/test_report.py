"""The report as a reader's browser gets it: self-contained, complete about what is missing, one colour per arm."""

from __future__ import annotations

import json
import re
import shutil
from html.parser import HTMLParser
from pathlib import Path

import pytest

from clearhead.analysis.sections import LineChart, Series
from clearhead.report.build import build_report
from clearhead.report.charts import draw
from clearhead.report.palette import arm_inks
from clearhead.report.training import bytes_text, cost, duration, scaled
from clearhead.runs.results import ArmResults, RunResults, SeedResults
from tests.report.example_run import ARMS, SUITES, make_run


@pytest.fixture(scope="module")
def page(run: Path) -> str:
    return (run / "report.html").read_text()


@pytest.fixture
def undrawn(monkeypatch: pytest.MonkeyPatch) -> None:
    """For tests that are about words: drawing takes most of the time."""
    monkeypatch.setattr("clearhead.report.build.render", lambda chart, arms, folder: "<svg></svg>")


class Audit(HTMLParser):
    """Collects every address that a browser would fetch, every id, the headings and the text."""

    def __init__(self) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.fetched: list[str] = []
        self.links: list[str] = []
        self.ids: list[str] = []
        self.open: list[str] = []
        self.text: dict[str, list[str]] = {}

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.open.append(tag)
        for name, value in attrs:
            if name in ("src", "srcset", "data", "poster", "action", "background"):
                self.fetched.append(value or "")
            if name in ("href", "xlink:href"):
                (self.links if tag in ("a", "use") else self.fetched).append(value or "")
            if name == "id":
                self.ids.append(value or "")
            if name.startswith("on"):
                self.fetched.append(f"{name}={value}")

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        self.open.pop()

    def handle_endtag(self, tag: str) -> None:
        while self.open and self.open.pop() != tag:
            pass

    def handle_data(self, data: str) -> None:
        if self.open:
            self.text.setdefault(self.open[-1], []).append(data.strip())


def audit(page: str) -> Audit:
    found = Audit()
    found.feed(page)
    return found


def test_nothing_is_fetched_from_anywhere(page: str) -> None:
    found = audit(page)
    assert found.fetched == ["data:,"], "an empty icon, so that no browser asks for one"
    assert not {"script", "iframe", "object", "embed", "link-import"} & set(found.tags)
    assert all(link.startswith("#") for link in found.links)
    assert re.findall(r"url\((?!#)[^)]*\)", page) == []
    assert "@import" not in page and "http://" not in page and "https://" not in page


def test_every_inner_link_and_reference_has_its_target_and_ids_are_unique(page: str) -> None:
    found = audit(page)
    assert len(found.ids) == len(set(found.ids))
    references = {link[1:] for link in found.links} | set(re.findall(r"url\(#([^)]+)\)", page))
    assert references <= set(found.ids)


def test_the_first_screen_answers_every_question_with_uncertainty_and_seeds(run: Path, page: str) -> None:
    answers = json.loads((run / "summary.json").read_text())["answers"]
    asked = [answer for answer in answers if answer["arms"]]
    assert len(asked) == 5
    first_screen = page.split("<nav")[0]
    for answer in asked:
        assert answer["question"] in first_screen
        assert "3 seeds per arm." in answer["answer"]
        assert {arm["arm"] for arm in answer["arms"]} == set(ARMS)
    needles = next(answer for answer in asked if answer["section"] == "needles")
    assert "Asked for a single fact in 256 tokens, DIFF V1 is right most often (0.9" in needles["answer"]
    assert needles["measure"] == "exact match, 1 needle in 256 tokens ↑"
    assert all(arm["low"] < arm["value"] < arm["high"] and arm["n"] == 200 for arm in needles["arms"])


def test_summary_holds_the_table_of_the_terminal(run: Path) -> None:
    table = json.loads((run / "summary.json").read_text())["table"]
    assert table["headers"][0] == "arm" and [row[0] for row in table["rows"]] == list(ARMS)
    assert all(len(row) == len(table["headers"]) for row in table["rows"])


def test_every_chart_is_in_the_page_and_on_disk_as_pdf_and_png(run: Path, page: str) -> None:
    slugs = {path.stem for path in (run / "charts").iterdir()}
    assert len(slugs) >= 12
    for slug in slugs:
        assert (run / "charts" / f"{slug}.pdf").read_bytes().startswith(b"%PDF")
        assert (run / "charts" / f"{slug}.png").read_bytes().startswith(b"\x89PNG")
    assert page.count("<svg") == page.count("</svg>") == len(slugs)
    assert page.count('role="img" aria-label="') == len(slugs)


def test_an_arm_has_one_colour_in_every_chart_and_no_colour_is_fixed(page: str) -> None:
    inks = arm_inks(list(ARMS))
    assert len({ink.name for ink in inks.values()}) == len(ARMS)
    curves = re.search(r'id="learning-bits-per-byte-figure_1".*?</svg>', page, re.DOTALL)
    assert curves is not None
    drawn = re.findall(r"var\(--(arm-\d)\)", curves[0])
    assert set(drawn) == {ink.name for ink in inks.values()}
    fixed = set(re.findall(r"#[0-9a-f]{6}\b", "".join(re.findall(r"<svg.*?</svg>", page, re.DOTALL))))
    assert fixed <= {"#fffffe"}, "everything else follows the reader's light or dark setting"


def test_a_chart_of_many_arms_tells_them_apart_and_has_no_bands() -> None:
    names = [f"arm {index}" for index in range(11)]
    few, many = (
        LineChart(
            "c", "Chart", "x", "y", [Series(name, [1, 2], [1.0, 2.0], [0.5, 1.5], [1.5, 2.5], name) for name in some],
            markers=True,
        )
        for some in (names[:6], names)
    )  # fmt: skip
    assert not few.bands_left_out and many.bands_left_out
    drawn = [draw(chart, arm_inks(names)) for chart in (few, many)]
    assert [len(figure.axes[0].collections) for figure in drawn] == [6, 0]
    looks = {(line.get_color(), line.get_marker(), line.get_linestyle()) for line in drawn[1].axes[0].lines}
    assert len(looks) == 11
    assert len({(color, marker) for color, marker, _ in looks}) == 11, "also where dashes cannot be seen"
    assert drawn[1].get_figheight() > drawn[0].get_figheight()


def test_both_reading_modes_and_print_are_styled(page: str) -> None:
    assert "prefers-color-scheme: dark" in page and "@media print" in page
    assert '<meta name="viewport" content="width=device-width, initial-scale=1">' in page


def test_the_same_files_give_the_same_report(run: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(run, tmp_path / "demo")
    (copy / "report.html").unlink()
    (copy / "charts" / "of-an-earlier-report.pdf").write_bytes(b"%PDF")
    build_report(copy)
    assert (copy / "report.html").read_bytes() == (run / "report.html").read_bytes()
    assert {path.name for path in (copy / "charts").iterdir()} == {
        path.name for path in (run / "charts").iterdir()
    }


@pytest.mark.usefixtures("undrawn")
def test_missing_results_are_shown_as_missing(run: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(run, tmp_path / "demo")
    for path in copy.glob("arms/coca/seed-*"):
        shutil.rmtree(path)
    for path in copy.glob("arms/*/seed-*/results/allocation.json"):
        path.unlink()
    (copy / "arms/diff-v1/seed-1/results/language_modelling.json").unlink()
    page = build_report(copy).read_text()
    assert "9 of 12 runs evaluated; 3 queued. What is missing is shown as missing." in page
    answers = {a["section"]: a for a in json.loads((copy / "summary.json").read_text())["answers"]}
    assert answers["allocation"]["missing"] and answers["allocation"]["answer"] == "No results yet."
    assert not answers["needles"]["missing"]
    assert {arm["arm"] for arm in answers["needles"]["arms"]} == set(ARMS) - {"CoCA"}
    assert page.count('class="none" title="missing">–</td>') >= 4


def test_a_run_that_has_only_begun_has_a_report(tmp_path: Path) -> None:
    root = make_run(tmp_path / "demo", seeds=(0,))
    shutil.rmtree(root / "arms")
    page = build_report(root).read_text()
    assert "0 of 4 runs evaluated; 4 queued" in page
    assert page.count("No results yet.") >= 5 and "<svg" not in page


@pytest.mark.usefixtures("undrawn")
def test_one_seed_is_called_one_seed(tmp_path: Path) -> None:
    root = make_run(tmp_path / "demo", seeds=(0,))
    build_report(root)
    answers = json.loads((root / "summary.json").read_text())["answers"]
    assert all("One seed proves nothing" in answer["answer"] for answer in answers if answer["arms"])


def test_names_are_text_and_never_markup(tmp_path: Path) -> None:
    root = make_run(tmp_path / "demo", seeds=(0,))
    recipe = (root / "recipe.toml").read_text().replace('"CoCA"', "'<b>\"$x_1$ & co'")
    # Two charts are enough to see how names are drawn.
    recipe = recipe.replace(json.dumps(SUITES), "[]")
    (root / "recipe.toml").write_text(recipe)
    (root / "arms" / "coca").rename(root / "arms" / "b-x-1-co")
    page = build_report(root).read_text()
    assert "<b>&#34;" not in page and "&lt;b&gt;" in page
    assert "<svg" in page and "$x_1$" in page, "a dollar sign is no formula"


@pytest.mark.usefixtures("undrawn")
def test_a_broken_file_is_named(tmp_path: Path) -> None:
    root = make_run(tmp_path / "demo", seeds=(0,))
    (root / "arms/coca/seed-0/cost.json").write_text("{")
    with pytest.raises(ValueError, match=r"cost\.json is not valid JSON"):
        build_report(root)
    with pytest.raises(FileNotFoundError, match="not a run directory"):
        build_report(tmp_path)


def test_a_pause_does_not_make_an_arm_slow() -> None:
    def seed(rates: list[float | None]) -> SeedResults:
        metrics = [{"step": step, "tokens_per_second": rate} for step, rate in enumerate(rates)]
        return SeedResults(metrics=metrics, cost={"tokens_per_second": 5.0})

    arms = [
        ArmResults(name, name, "softmax", {0: seed(rates)})
        for name, rates in (("A", [None, 100.0, 100.0, 1.0]), ("B", [None, 80.0, 80.0, 80.0]), ("C", [None]))
    ]
    section = cost(RunResults({}, {}, arms))
    assert section.answer == "Training speed against A on this machine: B 80 %, C 5 %."


def test_numbers_read_as_numbers() -> None:
    assert [scaled(1234.0), scaled(8.1e5), scaled(2.5e9), scaled(12.0)] == ["1.23 k", "810 k", "2.5 G", "12"]
    assert [bytes_text(1024), bytes_text(512), bytes_text(6.1e8)] == ["1.02 kB", "512 B", "610 MB"]
    assert [duration(59), duration(122), duration(7300)] == ["59 s", "2 min 2 s", "2 h 1 min"]

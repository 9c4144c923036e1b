"""`--json`: the results of every verb that prints some, as one JSON value on standard output."""

import json
from pathlib import Path
from typing import Any

import pytest
from tests.cli.test_compare import RECIPE, call, project

__all__ = ["project"]


@pytest.fixture
def run(project: Path) -> Path:
    """Both arms trained, in this process."""
    (project / "small.toml").write_text(RECIPE.replace("tokens = 768", "tokens = 192"))
    for arm in ("Transformer", "DIFF V1"):
        told = parsed("train", "small.toml", "--arm", arm, "--out", "run", "--json")
        assert Path(told["model"], "config.json").exists()
        assert told["status"]["step"] == 3 and told["cost"]["parameters"] > 0
    return project / "run"


def parsed(*arguments: str) -> Any:
    done = call(*arguments)
    assert done.exit_code == 0, done.stderr
    return json.loads(done.stdout)


def test_results_of_a_run(run: Path) -> None:
    found = parsed("evaluate", str(run), "--suite", "language_modelling", "--json")
    assert list(found) == [str(run / "arms" / job) for job in ("diff-v1/seed-0", "transformer/seed-0")]
    for records in found.values():
        assert records["language_modelling"]["values"]["bits_per_byte"] > 0
    told = parsed("report", str(run), "--json")
    assert told["report"] == str(run / "report.html")
    answers = {answer["section"]: answer for answer in told["answers"]}
    shown = {arm["arm"] for arm in answers["language_modelling"]["arms"]}
    assert shown == {"Transformer", "DIFF V1"}
    assert 'href="look.html"' not in (run / "report.html").read_text()

    done = call("look", str(run))
    assert done.exit_code == 0, done.stderr
    page = (run / "look.html").read_text()
    # In the recipe's order, the reference first.
    assert page.index("Transformer, seed 0") < page.index("DIFF V1, seed 0")
    assert "answer: " in page and "its fact" in page
    call("report", str(run))
    assert 'href="look.html"' in (run / "report.html").read_text()


def test_explain(project: Path) -> None:
    told = parsed("explain", "small.toml", "--json")
    assert told["tokens"] == 32 and set(told["costs"]) == {"Transformer", "DIFF V1"}
    assert told["costs"]["DIFF V1"]["parameters"] > told["costs"]["Transformer"]["parameters"] > 0
    (situations,) = told["attention"]["DIFF V1"].values()
    for backends in situations.values():
        assert sum(found["auto"] for found in backends.values()) == 1
        for found in backends.values():
            assert (found["plan"] is None) == (found["refused"] is not None)


def test_a_page_of_a_run_takes_no_other_options(run: Path) -> None:
    for arguments in (["--mark", "mat"], ["--out", "x.png"]):
        done = call_failing("look", str(run), *arguments)
        assert "--text" in done or "must end with .html" in done
    assert "'nowhere' is not a run, so it needs a text" in call_failing("look", "nowhere")


def call_failing(*arguments: str) -> str:
    with pytest.raises(ValueError) as error:
        call(*arguments)
    return str(error.value)


def test_a_run_has_its_results_without_the_page(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A page that cannot be made or written is said, and stops nothing."""
    from clearhead.cli import compare
    from clearhead.look import run_page

    said: list[str] = []
    monkeypatch.setattr(compare, "say", said.append)
    for error in (OSError(28, "No space left on device"), ValueError("too short")):

        def fails(*arguments: Any, error: Exception = error, **options: Any) -> Path:
            raise error

        monkeypatch.setattr(run_page, "make_run_page", fails)
        compare._look(run)
    assert len(said) == 2 and all(line.startswith("no page of attention maps: ") for line in said)
    assert "No space left" in said[0] and "too short" in said[1]

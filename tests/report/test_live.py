"""The report of a run that goes on: drawn again when it changes, served to this machine alone."""

import http.client
import json
import re
import shutil
import threading
from pathlib import Path
from urllib.parse import urlsplit

import pytest

from clearhead.report import build, live


@pytest.fixture
def going(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the example run with one job still training, and charts that cost nothing."""
    copy = tmp_path / "run"
    shutil.copytree(run, copy)
    set_state(copy, "training")
    monkeypatch.setattr(build, "render", lambda chart, inks, folder: "<svg></svg>")
    return copy


def set_state(run: Path, state: str) -> None:
    path = sorted(run.glob("arms/*/seed-*/status.json"))[0]
    (path.parent / "job.json").touch()
    path.write_text(json.dumps({**json.loads(path.read_text()), "state": state}))


def test_it_is_drawn_again_until_all_is_there(going: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pages = []

    def look(seconds: float) -> None:
        assert seconds == 3
        pages.append((going / "report.html").read_text())
        if len(pages) == 1:
            return
        if len(pages) == 2:
            # Nothing has changed since: nothing was drawn.
            (going / "report.html").write_text("as it was")
            return
        assert pages[2] == "as it was"
        set_state(going, "evaluated")

    monkeypatch.setattr(live.time, "sleep", look)
    said: list[str] = []
    live.watched(going, 3, said.append)
    last = (going / "report.html").read_text()
    assert len(said) == 1 and "every 3 seconds" in said[0]
    assert '<meta http-equiv="refresh" content="3">' in pages[0] and "1 training" in pages[0]
    assert "http-equiv" not in last and "trained and evaluated" in last


def test_a_file_that_is_being_written_is_left_for_the_next_look(
    going: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    metrics = sorted(going.glob("arms/*/seed-*/metrics.jsonl"))[0]
    whole = metrics.read_text()
    metrics.write_text('{"step": 1, "lo\n' + whole)

    def mend(seconds: float) -> None:
        metrics.write_text(whole)
        set_state(going, "evaluated")

    monkeypatch.setattr(live.time, "sleep", mend)
    said: list[str] = []
    live.watched(going, 1, said.append)
    assert said[0].startswith("not drawn this time: ") and metrics.name in said[0]
    assert (going / "report.html").exists()


@pytest.mark.parametrize("job", ["arms/v1/seed-0", "sizes/w16/v1/seed-0"])
def test_what_is_watched_ends_with_its_jobs(job: str, tmp_path: Path) -> None:
    """Of a comparison and of a scaling study."""
    folder = tmp_path / job
    folder.mkdir(parents=True)
    assert not live._ended(tmp_path)
    (folder / "job.json").touch()
    (folder / "status.json").write_text('{"state": "training"}')
    before = live._stamp(tmp_path)
    assert before and not live._ended(tmp_path)
    (folder / "status.json").write_text('{"state": "evaluated"}')
    assert live._stamp(tmp_path) != before and live._ended(tmp_path)


def test_only_the_report_and_its_charts_are_served_on_loopback(run: Path, tmp_path: Path) -> None:
    run = Path(shutil.copytree(run, tmp_path / "served"))
    (run / "look.html").write_text("maps")
    with live.served(run, 0) as address:
        where = urlsplit(address)
        assert where.hostname == "127.0.0.1" and where.port

        def get(path: str) -> tuple[int, bytes]:
            connection = http.client.HTTPConnection("127.0.0.1", where.port, timeout=10)
            connection.request("GET", path)
            answer = connection.getresponse()
            return answer.status, answer.read()

        assert get("/")[1] == get("/report.html")[1] == (run / "report.html").read_bytes()
        chart = sorted((run / "charts").glob("*.png"))[0]
        assert get("/look.html") == (200, b"maps")
        assert get(f"/charts/{chart.name}") == (200, chart.read_bytes())
        for path in (
            "/recipe.toml",
            "/arms/",
            "/charts/",
            "/../",
            "/charts/../recipe.toml",
            "/%2e%2e/x",
            "/.lock",
        ):
            assert get(path)[0] == 404, path
        with pytest.raises(OSError, match="cannot be used"), live.served(run, where.port):
            pass
    assert not [thread for thread in threading.enumerate() if "serve_forever" in thread.name]


def test_arms_that_never_saw_a_fact_have_no_headline_of_retrieval(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    copy = tmp_path / "run"
    shutil.copytree(run, copy)
    monkeypatch.setattr(build, "render", lambda chart, inks, folder: "<svg></svg>")

    def headers(shares: str) -> list[str]:
        text = (run / "recipe.toml").read_text()
        assert "\nneedle_share = 0." in text
        (copy / "recipe.toml").write_text(
            re.sub(r"\nneedle_share = [\d.]+", f"\nneedle_share = {shares}", text)
        )
        build.build_report(copy)
        found: list[str] = json.loads((copy / "summary.json").read_text())["table"]["headers"]
        return found

    with_facts = headers("0.2")
    without = headers("0.0")
    lost = set(with_facts) - set(without)
    assert len(lost) == 3 and any("exact match" in name for name in lost), lost
    assert any("bits per byte" in name for name in without)

"""The report in a real browser, at the width of a phone and of a desk: nothing overflows, fetches or complains."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome", "msedge")
CHROMIUM = next((path for name in NAMES if (path := shutil.which(name))), None)
FLAGS = [
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--hide-scrollbars",
    "--enable-logging=stderr",
    "--virtual-time-budget=4000",
]
# The page has no script; only the copy under test gets this one. A window has a smallest width, a frame has none.
MEASURE = """<script>
addEventListener("load", () => {
  const page = document.documentElement, charts = [...document.querySelectorAll("figure svg")];
  const wide = [...document.querySelectorAll("main *, header *")].filter(e =>
    !e.closest(".scroll, pre, svg") && e.getBoundingClientRect().right > page.clientWidth + 1);
  const found = {
    width: page.clientWidth, content: page.scrollWidth, wide: wide.map(e => e.tagName), title: document.title,
    charts: charts.length, flat: charts.filter(e => e.getBoundingClientRect().height < 60).length,
    dot: getComputedStyle(document.querySelector(".dot")).backgroundColor,
    line: getComputedStyle(document.querySelector("figure svg g[id*=line2d] path[clip-path]")).stroke,
    fetched: performance.getEntriesByType("resource").map(e => e.name)};
  parent.postMessage(JSON.stringify(found), "*");
});
</script>"""
FRAME = """<!doctype html><html><head><link rel="icon" href="data:,"></head><body>
<iframe src="page.html" style="width: {width}px; height: 900px; border: 0"></iframe>
<script>addEventListener("message", e => document.body.dataset.measured = e.data);</script></body></html>"""

pytestmark = pytest.mark.skipif(
    CHROMIUM is None, reason="no Chromium on this machine: the report is not rendered"
)


@pytest.mark.parametrize("width", [390, 1280])
def test_the_report_renders(run: Path, width: int, tmp_path: Path) -> None:
    (tmp_path / "page.html").write_text(
        (run / "report.html").read_text().replace("</body>", MEASURE + "</body>")
    )
    frame = tmp_path / "frame.html"
    frame.write_text(FRAME.format(width=width))
    profile = f"--user-data-dir={tmp_path / 'profile'}"
    done = subprocess.run(
        [str(CHROMIUM), *FLAGS, profile, "--window-size=1400,1000", "--dump-dom", frame.as_uri()],
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    measured = re.search(r'data-measured="([^"]*)"', done.stdout)
    assert measured is not None, done.stderr
    found = json.loads(measured[1].replace("&quot;", '"'))
    assert found["width"] == width
    assert (found["content"], found["wide"]) == (width, []), "only tables and code scroll sideways"
    assert found["title"] == "clearhead: demo"
    assert found["charts"] >= 12 and found["flat"] == 0
    assert found["dot"] not in ("rgba(0, 0, 0, 0)", "") and found["line"] not in ("none", ""), (
        "arms have a colour"
    )
    assert found["fetched"] == []
    assert "CONSOLE" not in done.stderr, done.stderr

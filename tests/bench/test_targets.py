"""Where `clearhead bench` writes: refused before anything is measured, and never onto half a line."""

import json
import math
from pathlib import Path

import pytest
from typer.testing import CliRunner

from clearhead.bench.records import append, check_target
from clearhead.cli.main import app


@pytest.mark.parametrize(
    ("out", "chart", "said"),
    [
        (".", False, "it is a directory; name a file"),
        ("found.png", True, r"name a file for the JSON lines, such as 'found\.jsonl'"),
        ("found.SVG", True, "where the chart would be drawn"),
        ("x" * 300, False, "cannot write to"),
    ],
)
def test_a_file_that_takes_no_lines_is_refused_at_once(
    out: str, chart: bool, said: str, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=said):
        check_target(tmp_path / out, chart=chart)
    check_target(tmp_path / "found.png", chart=False)
    check_target(tmp_path / "found.jsonl", chart=True)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "arguments", [["--rounds", "0"], ["--threads", "0"], ["--threads", str(2**40)], ["--rounds", "x"]]
)
def test_numbers_that_no_machine_has_are_refused(arguments: list[str]) -> None:
    done = CliRunner().invoke(app, ["bench", "decode", *arguments, "--list"])
    assert done.exit_code == 2 and "Traceback" not in done.output


def test_half_a_line_stays_a_line_of_its_own_and_nan_is_null(tmp_path: Path) -> None:
    path = tmp_path / "found.jsonl"
    path.write_bytes('{"peer": "é'.encode()[:-1])
    append(path, [{"peer": "a", "ratio": {"median": math.nan}}])
    append(path, [{"peer": "b", "gflops": math.inf}])
    lines = path.read_bytes().split(b"\n")
    assert len(lines) == 4 and lines[3] == b""
    assert json.loads(lines[1]) == {"peer": "a", "ratio": {"median": None}}
    assert json.loads(lines[2]) == {"peer": "b", "gflops": None}

"""No number of a table is cut: every table of the command line, at every width and where there is no terminal."""

import io
import json
import re
import string
from pathlib import Path

import pytest
from rich.console import Console

import clearhead.cli
from clearhead.cli import tables
from clearhead.cli.main import app
from clearhead.cli.results import print_results
from clearhead.cli.tables import WholeTable, results_console

ROOT = Path(__file__).parents[2]
NUMBER = re.compile(r"\S*\d\S*")


def printed(table: WholeTable, width: int) -> str:
    out = io.StringIO()
    Console(width=width, file=out, force_terminal=True, color_system=None, soft_wrap=True).print(table)
    return out.getvalue()


def example() -> WholeTable:
    table = WholeTable(
        "size and arm", *(f"number {letter}" for letter in string.ascii_uppercase[:7]), title="A run"
    )
    for row in range(3):
        cells = [
            f"{4_706_317 * 10**place + row:,} ({place}.{row} to [bold]{row}.75[/bold])" for place in range(7)
        ]
        table.add_row(f"w{row} Transformer of a very long name", *cells)
    return table


@pytest.mark.parametrize("width", [30, 40, 60, 79, 80, 100, 132, 200, 400])
def test_every_number_is_whole_and_on_one_line(width: int) -> None:
    text = printed(example(), width)
    numbers = {f"{4_706_317 * 10**place + row:,}" for place in range(7) for row in range(3)}
    assert numbers <= set(text.split())
    assert "…" not in text and text.count("A run") == 1
    assert max(map(len, text.splitlines())) <= width
    # What each line is about stands at its beginning in every part.
    assert len(re.findall(r"^ +w1", text, re.MULTILINE)) == len(re.findall(r"^ +size", text, re.MULTILINE))


def test_a_pipe_has_one_line_a_row(capsys: pytest.CaptureFixture[str]) -> None:
    results_console().print(example())
    lines = [line for line in capsys.readouterr().out.splitlines() if line.strip()]
    assert len(lines) == 1 + 2 + 3 and max(map(len, lines)) > 200


class Screen:
    """Terminals of several widths, for what a command prints as results."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.patch = monkeypatch

    def __call__(self, width: int, *arguments: str) -> str:
        out = io.StringIO()
        terminal = Console(
            width=width, file=out, force_terminal=True, color_system=None, soft_wrap=True, highlight=False
        )
        self.patch.setattr(tables, "results_console", lambda **_: terminal)
        app([*arguments], standalone_mode=False)
        return out.getvalue()


COMMANDS = {
    "plan": ("scale", str(ROOT / "recipes" / "scaling.toml"), "--plan"),
    "explain": ("explain", str(ROOT / "recipes" / "demo.toml")),
    "footprint": ("explain", str(ROOT / "recipes" / "paper" / "diff-3b.toml"), "--on", "8xh100"),
}


@pytest.mark.parametrize("command", COMMANDS)
def test_commands_print_the_same_numbers_at_any_width(command: str, monkeypatch: pytest.MonkeyPatch) -> None:
    screen = Screen(monkeypatch)
    whole = screen(1000, *COMMANDS[command])
    narrow = screen(80, *COMMANDS[command])
    assert set(NUMBER.findall(whole)) == set(NUMBER.findall(narrow))
    assert "…" not in narrow


def test_results_of_a_run_at_eighty_columns(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    headers = ["arm", *(f"measure {i}" for i in range(9))]
    rows = [[f"arm {row}", *(f"{row}.{i}1234567" for i in range(9))] for row in range(2)]
    summary = {"name": "run", "table": {"headers": headers, "rows": rows}, "state": "done", "answers": []}
    (tmp_path / "summary.json").write_text(json.dumps(summary))
    out = io.StringIO()
    terminal = Console(width=80, file=out, force_terminal=True, color_system=None, soft_wrap=True)
    monkeypatch.setattr(tables, "results_console", lambda **_: terminal)
    print_results(tmp_path)
    assert {cell for row in rows for cell in row[1:]} <= set(out.getvalue().split())


def test_tables_are_made_in_one_place() -> None:
    """The live display of jobs, which is no result, has its own; its test says what it shows in forty columns."""
    folder = Path(clearhead.cli.__file__).parent.parent
    makers = {
        p.name for p in folder.rglob("*.py") if re.search(r"rich(\.table)? import .*\bTable\b", p.read_text())
    }
    assert makers == {"tables.py", "progress.py"}

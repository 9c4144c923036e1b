"""The pages under docs/contributing as plugins: the file, the registry's line and the programs that each prints."""

import re
from pathlib import Path
from typing import NamedTuple

PAGES = Path(__file__).parents[2] / "docs" / "contributing"
BLOCK = re.compile(r'^```(?:python|text) title="([^"\n]+)"\n(.*?)^```', re.DOTALL | re.MULTILINE)
SHOWN = ("variant", "position", "engine", "kernel", "evaluation", "converter")


class Page(NamedTuple):
    """What a page tells its reader to write, and what it says will then run."""

    table: str
    name: str
    file: str
    target: str
    text: str
    use: str


def read(name: str) -> Page:
    """The blocks of docs/contributing/NAME.md by their titles."""
    blocks = BLOCK.findall((PAGES / f"{name}.md").read_text(encoding="utf-8"))
    (path, text), (table, line), *programs = blocks
    entry = re.fullmatch(r'"(\w+)": "([\w.:]+)"\n', line)
    assert entry, f"{name}.md: {line!r} is no line of the registry"
    assert programs and {title for title, _ in programs} <= {"check", "use"}
    file = path.removeprefix("src/clearhead/")
    return Page(table, entry[1], file, entry[2], text, "\n".join(program for _, program in programs))

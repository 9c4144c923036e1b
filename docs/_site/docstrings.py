"""How a docstring becomes Markdown: lines `name: what it is` are a list, columns of them too, the rest stays."""

import re
from typing import Any

import griffe

# `q, k`, `lam`, `B`: what an entry may be called. A sentence before a colon has spaces and no column.
ENTRY = re.compile(r"^(?P<name>`?[\w*]+`?(?:, `?[\w*]+`?)*)(?::|(?= {2,}\())\s+(?P<text>\S.*)$")
COLUMN = re.compile(r"\.? {4,}(?=[a-z_]+: {1,}\S)")
WORDS = {"Legend", "Source", "Sources", "Checked", "Masks", "Otherwise"}


def as_markdown(text: str) -> str:
    """Runs of entries as lists, each with its continuation lines; everything else as it was."""
    lines: list[str] = []
    in_list = False
    for line in text.splitlines():
        parts = COLUMN.split(line) if ENTRY.match(line) else [line]
        for part in parts:
            found = ENTRY.match(part)
            if found and found["name"] not in WORDS:
                if not in_list and lines and lines[-1]:
                    lines.append("")
                names = ", ".join(f"`{name.strip('`')}`" for name in found["name"].split(", "))
                lines.append(f"- {names}: {found['text']}")
                in_list = True
            elif in_list and part.startswith((" ", "\t")):
                lines.append(f"    {part.strip()}")
            else:
                if in_list and part:
                    lines.append("")
                in_list = False
                lines.append(part)
    return "\n".join(lines)


class Lists(griffe.Extension):
    """Rewrite every docstring once, when its object is read."""

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        if obj.docstring is not None:
            obj.docstring.value = as_markdown(obj.docstring.value)

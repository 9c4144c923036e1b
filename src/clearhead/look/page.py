"""The page: one HTML file with its data, styles and script in it, which needs no network."""

from __future__ import annotations

import json
from collections.abc import Sequence
from importlib.resources import files

from clearhead.look.view import View


def page(views: Sequence[View], title: str = "") -> str:
    """One model, or several beside each other on the same text."""
    folder = files("clearhead.look") / "templates"
    parts = {name: (folder / f"look.{name}").read_text(encoding="utf-8") for name in ("html", "css", "js")}
    # Nothing in a text may end the script that holds it.
    data = json.dumps([view.packed() for view in views], ensure_ascii=False).replace("<", "\\u003c")
    heading = title or " and ".join(view.name for view in views)
    return (
        parts["html"]
        .replace("{{title}}", _escaped(heading))
        .replace("{{css}}", parts["css"])
        .replace("{{js}}", parts["js"])
        .replace("{{data}}", data)
    )


def _escaped(text: str) -> str:
    return text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;").replace('"', "&quot;")

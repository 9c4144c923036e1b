"""The page in a notebook."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import Any

from clearhead.look.opening import find_marks, kind_of, open_model, opens_with_bos, read_text
from clearhead.look.page import page
from clearhead.look.view import View, make_view
from clearhead.runs.files import write_text


class Shown:
    """A page that a notebook displays. `html` is the whole of it; `save` writes it to a file."""

    def __init__(self, views: Sequence[View], height: int) -> None:
        self.views, self.height = list(views), height
        self.html = page(self.views)

    def save(self, path: str | Path) -> Path:
        """Write the page; returns its path."""
        write_text(Path(path), self.html)
        return Path(path)

    def _repr_html_(self) -> str:
        # In a frame of its own: the page's styles and names stay out of the notebook's.
        return (
            f'<iframe srcdoc="{escape(self.html)}" style="width: 100%; height: {self.height}px; border: 0" '
            'title="Where each head looks"></iframe>'
        )

    def __repr__(self) -> str:
        told = "; ".join(f"{view.name}: {view.kind}, {len(view.text.ids)} tokens" for view in self.views)
        return f"<attention of {told}; display it in a notebook, or save(path)>"


def show(
    model: Any,
    text: str,
    *,
    tokenizer: Any = None,
    against: Any = None,
    marks: Sequence[str] = (),
    layers: Sequence[int] | None = None,
    heads: Sequence[int] | None = None,
    last: int | None = None,
    height: int = 900,
) -> Shown:
    """Where each head of `model` looks in `text`: what `clearhead look` draws, for a notebook.

    model, against: names as of `clearhead look`, or loaded models, which need `tokenizer`.
    marks: parts of the text whose share is shown. layers, heads: only these. last: only the last so many tokens.
    height: of the frame, in pixels.
    Raises ValueError for a loaded model without a tokenizer, and what `clearhead look` raises.
    """
    views = []
    for one in (model, *(() if against is None else (against,))):
        if isinstance(one, str | Path):
            loaded, own, name = open_model(str(one))
        elif tokenizer is None:
            raise ValueError(f"a loaded {type(one).__name__} needs tokenizer=, which reads the text for it")
        else:
            loaded, own, name = one, tokenizer, type(one).__name__
        read = read_text(own, text, opens_with_bos(loaded.config))
        views.append(
            make_view(
                loaded,
                read,
                name=name,
                kind=kind_of(loaded),
                marks=find_marks(read, list(marks)),
                layers=layers,
                heads=heads,
                last=last,
            )
        )
    return Shown(views, height)

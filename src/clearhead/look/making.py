"""From names of models and a text to a page or a picture on disk."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from pathlib import Path

from clearhead.look.figure import draw
from clearhead.look.opening import check_layers, find_marks, kind_of, open_source, opens_with_bos, read_text
from clearhead.look.page import page
from clearhead.look.view import BYTES, make_view
from clearhead.runs.files import write_text

PICTURES = (".pdf", ".png", ".svg")


def make_file(
    models: Sequence[str],
    text: str,
    out: Path,
    *,
    marks: Sequence[str] = (),
    layers: Sequence[int] | None = None,
    heads: Sequence[int] | None = None,
    last: int | None = None,
    say: Callable[[str], None] = lambda message: None,
) -> Path:
    """Write `out` and return it: a page with all of it, or a picture of what the last token takes.

    text: itself, or a file's path. Raises ValueError, before any weights are loaded, for an ending of `out` that is
    none of a page or picture, a directory that is not there, a file that is not UTF-8, a mark that is not in the text
    and a layer that a model does not have.
    """
    if out.suffix not in (".html", *PICTURES):
        raise ValueError(
            f"--out {str(out)!r} must end with .html for a page or {', '.join(PICTURES)} for a picture"
        )
    if not out.absolute().parent.is_dir():
        raise ValueError(f"--out {str(out)!r}: there is no directory {str(out.absolute().parent)!r}")
    written = _written(text)
    opened = []
    for source in models:
        loader, name = open_source(source)
        check_layers(loader.config, layers)
        read = read_text(loader.tokenizer, written, opens_with_bos(loader.config))
        opened.append((loader, name, read, find_marks(read, list(marks))))
    views = []
    for loader, name, read, found in opened:
        model = loader.subject.model
        say(f"{name}: reading {len(read.ids):,} tokens")
        views.append(
            make_view(
                model,
                read,
                name=name,
                kind=kind_of(model),
                marks=found,
                layers=layers,
                heads=heads,
                # A picture is of the last token's row alone, and leaves nothing of it out.
                last=last if out.suffix == ".html" else 1,
                limit=BYTES // len(models),
                every_key=out.suffix != ".html",
            )
        )
        del model
        vars(loader).pop("subject")  # The next model needs the memory.
    if out.suffix == ".html":
        write_text(out, page(views))
    else:
        draw(views, out)
    return out


def _written(text: str) -> str:
    """The text, or what is in the file of that name."""
    try:
        text.encode("utf-8")
        path = Path(text)
        if not path.is_file():
            if re.fullmatch(r"\S+\.[A-Za-z]\w{0,5}", text):
                raise ValueError(f"--text {text!r} looks like a file, and there is none")
            found = text
        else:
            found = path.read_text(encoding="utf-8")
    except UnicodeEncodeError:
        raise ValueError("--text holds bytes that are no UTF-8 text") from None
    except UnicodeDecodeError as error:
        raise ValueError(f"--text {text!r} is not UTF-8 ({error.reason} at byte {error.start})") from None
    except OSError:
        # Too long for a name, so a text.
        found = text
    if not found.strip():
        raise ValueError("--text is empty; give a text or the path of a file that holds one")
    return found

"""`clearhead look`: a page on which one sees where each head of a model looks, token by token."""

from pathlib import Path
from typing import Annotated

import typer

from clearhead.cli.console import say


def command(
    model: Annotated[
        str,
        typer.Argument(
            help="A job of a run, a directory with a Hugging Face model, a GGUF file, or a hub id.",
            show_default=False,
        ),
    ],
    text: Annotated[
        str, typer.Option(help="The text, or the path of a file that holds it.", show_default=False)
    ],
    against: Annotated[
        str | None,
        typer.Option(help="A second model, beside the first on the same text.", show_default="none"),
    ] = None,
    mark: Annotated[
        list[str] | None,
        typer.Option(
            help="A part of the text whose share is shown, such as an answer; may be given several times.",
            show_default=False,
        ),
    ] = None,
    layer: Annotated[
        list[int] | None,
        typer.Option(help="Only this layer; may be given several times.", show_default="all"),
    ] = None,
    head: Annotated[
        list[int] | None, typer.Option(help="Only this head; may be given several times.", show_default="all")
    ] = None,
    last: Annotated[
        int | None,
        typer.Option(
            min=1, help="Only the last so many tokens can be chosen.", show_default="as many as fit"
        ),
    ] = None,
    out: Annotated[Path, typer.Option(help="The page, or a picture: .html, .pdf, .png or .svg.")] = Path(
        "look.html"
    ),
) -> None:
    """Draw where each head looks: both softmax maps and their difference, on any text, in one file."""
    from clearhead.look.making import make_file

    made = make_file(
        [model, *([against] if against else [])],
        text,
        out,
        marks=mark or [],
        layers=layer or None,
        heads=head or None,
        last=last,
        say=say,
    )
    size = made.stat().st_size
    say(f"{made}: {size / 1e6:.1f} MB" if size >= 1e6 else f"{made}: {size / 1e3:.0f} kB")

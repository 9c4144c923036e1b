"""`clearhead look`: a page on which one sees where each head of a model looks, token by token."""

from pathlib import Path
from typing import Annotated

import typer

from clearhead.cli.console import say


def command(
    model: Annotated[
        str,
        typer.Argument(
            help="A run or a job of it, a directory with a Hugging Face model, a GGUF file, or a hub id.",
            show_default=False,
        ),
    ],
    text: Annotated[
        str | None,
        typer.Option(
            help="The text, or the path of a file that holds it.",
            show_default="for a run, a document of its needle evaluation",
        ),
    ] = None,
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
    out: Annotated[
        Path | None,
        typer.Option(help="The page, or a picture: .html, .pdf, .png or .svg.", show_default="look.html"),
    ] = None,
) -> None:
    """Draw where each head looks: both softmax maps and their difference, on any text, in one file.

    `clearhead look RUN` alone draws all arms of a run beside each other, on a document with a hidden fact.
    """
    if text is None:
        made = _run_page(model, out, {"--against": against, "--mark": mark, "--layer": layer, "--head": head})
    else:
        from clearhead.look.making import make_file

        made = make_file(
            [model, *([against] if against else [])],
            text,
            out or Path("look.html"),
            marks=mark or [],
            layers=layer or None,
            heads=head or None,
            last=last,
            say=say,
        )
    size = made.stat().st_size
    say(f"{made}: {size / 1e6:.1f} MB" if size >= 1e6 else f"{made}: {size / 1e3:.0f} kB")


def _run_page(run: str, out: Path | None, options: dict[str, object]) -> Path:
    given = [name for name, value in options.items() if value]
    if given or not (Path(run) / "recipe.toml").exists():
        what = f"{given[0]} needs" if given else f"{run!r} is not a run, so it needs"
        raise ValueError(f"{what} a text to look at: --text FILE or --text 'some words'")
    if out is not None and out.suffix != ".html":
        raise ValueError(f"--out {str(out)!r} must end with .html for the page of a run")
    from clearhead.look.run_page import make_run_page

    return make_run_page(Path(run), out=out, say=say)

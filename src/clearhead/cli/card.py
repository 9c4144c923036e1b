"""`clearhead card`: a model card beside a model."""

from pathlib import Path
from typing import Annotated

import typer

from clearhead.cli.console import say


def command(
    model: Annotated[
        Path, typer.Argument(help="A model directory, or the job directory it is in.", show_default=False)
    ],
    name: Annotated[
        str | None, typer.Option(help="Title of the card.", show_default="that of the run or directory")
    ] = None,
    licence: Annotated[
        str | None,
        typer.Option("--license", help="Such as apache-2.0.", show_default="that of a LICENSE file"),
    ] = None,
    replace: Annotated[
        bool, typer.Option("--replace", help="Also replace a README.md that was not made by this command.")
    ] = False,
) -> None:
    """Write README.md with Hugging Face's header: what the model is, data, recipe, results, licence, how to load it."""
    from clearhead.report.card import write_card

    say(f"card: {write_card(model, name=name, licence=licence, replace=replace)}")

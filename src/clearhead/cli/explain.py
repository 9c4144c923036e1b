"""`clearhead explain`: what a model costs and how its attention will be run, before anything is trained."""

from pathlib import Path
from typing import Annotated

import typer


def command(
    subject: Annotated[
        Path, typer.Argument(help="A recipe, or a directory with a trained model.", show_default=False)
    ],
) -> None:
    """Print parameters, FLOPs per token, cache bytes per token, and the attention plan with every refusal."""

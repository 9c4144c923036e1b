"""`clearhead convert`: a checkpoint from elsewhere into this library's, or one of this library's into another's."""

from pathlib import Path
from typing import Annotated

import typer

from clearhead.cli.console import interruptible, say


def command(
    source: Annotated[
        str,
        typer.Argument(
            help="A model directory, a .safetensors or .gguf file, or a hub id.", show_default=False
        ),
    ],
    out: Annotated[Path, typer.Option(help="The new directory.", show_default="none, it must be given")],
    to: Annotated[
        str, typer.Option(help="The format: clearhead, llama, diff_llama or serving.")
    ] = "clearhead",
    attention: Annotated[
        str | None,
        typer.Option(help="Another attention, for softmax models.", show_default="the source's"),
    ] = None,
) -> None:
    """Convert SOURCE, compare the logits of both on text, and say how far they agree; a mismatch leaves no output."""
    from transformers.utils.logging import disable_progress_bar

    from clearhead.convert.run import convert

    disable_progress_bar()
    with interruptible("interrupted; nothing was kept, and the same command begins again"):
        convert(source, out, to=to, attention=attention, say=say)
    say(f"model: {out}")

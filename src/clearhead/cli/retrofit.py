"""`clearhead retrofit`: differential attention in a plain checkpoint, its function unchanged at first."""

from pathlib import Path
from typing import Annotated

import typer

from clearhead.cli.console import interruptible, say


def command(
    source: Annotated[
        str,
        typer.Argument(
            help="A plain softmax model: a directory, a .safetensors or .gguf file, or a hub id.",
            show_default=False,
        ),
    ],
    out: Annotated[Path, typer.Option(help="The new directory.", show_default="none, it must be given")],
    attention: Annotated[
        str,
        typer.Option(
            help="differential_v2, differential (V1, with the model's own values), dex or diff_lora.",
            show_default="none, it must be given",
        ),
    ],
    init: Annotated[
        str | None,
        typer.Option(
            help="How it begins. V2: mirror, closed. V1: mirror, random. DEX: annealed. DiffLoRA: warmup, published.",
            show_default="the first",
        ),
    ] = None,
    layers: Annotated[
        str, typer.Option(help="all, upper (the upper half), alternate (every second) or numbers: 0,3,5.")
    ] = "all",
    option: Annotated[
        list[str] | None,
        typer.Option(help="An option of the attention, name=value; may be given again.", show_default="none"),
    ] = None,
    heads: Annotated[
        float, typer.Option(help="DEX: the share of each layer's heads, those with the highest entropy.")
    ] = 0.5,
    text: Annotated[
        Path | None, typer.Option(help="DEX: what entropy is measured on.", show_default="a short text")
    ] = None,
    seed: Annotated[int, typer.Option(help="Of what is drawn.")] = 0,
) -> None:
    """Put another attention into SOURCE, compare the logits of both on text, and say what is new."""
    from transformers.utils.logging import disable_progress_bar

    from clearhead.convert.retrofit import RetrofitPlan, layer_numbers, retrofit
    from clearhead.runs.recipe_io import option_values

    disable_progress_bar()
    plan = RetrofitPlan(
        attention=attention,
        init=init,
        layers=layer_numbers(layers),
        options=option_values(option or []),
        heads=heads,
        text=None if text is None else _read(text),
        seed=seed,
    )
    with interruptible("interrupted; nothing was kept, and the same command begins again"):
        retrofit(source, out, plan, say=say)
    say(f"model: {out}")


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else f"not UTF-8 at byte {error.start}"
        raise ValueError(f"--text {str(path)!r} cannot be read ({reason})") from error

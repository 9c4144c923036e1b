"""`clearhead generate`: let a trained model continue a text."""

from pathlib import Path
from typing import Annotated

import typer


def command(
    model: Annotated[
        Path, typer.Argument(help="A model directory, or the job directory it is in.", show_default=False)
    ],
    prompt: Annotated[str, typer.Argument(help="The text to continue.", show_default=False)],
    max_new_tokens: Annotated[int, typer.Option(min=1)] = 128,
    temperature: Annotated[float, typer.Option(min=0.0, help="0 takes the likeliest token.")] = 0.0,
    top_p: Annotated[float, typer.Option(min=0.0, max=1.0)] = 1.0,
    seed: int = 0,
) -> None:
    """Print PROMPT and the model's continuation."""
    from clearhead.cli.models import load_model

    network, tokenizer = load_model(model)
    import torch

    torch.manual_seed(seed)
    bos = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
    ids = torch.tensor([bos + tokenizer.encode(prompt, add_special_tokens=False)])
    if ids.numel() == 0:
        raise ValueError(
            "the prompt is empty and the tokenizer has no beginning-of-text token; give some text"
        )
    sampling = (
        {"do_sample": True, "temperature": temperature, "top_p": top_p}
        if temperature
        else {"do_sample": False}
    )
    produced = network.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=max_new_tokens,
        pad_token_id=tokenizer.pad_token_id,
        **sampling,
    )
    print(tokenizer.decode(produced[0], skip_special_tokens=True))

"""`clearhead explain`: what a model costs and how its attention is run, before anything is trained."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from clearhead.core.dispatch import Problem
    from clearhead.models import ClearheadConfig

# Backends outside the registry that people ask about.
BESIDES = ("flash_attention_2",)


def command(
    subject: Annotated[
        Path, typer.Argument(help="A recipe, or a directory with a trained model.", show_default=False)
    ],
    overrides: Annotated[list[str] | None, typer.Argument(help="Overrides of the recipe.")] = None,
    arm: Annotated[str | None, typer.Option(help="Only this arm of the recipe.", show_default="all")] = None,
    context: Annotated[
        int | None, typer.Option(min=1, help="Tokens of a row.", show_default="as trained")
    ] = None,
    device: Annotated[str, typer.Option(help="cpu, cuda, ...")] = "cpu",
    dtype: Annotated[str, typer.Option(help="float32, bfloat16 or float16")] = "float32",
) -> None:
    """Print parameters, FLOPs and cache bytes per token, and how each engine would run the attention, or why not."""
    import torch
    from rich.console import Console
    from rich.markup import escape

    floats = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
    if dtype not in floats:
        raise ValueError(f"--dtype {dtype!r} is none of {', '.join(floats)}")
    models, length = _models(subject, overrides or [], arm)
    length = context or length
    console = Console(highlight=False, soft_wrap=True)
    console.print(_costs(models, length, floats[dtype]))
    console.print(
        '\n"<- auto" marks what models take by themselves: attn_implementation="clearhead", the default.'
    )
    if device == "cpu":
        console.print(f"The CPU kernel: {escape(_cpu_kernel())}.")
    for name, config in models.items():
        console.print(f"\n[bold]{escape(name)}[/bold]: {config.attention} {config.attention_options or ''}")
        for situation, problem in _problems(config, length, device, floats[dtype]).items():
            console.print(f"  {situation}, {dtype} on {device}")
            for line in _plans(problem):
                console.print(f"    {line}")


def _models(subject: Path, overrides: list[str], arm: str | None) -> "tuple[dict[str, ClearheadConfig], int]":
    """Configurations by name, and the row length they are trained with."""
    if subject.suffix == ".toml":
        from clearhead.models import ClearheadConfig
        from clearhead.runs.recipe_io import load_recipe
        from clearhead.train.comparison import check_models

        recipe = load_recipe(subject, overrides)
        check_models(recipe)
        arms = recipe.arms if arm is None else [recipe.arm(arm)]
        vocabulary = recipe.tokenizer.vocab_size
        return {
            found.name: ClearheadConfig(vocab_size=vocabulary, **recipe.model_of(found)) for found in arms
        }, recipe.data.length
    from transformers import AutoConfig

    import clearhead.models  # noqa: F401  registers the family with the Auto classes
    from clearhead.cli.models import model_directory

    config = AutoConfig.from_pretrained(model_directory(subject))
    if config.model_type != "clearhead":
        raise ValueError(
            f"{str(subject)!r} is a {config.model_type!r} model; explain knows clearhead models and recipes"
        )
    return {str(subject): config}, config.max_position_embeddings


def _costs(models: "dict[str, ClearheadConfig]", length: int, dtype: object) -> object:
    import torch
    from rich.markup import escape
    from rich.table import Table

    from clearhead.models.cost import forward_flops_per_token, kv_bytes_per_token, parameters

    assert isinstance(dtype, torch.dtype)
    table = Table()
    table.add_column("model")
    for column in (
        "parameters",
        "beyond the first",
        f"FLOPs/token (forward, {length} tokens)",
        "KV-cache bytes/token",
    ):
        table.add_column(column, justify="right")
    counts = {name: parameters(config) for name, config in models.items()}
    first = next(iter(counts.values()))
    for name, config in models.items():
        table.add_row(
            escape(name),
            f"{counts[name]:,}",
            f"{counts[name] - first:+,}",
            f"{forward_flops_per_token(config, length):,}",
            f"{kv_bytes_per_token(config, dtype):,}",
        )
    return table


def _problems(config: "ClearheadConfig", length: int, device: str, dtype: object) -> "dict[str, Problem]":
    """The attention problems of a model's life, by a description."""
    from dataclasses import replace

    import torch

    from clearhead.core.attend import problem_of
    from clearhead.core.heads import Heads
    from clearhead.core.masks import MaskSpec

    variant = config.make_variant(0)
    sizes = variant.sizes

    def problem(queries: int, mask: MaskSpec, *, training: bool = False, maps: bool = False) -> "Problem":
        def meta(heads: int, tokens: int, width: int) -> torch.Tensor:
            return torch.empty(1, heads, tokens, width, dtype=dtype, device="meta")  # type: ignore[call-overload]

        heads = Heads(
            q=tuple(meta(sizes.heads, queries, sizes.key_width) for _ in range(sizes.query_streams)),
            k=tuple(meta(sizes.kv_heads, length, sizes.key_width) for _ in range(sizes.key_streams)),
            v=meta(sizes.kv_heads, length, sizes.value_width),
        )
        return replace(problem_of(heads, mask, variant.mix, maps), device=device, needs_grad=training)

    # In a mix of layers, those with slopes: fewer backends have them.
    biased = [found for p in config.make_positions().values() if (found := p.slopes(sizes.heads)) is not None]
    causal = MaskSpec(is_causal=True, slopes=biased[0] if biased else None)
    documents = replace(causal, documents=torch.zeros(1, length, dtype=torch.long, device="meta"))
    return {
        f"training on packed rows of {length} tokens": problem(length, documents, training=True),
        f"reading a prompt of {length} tokens": problem(length, causal),
        f"generating token {length} from the cache": problem(1, causal),
        "looking at attention maps": problem(length, causal, maps=True),
    }


def _cpu_kernel() -> str:
    from clearhead.kernels.cpu import library

    reason = library.missing()
    return f"instruction set {library.load().isa()}" if reason is None else reason.removesuffix(".")


def _plans(problem: "Problem") -> list[str]:
    """One line a backend: how it would run the problem, or its reason not to; the one `auto` takes is marked."""
    from rich.markup import escape

    from clearhead.core.dispatch import plan
    from clearhead.registry import names

    chosen = plan(problem).backend.name
    lines = []
    for name in (*names("kernels"), *names("engines"), *BESIDES):
        try:
            text = str(plan(problem, name)).partition(": ")[2]
        except ValueError as error:
            # The reason, without the sentence around it.
            reason = str(error).partition(f"({name}: ")[2].removesuffix(")")
            text = f"[dim]refused: {escape(reason or str(error))}[/dim]"
        lines.append(f"{name:18} {text}{' [green]<- auto[/green]' if name == chosen else ''}")
    return lines

"""`clearhead explain`: what a model costs and how its attention is run, before anything is trained."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    import torch

    from clearhead.core.dispatch import AttentionProblem
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
    device: Annotated[
        str, typer.Option(help="cpu, cuda, ... A GPU that is not here by its capability: cuda:sm_90.")
    ] = "cpu",
    dtype: Annotated[str, typer.Option(help="float32, bfloat16 or float16")] = "float32",
    on: Annotated[
        str | None,
        typer.Option(
            help="Devices to train on, such as 8xh100: memory of each and least time, by a model.",
            show_default="none",
        ),
    ] = None,
    sharding: Annotated[
        str, typer.Option(help="With --on: fsdp, or none for all of the model on every device.")
    ] = "fsdp",
    rows: Annotated[int, typer.Option(min=1, help="With --on: rows that a device takes at a time.")] = 1,
) -> None:
    """Print parameters, FLOPs and cache bytes per token, and how each engine would run the attention, or why not.

    With --on, what a training takes of each of those devices instead of the engines.
    """
    from dataclasses import replace

    import torch
    from rich.console import Console
    from rich.markup import escape

    from clearhead.core.capability import parse_device

    floats = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
    if dtype not in floats:
        raise ValueError(f"--dtype {dtype!r} is none of {', '.join(floats)}")
    try:
        place, capability = parse_device(device)
    except ValueError as error:
        raise ValueError(f"--device {error}") from None
    models, length = _models(subject, overrides or [], arm)
    length = context or length
    console = Console(highlight=False, soft_wrap=True)
    if on is not None and subject.suffix != ".toml":
        raise ValueError(f"--on is for recipes, which say how a model is trained; {str(subject)!r} is none")
    console.print(_costs(models, length, floats[dtype]))
    if on is not None:
        from clearhead.cli.footprint import print_footprint
        from clearhead.runs.recipe_io import load_recipe

        print_footprint(models, load_recipe(subject, overrides or []), on, sharding, rows, length)
        return
    console.print(
        '\n"<- auto" marks what models take by themselves: attn_implementation="clearhead", the default.'
    )
    if place.type == "cpu":
        console.print(f"The CPU kernel: {escape(_cpu_kernel())}.")
    for name, config in models.items():
        for layer, title in _kinds(config).items():
            console.print(f"\n[bold]{escape(name)}[/bold]: {escape(title)}")
            for situation, problem in _problems(config, layer, length, place, floats[dtype]).items():
                console.print(f"  {situation}, {dtype} on {device}")
                for line in _plans(replace(problem, capability=capability)):
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

    from clearhead.models.cost import forward_flops_per_token, kv_bytes, kv_bytes_per_token, parameters

    assert isinstance(dtype, torch.dtype)
    table = Table()
    table.add_column("model")
    for column in (
        "parameters",
        "beyond the first",
        f"FLOPs/token (forward, {length} tokens)",
        "KV-cache bytes/token",
        f"KV-cache bytes ({length} tokens)",
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
            f"{kv_bytes(config, length, dtype):,}",
        )
    return table


def _kinds(config: "ClearheadConfig") -> dict[int, str]:
    """The first layer of every kind whose attention is planned apart, and what it is."""
    sloped = {name for name, method in config.make_positions().items() if method.slopes(1) is not None}
    found: dict[tuple[object, ...], list[int]] = {}
    for layer, kind in enumerate(config.layer_kinds):
        found.setdefault(
            (kind.attention, str(kind.options), kind.window, kind.position in sloped), []
        ).append(layer)
    titles = {}
    for layers in found.values():
        kind = config.layer_kinds[layers[0]]
        title = f"{kind.attention} {kind.options or ''}".strip()
        if kind.window is not None:
            title += f", a window of {kind.window}"
        if len(found) > 1:
            title += f" (layers {', '.join(map(str, layers))})"
        titles[layers[0]] = title
    return titles


def _problems(
    config: "ClearheadConfig", layer: int, length: int, device: "torch.device", dtype: "torch.dtype"
) -> "dict[str, AttentionProblem]":
    """The attention problems of a model's life, by a description."""
    from dataclasses import replace

    import torch

    from clearhead.core.dispatch import AttentionProblem
    from clearhead.core.masks import MaskSpec

    variant, kind = config.make_variant(layer), config.layer_kinds[layer]

    def problem(
        queries: int, mask: MaskSpec, *, training: bool = False, maps: bool = False
    ) -> "AttentionProblem":
        return AttentionProblem.of_widths(
            variant.sizes,
            queries=queries,
            keys=length,
            mask=mask,
            mixing=variant.mixing,
            dtype=dtype,
            device=device,
            needs_grad=training,
            needs_maps=maps,
        )

    slopes = config.make_positions()[kind.position].slopes(variant.sizes.heads)
    causal = MaskSpec(is_causal=True, slopes=slopes, window=kind.window)
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


def _plans(problem: "AttentionProblem") -> list[str]:
    """One line a backend: how it would run the problem, or its reason not to; the one `auto` takes is marked."""
    from rich.markup import escape

    from clearhead.core.dispatch import load_backend, plan
    from clearhead.registry import names

    automatic = plan(problem)
    passed_over = dict(automatic.refusals)
    lines = []
    for name in (*names("kernels"), *names("engines"), *BESIDES):
        backend = load_backend(name)
        reason = backend.reason_against(problem)
        if reason is not None:
            text = f"[dim]refused: {escape(reason)}[/dim]"
        else:
            text = str(plan(problem, name)).partition(": ")[2]
            if backend is automatic.backend:
                text += " [green]<- auto[/green]"
            elif name in passed_over:
                text += f" [dim](not by itself: {escape(passed_over[name])})[/dim]"
        lines.append(f"{name:18} {text}")
    return lines

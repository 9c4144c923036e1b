"""`clearhead explain`: what a model costs and how its attention is run, before anything is trained."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from clearhead.cli.console import AsJson, print_json

if TYPE_CHECKING:
    import torch

    from clearhead.core.dispatch import AttentionProblem, Plan
    from clearhead.models import ClearheadConfig
    from clearhead.models.cost import WeightCounts

Costs = Mapping[str, Mapping[str, int]]
"""Model -> what it costs."""
Cautions = Mapping[str, Sequence[str]]
"""Model -> sentences on what a comparison with it does not show."""
Plans = Mapping[str, Mapping[str, Mapping[str, Mapping[str, Mapping[str, Any]]]]]
"""Model -> attention of its layers -> situation -> backend -> plan."""
# Backends outside the registry that people ask about, on a CPU and elsewhere.
BESIDES = ("flash_attention_2",)
BESIDES_ON_GPUS = ("flash_attention_2", "flash_attention_3", "flash_attention_4")
# Differential heads of V1 below which small models often showed no gain.
FEW_HEADS = 8


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
    as_json: AsJson = False,
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

    from clearhead.core.capability import parse_device
    from clearhead.models.cost import weight_counts

    floats = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
    if dtype not in floats:
        raise ValueError(f"--dtype {dtype!r} is none of {', '.join(floats)}")
    try:
        place, capability = parse_device(device)
    except ValueError as error:
        raise ValueError(f"--device {error}") from None
    if as_json and on is not None:
        raise ValueError("--json has no form for --on yet; leave out one of the two")
    models, length = _models(subject, overrides or [], arm)
    length = context or length
    counts = {name: weight_counts(config) for name, config in models.items()}
    costs = {
        name: _costs(config, counts[name].total, length, floats[dtype]) for name, config in models.items()
    }
    if on is not None:
        _explain_devices(subject, overrides or [], models, counts, costs, on, sharding, rows, length)
        return
    plans = {
        name: {
            f"{side}{title}": {
                situation: _plans(replace(problem, capability=capability))
                for situation, problem in _problems(part, layer, length, place, floats[dtype]).items()
            }
            for side, part in _sides(config).items()
            for layer, title in _kinds(part).items()
        }
        for name, config in models.items()
    }
    cautioned = {
        name: [f"{side}{caution}" for side, part in _sides(config).items() for caution in cautions(part)]
        for name, config in models.items()
    }
    kernel = _cpu_kernel() if place.type == "cpu" else None
    if as_json:
        print_json({"tokens": length, "dtype": dtype, "device": device, "cpu_kernel": kernel,
                    "costs": costs, "cautions": cautioned, "attention": plans})  # fmt: skip
        return
    _print(costs, cautioned, plans, f"{dtype} on {device}", length, kernel)


def _explain_devices(
    subject: Path,
    overrides: list[str],
    models: "dict[str, ClearheadConfig]",
    counts: "Mapping[str, WeightCounts]",
    costs: Costs,
    on: str,
    sharding: str,
    rows: int,
    length: int,
) -> None:
    """What a training takes of each device, for `--on`."""
    from clearhead.cli.footprint import print_footprint
    from clearhead.cli.tables import results_console
    from clearhead.runs.recipe_io import load_recipe

    if subject.suffix != ".toml":
        raise ValueError(f"--on is for recipes, which say how a model is trained; {str(subject)!r} is none")
    recipe = load_recipe(subject, overrides)
    if recipe.task != "causal":
        raise ValueError(f'--on knows causal language models; {str(subject)!r} has task = "{recipe.task}"')
    print_footprint(models, counts, recipe, on, sharding, rows, length)
    results_console().print("", _cost_table(costs, length))


def _print(
    costs: Costs, cautioned: Cautions, plans: Plans, where: str, length: int, kernel: str | None
) -> None:
    from rich.markup import escape

    from clearhead.cli.tables import results_console

    console = results_console()
    console.print(_cost_table(costs, length))
    console.print(
        '\n"<- auto" marks what models take by themselves: attn_implementation="clearhead", the default.'
    )
    if kernel is not None:
        console.print(f"The CPU kernel: {escape(kernel)}.")
    for name, sentences in cautioned.items():
        for caution in sentences:
            console.print(f"[yellow]{escape(name)}[/yellow]: {escape(caution)}.")
    for name, kinds in plans.items():
        for title, situations in kinds.items():
            console.print(f"\n[bold]{escape(name)}[/bold]: {escape(title)}")
            for situation, backends in situations.items():
                console.print(f"  {situation}, {where}")
                for backend, found in backends.items():
                    console.print(f"    {backend:18} {_line(found)}")


def _line(found: Mapping[str, Any]) -> str:
    """One backend's plan, or its reason not to run; the one that models take by themselves is marked."""
    from rich.markup import escape

    if found["refused"] is not None:
        return f"[dim]refused: {escape(found['refused'])}[/dim]"
    text = str(found["plan"])
    if found["remark"] is not None:
        text += f", {escape(found['remark'])}"
    if found["auto"]:
        return text + " [green]<- auto[/green]"
    if found["passed_over"] is not None:
        return text + f" [dim](not by itself: {escape(found['passed_over'])})[/dim]"
    return text


def cautions(config: "ClearheadConfig") -> list[str]:
    """What speaks against taking a comparison with this model for more than it is, in clauses."""
    from clearhead.models.encoder_config import ClearheadEncoderConfig
    from clearhead.models.start import standard_deviation

    found = []
    usual = standard_deviation(config.hidden_size)
    for kind in dict.fromkeys(config.layer_kinds):
        variant = config.make_variant(config.layer_kinds.index(kind))
        # V1 pairs the twin's heads; V2 keeps their number and doubles the queries.
        if (
            variant.mixing == "difference"
            and variant.sizes.key_streams == 2
            and variant.sizes.heads < FEW_HEADS
        ):
            heads, of = variant.sizes.heads, config.num_attention_heads
            found.append(
                f"{kind.attention} has {heads} differential heads ({of} heads in pairs): the authors' own design has "
                f"{FEW_HEADS} or more, and small models with fewer often showed no gain over the Transformer, or a loss"
            )
    if config.initializer_range < 0.5 * usual:
        found.append(
            f"initializer_range {config.initializer_range:g} is small for a width of {config.hidden_size}: a recipe "
            f"that does not set it takes {usual:.2g}"
        )
    if isinstance(config, ClearheadEncoderConfig) and config.mirrored:
        found.append(
            "all of its layers' logits are even in the distance between tokens, so it cannot tell what stands before a "
            "token from what stands behind it; one layer of softmax or slack with rope could"
        )
    return list(dict.fromkeys(found))


def _models(subject: Path, overrides: list[str], arm: str | None) -> "tuple[dict[str, ClearheadConfig], int]":
    """Configurations by name, and the row length they are trained with."""
    if subject.suffix == ".toml":
        from clearhead.models.tasks import task_of
        from clearhead.runs.recipe import FROM
        from clearhead.runs.recipe_io import load_recipe
        from clearhead.train.comparison import check_models

        recipe = load_recipe(subject, overrides)
        check_models(recipe)
        arms = recipe.arms if arm is None else [recipe.arm(arm)]
        if FROM in recipe.model:
            from clearhead.train.begun import config_of

            return {
                found.name: config_of(recipe, found, recipe.seeds[0]) for found in arms
            }, recipe.data.length
        task = task_of(recipe.task)
        return {
            found.name: task.planned(recipe, recipe.model_of(found)) for found in arms
        }, recipe.data.length
    from transformers import AutoConfig

    from clearhead.cli.models import model_directory
    from clearhead.data.opening import open_pretrained
    from clearhead.models.autoload import FAMILIES

    config: Any = open_pretrained(AutoConfig, model_directory(subject))
    if config.model_type not in FAMILIES:
        raise ValueError(
            f"{str(subject)!r} is a {config.model_type!r} model; explain knows clearhead models and recipes"
        )
    return {str(subject): config}, config.max_position_embeddings


def _costs(config: "ClearheadConfig", parameters: int, length: int, dtype: "torch.dtype") -> dict[str, int]:
    """Parameters, FLOPs of a token's forward pass and bytes of the cache, at `length` tokens."""
    from clearhead.models.cost import forward_flops_per_token, kv_bytes, kv_bytes_per_token

    return {
        "parameters": parameters,
        "forward_flops_per_token": forward_flops_per_token(config, length),
        "kv_bytes_per_token": kv_bytes_per_token(config, dtype),
        "kv_bytes": kv_bytes(config, length, dtype),
    }


def _cost_table(costs: Costs, length: int) -> object:
    from rich.markup import escape

    from clearhead.cli.tables import WholeTable

    table = WholeTable(
        "model",
        "parameters",
        "beyond the first",
        f"FLOPs/token (forward, {length} tokens)",
        "KV-cache bytes/token",
        f"KV-cache bytes ({length} tokens)",
    )
    first = next(iter(costs.values()))["parameters"]
    for name, found in costs.items():
        count, *others = found.values()
        table.add_row(escape(name), f"{count:,}", f"{count - first:+,}", *(f"{other:,}" for other in others))
    return table


def _sides(config: Any) -> "dict[str, ClearheadConfig]":
    """The stacks of a model, by what their attention is headed with; cross-attention has no plan of its own here."""
    if not config.is_encoder_decoder:
        return {"": config}
    encoder, decoder = config.sides
    return {"encoder: ": encoder, "decoder: ": decoder}


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
            title += f" (layer{'s' if len(layers) > 1 else ''} {', '.join(map(str, layers))})"
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
    plain = MaskSpec(is_causal=config.causal, slopes=slopes, window=kind.window)
    documents = replace(plain, documents=torch.zeros(1, length, dtype=torch.long, device="meta"))
    # In a cache of fixed size the query's position is a tensor, and the keys behind it are not written yet.
    fixed = replace(plain, offset=torch.zeros((), dtype=torch.long, device="meta"))
    if not config.causal:
        padding = torch.zeros(1, length, dtype=torch.bool, device="meta")
        return {
            f"training on packed rows of {length} tokens": problem(length, documents, training=True),
            f"reading texts of {length} tokens": problem(length, plain),
            f"reading texts padded to {length} tokens": problem(length, replace(plain, key_padding=padding)),
            "looking at attention maps": problem(length, plain, maps=True),
        }
    return {
        f"training on rows of {length} tokens": problem(length, plain, training=True),
        f"training on packed rows of {length} tokens": problem(length, documents, training=True),
        f"reading a prompt of {length} tokens": problem(length, plain),
        f"generating token {length} from the cache": problem(1, plain),
        f"generating from a cache of fixed size, {length} tokens": problem(1, fixed),
        "looking at attention maps": problem(length, plain, maps=True),
    }


def _cpu_kernel() -> str:
    from clearhead.kernels.cpu import library

    reason = library.missing()
    return f"instruction set {library.load().isa()}" if reason is None else reason.removesuffix(".")


def _remark(planned: "Plan", problem: "AttentionProblem") -> str | None:
    from clearhead.core.dispatch import Engine

    if not isinstance(planned.backend, Engine) or planned.lowering is None:
        return None
    return planned.backend.remark(problem, planned.lowering)


def _plans(problem: "AttentionProblem") -> dict[str, dict[str, Any]]:
    """Backend -> how it would run the problem, or its reason not to; whether `auto` takes it, or why not."""
    from clearhead.core.dispatch import load_backend, plan
    from clearhead.registry import names

    automatic = plan(problem)
    passed_over = dict(automatic.refusals)
    found: dict[str, dict[str, Any]] = {}
    besides = BESIDES if problem.device == "cpu" else BESIDES_ON_GPUS
    for name in (*names("kernels"), *names("engines"), *besides):
        backend = load_backend(name)
        reason = backend.reason_against(problem)
        planned = None if reason is not None else plan(problem, name)
        auto = reason is None and backend is automatic.backend
        found[name] = {
            "plan": None if planned is None else str(planned).partition(": ")[2],
            "remark": None if planned is None else _remark(planned, problem),
            "refused": reason,
            "auto": auto,
            "passed_over": None if auto or reason is not None else passed_over.get(name),
        }
    return found

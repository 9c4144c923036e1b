"""What `clearhead explain RECIPE --on 8xh100` prints: memory of a device, cache and least time, marked as a model."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from clearhead.models import ClearheadConfig
    from clearhead.models.cost import WeightCounts
    from clearhead.models.footprint.devices import Fleet
    from clearhead.models.footprint.memory import Footprint, Sharding
    from clearhead.runs.recipe import Recipe

# Lengths at which the cache is shown, as multiples of a row's.
MULTIPLES = (1, 4, 16)
WARNING = (
    "A model, not a measurement: sizes from the layers' own code, rates from datasheets. Memory leaves out what the "
    "allocator, communication and CUDA itself take; the time is what no run can be faster than."
)


def print_footprint(
    models: "dict[str, ClearheadConfig]",
    counts: "Mapping[str, WeightCounts]",
    recipe: "Recipe",
    on: str,
    sharding: str,
    rows: int,
    length: int,
) -> None:
    """A table a model; `counts` are the weights of each.

    Raises ValueError for an unknown device or sharding, and a step too small for the devices.
    """
    from rich.markup import escape

    from clearhead.cli.tables import results_console
    from clearhead.models.footprint.devices import fleet
    from clearhead.models.footprint.memory import ModelSize, footprint

    if sharding not in ("fsdp", "none"):
        raise ValueError(f"--sharding {sharding!r} is none of fsdp, none")
    kind: Sharding = "fsdp" if sharding == "fsdp" else "none"
    try:
        devices = fleet(on)
    except ValueError as error:
        raise ValueError(f"--on {error}") from None
    console = results_console()
    shared = "sharded over all devices (FSDP)" if kind == "fsdp" else "whole on every device"
    console.print(
        f"\n{devices.count} × {devices.device.title}, {devices.device.memory:g} GB each; bfloat16 with float32 "
        f"weights, gradients and moments, {shared}; {rows} × {length:,} tokens a device at a time.\n{WARNING}"
    )
    for name, config in models.items():
        found = footprint(
            config,
            devices,
            length=length,
            batch_tokens=recipe.train.batch_tokens,
            rows=rows,
            sharding=kind,
            documents=recipe.data.document_masks,
            size=ModelSize.counted(counts[name]),
        )
        console.print(f"\n[bold]{escape(name)}[/bold]")
        console.print(_table(config, found, devices, recipe, length))


def _table(
    config: "ClearheadConfig", found: "Footprint", on: "Fleet", recipe: "Recipe", length: int
) -> object:
    import torch

    from clearhead.cli.tables import WholeTable
    from clearhead.models.cost import kv_bytes

    table = WholeTable("one device", "as it is", "with checkpointing")
    for title, values in _memory_rows(found, on):
        table.add_row(title, *values)
    both = (found.plain[1], found.checkpointed[1])
    steps = recipe.train.steps
    table.add_row("least time of a step", *(f"{time.seconds:.3g} s ({time.limit})" for time in both))
    table.add_row(
        f"least time of {steps:,} steps", *(f"{time.seconds * steps / 86400:.3g} days" for time in both)
    )
    for multiple in MULTIPLES:
        size = kv_bytes(config, multiple * length, torch.bfloat16)
        table.add_row(f"KV cache, {multiple * length:,} tokens of one text", _gigabytes(size), "")
    return table


def _memory_rows(found: "Footprint", on: "Fleet") -> "Iterator[tuple[str, list[str]]]":
    memories = (found.plain[0], found.checkpointed[0])
    for title, name in (
        ("weights", "weights"),
        ("gradients", "gradients"),
        ("optimiser", "optimiser"),
        ("weights gathered", "gathered"),
        ("activations", "activations"),
        ("logits and loss", "loss"),
    ):
        yield title, [_gigabytes(getattr(memory, name)) for memory in memories]
    peaks = []
    for memory in memories:
        share = memory.peak / (on.device.memory * 1e9)
        verdict = f"{100 * share:.0f} %" if share <= 1 else "does not fit"
        peaks.append(f"{_gigabytes(memory.peak)} ({verdict})")
    yield "peak", peaks


def _gigabytes(size: float) -> str:
    return f"{size / 1e9:.2f} GB"

"""`clearhead scale`: a scaling study, from corpus to fitted laws."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from clearhead.cli.console import AsJson, interruptible, say

if TYPE_CHECKING:
    from clearhead.runs.recipe import Recipe


def command(
    recipe: Annotated[
        Path,
        typer.Argument(
            help="A recipe with a scaling table, such as recipes/scaling.toml.", show_default=False
        ),
    ],
    overrides: Annotated[
        list[str] | None,
        typer.Argument(help="Overrides of the recipe: train.workers=1 scaling.rate_power=0.5"),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(help="Run directory.", show_default="runs/NAME of the recipe"),
    ] = None,
    fresh: Annotated[
        bool, typer.Option("--fresh", help="Set an earlier run there aside and begin again.")
    ] = False,
    plan: Annotated[
        bool, typer.Option("--plan", help="Print sizes, rates and costs of the grid; train nothing.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Train every arm of RECIPE at every size and budget with every seed, fit scaling laws, write the report.

    Interrupted at any moment, the same command goes on where it was; what is finished is not run again.
    """
    from clearhead.runs.recipe_io import load_recipe

    loaded = load_recipe(recipe, overrides or [])
    if plan:
        print_plan(loaded)
        return
    with interruptible("interrupted: the same command goes on from the last checkpoints"):
        scale(loaded, out or Path("runs") / loaded.name, fresh=fresh, as_json=as_json)


def scale(recipe: "Recipe", run_dir: Path, *, fresh: bool, as_json: bool = False) -> None:
    """The command without its interruption."""
    from clearhead.cli.progress import watcher
    from clearhead.cli.results import finish
    from clearhead.train.scale import run_scaling

    with watcher() as watch:
        outcome = run_scaling(recipe, run_dir, watcher=watch, say=say, fresh=fresh)
    finish(outcome, run_dir, as_json=as_json)


def print_plan(recipe: "Recipe") -> None:
    """One line a size and arm: shape, N, learning rate, and what all its budgets cost for one seed."""
    from rich.markup import escape

    from clearhead.cli.tables import WholeTable, results_console
    from clearhead.runs.grid import family_job, sizes
    from clearhead.train.branching import measures
    from clearhead.train.scale import check_sizes

    check_sizes(recipe)
    columns = ("layers", "heads", "FFN", "N", "learning rate", "steps", "tokens", "FLOPs")
    table = WholeTable("size", "arm", *columns, left=2)
    tokens = flops = 0.0
    for size in sizes(recipe):
        for arm in recipe.arms:
            job = family_job(recipe, arm, size, recipe.seeds[0])
            found = measures(job)
            seen = job.steps * job.train.batch_tokens
            tokens, flops = tokens + seen, flops + seen * found["flops_per_token"]
            shape = (
                job.model[key] for key in ("num_hidden_layers", "num_attention_heads", "intermediate_size")
            )
            table.add_row(
                size.name,
                escape(arm.name),
                *map(str, shape),
                f"{found['non_embedding_parameters']:,}",
                f"{job.train.learning_rate:.2g}",
                f"{job.steps:,}",
                f"{seen:,}",
                f"{seen * found['flops_per_token']:.2e}",
            )
    console = results_console()
    console.print(table)
    seeds, budgets = len(recipe.seeds), ", ".join(f"{one:,}" for one in job.branches)
    console.print(
        f"Budgets of {budgets} tokens on one trunk. With {seeds} seeds: {tokens * seeds:,.0f} tokens, "
        f"{flops * seeds:.2e} training FLOPs. N: parameters without embeddings; steps: the trunk once and every decay."
    )

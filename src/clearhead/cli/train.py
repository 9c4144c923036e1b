"""`clearhead train`: one arm with one seed, in this process (or in each process of torchrun)."""

import os
from pathlib import Path
from typing import Annotated

import typer

from clearhead.cli.console import AsJson, interruptible, print_json, say


def command(
    recipe: Annotated[Path, typer.Argument(help="A recipe, such as recipes/demo.toml.", show_default=False)],
    overrides: Annotated[
        list[str] | None, typer.Argument(help="Overrides of the recipe, as for compare.")
    ] = None,
    arm: Annotated[str | None, typer.Option(help="Name of the arm.", show_default="the first")] = None,
    seed: Annotated[
        int | None, typer.Option(help="Seed of the training.", show_default="the recipe's first")
    ] = None,
    out: Annotated[
        Path | None, typer.Option(help="Run directory.", show_default="runs/NAME of the recipe")
    ] = None,
    fresh: Annotated[
        bool, typer.Option("--fresh", help="Set an earlier run there aside and begin again.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Train one arm of RECIPE. On several devices: torchrun --nproc-per-node 2 -m clearhead train RECIPE ...

    It goes on from its last checkpoint; `compare` on the same run directory takes the finished model over.
    """
    from clearhead.cli.progress import watcher
    from clearhead.runs.recipe_io import load_recipe

    loaded = load_recipe(recipe, overrides or [])
    run_dir = out or Path("runs") / loaded.name
    from clearhead.train.single import train_single

    with (
        interruptible("interrupted: the same command goes on from the last checkpoint"),
        watcher(evaluates=False) as watch,
    ):
        job_dir = train_single(
            loaded,
            run_dir,
            arm=arm or loaded.arms[0].name,
            seed=loaded.seeds[0] if seed is None else seed,
            fresh=fresh,
            say=say,
            watcher=watch,
        )
    if int(os.environ.get("RANK", "0")) == 0:
        say(f"model: {job_dir / 'model'}")
        if as_json:
            from dataclasses import asdict

            from clearhead.runs.files import read_object
            from clearhead.runs.status import read_status

            status = asdict(read_status(job_dir))
            print_json(
                {
                    "model": str(job_dir / "model"),
                    "status": status,
                    "cost": read_object(job_dir / "cost.json"),
                }
            )

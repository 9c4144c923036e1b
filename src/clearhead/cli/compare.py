"""`clearhead compare`: the whole comparison of a recipe, from corpus to report."""

from pathlib import Path
from typing import Annotated

import typer

from clearhead.cli.console import AsJson, interruptible, say


def command(
    recipe: Annotated[Path, typer.Argument(help="A recipe, such as recipes/demo.toml.", show_default=False)],
    overrides: Annotated[
        list[str] | None,
        typer.Argument(help="Overrides of the recipe: train.tokens=1000000 arms.0.train.learning_rate=2e-3"),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(help="Run directory.", show_default="runs/NAME of the recipe"),
    ] = None,
    fresh: Annotated[
        bool, typer.Option("--fresh", help="Set an earlier run there aside and begin again.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Train every arm of RECIPE with every seed, evaluate them, write the report and print the results.

    Interrupted at any moment, the same command goes on where it was; what is finished is not run again.
    """
    with interruptible("interrupted: the same command goes on from the last checkpoints"):
        compare(recipe, overrides or [], out, fresh=fresh, as_json=as_json)


def compare(
    recipe: Path, overrides: list[str], out: Path | None, *, fresh: bool, as_json: bool = False
) -> None:
    """The command without its interruption."""
    from clearhead.cli.progress import watcher
    from clearhead.cli.results import finish
    from clearhead.runs.recipe import RecipeError
    from clearhead.runs.recipe_io import load_recipe

    loaded = load_recipe(recipe, overrides)
    if loaded.scaling is not None:
        raise RecipeError(f"{recipe} has a table [scaling]: clearhead scale runs it")
    run_dir = out or Path("runs") / loaded.name
    from clearhead.train.comparison import run_comparison

    with watcher() as watch:
        outcome = run_comparison(loaded, run_dir, watcher=watch, say=say, fresh=fresh)
    for row in outcome.rows:
        if row.status.note:
            say(f"{row.task.label}, seed {row.task.job.seed}: {row.status.note}")
    _look(run_dir)
    finish(outcome, run_dir, as_json=as_json)


def _look(run_dir: Path) -> None:
    """The page that shows where each arm looks, which the report links to. A run has its results without it."""
    from clearhead.look.run_page import is_current, make_run_page
    from clearhead.runs.lock import RunError

    try:
        if not is_current(run_dir):
            make_run_page(run_dir, say=say)
    except (RunError, ValueError, OSError) as error:
        say(f"no page of attention maps: {error}")

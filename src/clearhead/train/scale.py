"""A scaling study: every arm at every size with every seed, all budgets of one off one trunk."""

from collections.abc import Mapping
from pathlib import Path

from clearhead.runs.grid import at_size, check_grid, family_directory, family_job, sizes, table_of
from clearhead.runs.recipe import Recipe
from clearhead.train.comparison import ComparisonOutcome, Grid, Say, check_models, run_comparison
from clearhead.train.pool import TrainingTask, Watcher

WORKER = "clearhead.train.branching"


def run_scaling(
    recipe: Recipe, run_dir: Path, *, watcher: Watcher, say: Say, fresh: bool = False
) -> ComparisonOutcome:
    """Bring the study in `run_dir` to completion, as `run_comparison` does a comparison.

    A [sweep] is run at the base shape; its rates are transferred to the sizes as the recipe's own would be.
    Raises RunError or RecipeError before anything is trained; a job that fails later is in the outcome.
    """
    grid = Grid(family_tasks, WORKER, check_sizes(recipe))
    return run_comparison(recipe, run_dir, watcher=watcher, say=say, fresh=fresh, grid=grid)


def check_sizes(recipe: Recipe) -> dict[str, int]:
    """Build every model of the grid without memory; returns the numbers in the models of a family by arm.

    They are those of the largest size, of the trunk and of every budget.

    RecipeError that names the size and the arm.
    """
    check_grid(recipe)
    most: dict[str, int] = {}
    for size in sizes(recipe):
        for arm, count in check_models(at_size(recipe, size)).items():
            models = 1 + len(table_of(recipe).budgets)
            most[arm] = max(most.get(arm, 0), count * models)
    return most


def family_tasks(
    recipe: Recipe, run_dir: Path, rates: Mapping[str, float] | None = None
) -> list[TrainingTask]:
    """One task an arm, size and seed; all of a seed before the next, so that a part of a study can be looked at."""
    return [
        TrainingTask(
            family_job(recipe, arm, size, seed, rates),
            run_dir / family_directory(size.name, arm.slug, seed),
            f"{arm.name} {size.name}",
        )
        for seed in recipe.seeds
        for size in sizes(recipe)
        for arm in recipe.arms
    ]

"""The grid of a scaling study: what one base shape, one base rate and one schedule become at each size and budget.

For a width w against the base width w₀ = model.hidden_size:

    heads          w / head_dim, the base's head_dim; key-value heads in the base's proportion
    layers         round(layers₀ · (w / w₀)^depth_power), at least 1
    FFN width      the base's in proportion (8/3 · w if it names none), rounded up to a multiple of 8
    learning rate  rate₀ · (w₀ / w)^rate_power, or tuned: learning_rate[i] · (the arm's rate / the recipe's)

The budgets of one arm, size and seed share a trunk of constant rate ("wsd"): each is the trunk up to its own
`Train.decay_start` and then its own decay, step for step what a training of that budget alone would have been. The
warm-up is train.warmup of the smallest budget's steps in all of them.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from clearhead.runs.recipe import Arm, Job, Recipe, RecipeError, Scaling, Train

# Keys of [model] that say the base shape.
SHAPE_KEYS = ("hidden_size", "num_hidden_layers", "num_attention_heads")
OWN_SHAPE_KEYS = (*SHAPE_KEYS, "num_key_value_heads", "head_dim", "intermediate_size")
LOSS = "language_modelling"


@dataclass(frozen=True)
class GridSize:
    """One size of the grid: its name in paths and labels, its width, and what it changes in [model]."""

    name: str
    width: int
    model: dict[str, Any]


def table_of(recipe: Recipe) -> Scaling:
    """The recipe's [scaling]; RecipeError without one."""
    if recipe.scaling is None:
        raise RecipeError(f"recipe {recipe.name!r} has no table [scaling]; clearhead compare runs it")
    return recipe.scaling


def check_grid(recipe: Recipe) -> None:
    """RecipeError that names the key for a grid whose budgets cannot share a trunk or whose sizes do not exist."""
    scaling, here = table_of(recipe), f"recipe {recipe.name!r}"
    for arm in recipe.arms:
        if found := [key for key in OWN_SHAPE_KEYS if key in arm.model]:
            raise RecipeError(
                f"{here}: arms ({arm.name}): model.{found[0]} is set by [scaling]; leave it out"
            )
        if found := [key for key in ("schedule", "decay", "warmup") if key in arm.train]:
            raise RecipeError(
                f"{here}: arms ({arm.name}): train.{found[0]} is the trunk's; set it in [train]"
            )
    if recipe.train.schedule != "wsd":
        raise RecipeError(
            f'{here}: train.schedule must be "wsd", a constant rate with a decay at the end, so that the budgets share '
            f"their trunk; it is {recipe.train.schedule!r}"
        )
    if recipe.data.pairs_first or recipe.train.stop_at_mastery:
        key = "data.pairs_first" if recipe.data.pairs_first else "train.stop_at_mastery"
        raise RecipeError(f"{here}: {key} would give each budget other rows; leave it out")
    if LOSS not in recipe.evaluate.suites:
        raise RecipeError(f"{here}: evaluate.suites must have {LOSS!r}, whose loss the laws are fitted to")
    sizes(recipe)
    smallest = _with(recipe.train, tokens=scaling.budgets[0])
    if smallest.decay_start <= _warmup_steps(recipe):
        raise RecipeError(
            f"{here}: scaling.budgets starts at {scaling.budgets[0]} tokens, {smallest.steps} steps, whose decay "
            f"begins at step {smallest.decay_start}, inside the warm-up of {_warmup_steps(recipe)}; make it larger"
        )


def sizes(recipe: Recipe) -> list[GridSize]:
    """Every size of the grid, the smallest first. RecipeError that names the key where a shape does not come out."""
    scaling, here = table_of(recipe), f"recipe {recipe.name!r}"
    for key in SHAPE_KEYS:
        if not isinstance(recipe.model.get(key), int):
            raise RecipeError(f"{here}: model.{key} is needed: the sizes grow from it")
    base = recipe.model
    width, heads = base["hidden_size"], base["num_attention_heads"]
    if "head_dim" not in base and width % heads:
        raise RecipeError(f"{here}: model.hidden_size is not a multiple of model.num_attention_heads")
    head_dim = base.get("head_dim", width // heads)
    inner = base.get("intermediate_size", 8 * width / 3)
    found = []
    for one in scaling.widths:
        if one % head_dim:
            raise RecipeError(f"{here}: scaling.widths: {one} is not a multiple of the head width {head_dim}")
        shape = {
            "hidden_size": one,
            "num_attention_heads": one // head_dim,
            "head_dim": head_dim,
            "num_hidden_layers": max(
                1, round(base["num_hidden_layers"] * (one / width) ** scaling.depth_power)
            ),
            "intermediate_size": math.ceil(round(inner * one / width, 6) / 8) * 8,
        }
        if "num_key_value_heads" in base:
            groups = base["num_key_value_heads"] * shape["num_attention_heads"] / heads
            if groups != round(groups):
                raise RecipeError(f"{here}: scaling.widths: {one} would have {groups:g} key-value heads")
            shape["num_key_value_heads"] = round(groups)
        found.append(GridSize(f"w{one}", one, shape))
    return found


def at_size(recipe: Recipe, size: GridSize) -> Recipe:
    """The recipe with its model at this size."""
    return recipe.model_copy(update={"model": {**recipe.model, **size.model}})


def rate(recipe: Recipe, arm: Arm, size: GridSize, swept: Mapping[str, float] | None = None) -> float:
    """The peak learning rate of an arm at a size. swept: base rates by arm from a sweep at the base shape."""
    scaling = table_of(recipe)
    base = float((swept or {}).get(arm.name, arm.train.get("learning_rate", recipe.train.learning_rate)))
    if scaling.learning_rate is not None:
        tuned = scaling.learning_rate[scaling.widths.index(size.width)]
        return tuned * base / recipe.train.learning_rate
    return base * float((recipe.model["hidden_size"] / size.width) ** scaling.rate_power)


def family_job(
    recipe: Recipe, arm: Arm, size: GridSize, seed: int, swept: Mapping[str, float] | None = None
) -> Job:
    """All budgets of one arm, size and seed as one job: that of the largest budget, with its branches."""
    scaling = table_of(recipe)
    job = at_size(recipe, size).for_arm(arm.name, seed, learning_rate=rate(recipe, arm, size, swept))
    largest = _with(job.train, tokens=scaling.budgets[-1])
    train = _with(largest, warmup=_warmup_steps(recipe) / largest.steps)
    return job.model_copy(update={"train": train, "branches": tuple(scaling.budgets)})


def trunk_job(job: Job) -> Job:
    """The part that the branches of `job` share: constant rate up to where the largest budget's decay begins."""
    steps = job.train.decay_start
    train = _with(
        job.train,
        tokens=steps * job.train.batch_tokens,
        schedule="constant",
        warmup=job.train.warmup * job.train.steps / steps,
    )
    evaluate = job.evaluate.model_copy(update={"suites": []})
    return job.model_copy(update={"train": train, "evaluate": evaluate})


def branch_job(job: Job, tokens: int) -> Job:
    """One budget of `job` as a training of its own."""
    train = _with(job.train, tokens=tokens)
    train = _with(train, warmup=job.train.warmup * job.train.steps / train.steps)
    return job.model_copy(update={"train": train, "branches": ()})


def branching_steps(job: Job) -> tuple[int, ...]:
    """The steps of a trunk at which its branches leave it."""
    return tuple(_with(job.train, tokens=tokens).decay_start for tokens in job.branches)


def family_directory(size: str, slug: str, seed: int) -> str:
    """Where all budgets of one arm, size and seed live, below the run directory."""
    return f"sizes/{size}/{slug}/seed-{seed}"


def branch_directory(tokens: int) -> str:
    """Where one budget lives, below its family's directory."""
    return f"tokens-{tokens}"


def _warmup_steps(recipe: Recipe) -> int:
    smallest = _with(recipe.train, tokens=table_of(recipe).budgets[0])
    return max(1, round(recipe.train.warmup * smallest.steps))


def _with(train: Train, **values: Any) -> Train:
    return train.model_copy(update=values)

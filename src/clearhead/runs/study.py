"""Reading a scaling study: the losses of its trained models as points for `clearhead.analysis.scaling`."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from clearhead.analysis.scaling.points import ScalingPoint
from clearhead.runs.files import read_object
from clearhead.runs.grid import LOSS, branch_directory, family_directory, sizes
from clearhead.runs.recipe import Recipe
from clearhead.runs.recipe_io import parse_recipe, read_toml
from clearhead.runs.results import Skipped, read_json, read_result
from clearhead.runs.status import read_status


@dataclass(frozen=True)
class Study:
    """A study's recipe, what has been measured of it, its families by state, and what is missing and why."""

    recipe: Recipe
    env: dict[str, Any]
    points: list[ScalingPoint]
    states: Counter[str]
    missing: list[str] = field(default_factory=list)


def is_study(directory: Path) -> bool:
    """Whether the run directory is one of `clearhead scale`."""
    written = directory / "recipe.toml"
    return written.exists() and "scaling" in read_toml(written)


def load_study(directory: Path) -> Study:
    """Everything on disk about a study. What is not there yet is missing, a broken file an error that names it."""
    written = directory / "recipe.toml"
    recipe = parse_recipe(read_toml(written), source=str(written))
    assert recipe.scaling is not None
    points, missing = [], []
    states: Counter[str] = Counter()
    for arm in recipe.arms:
        for size in sizes(recipe):
            for seed in recipe.seeds:
                folder = directory / family_directory(size.name, arm.slug, seed)
                states[read_status(folder).state] += 1
                for tokens in recipe.scaling.budgets:
                    found = _loss(folder / branch_directory(tokens))
                    if isinstance(found, float):
                        measures = read_object(folder / "size.json")
                        points.append(
                            ScalingPoint(
                                arm.name,
                                size.name,
                                seed,
                                measures["non_embedding_parameters"],
                                tokens,
                                measures["flops_per_token"] * tokens,
                                found,
                            )
                        )
                    elif found:
                        missing.append(f"{arm.name} {size.name}, seed {seed}, {tokens:,} tokens: {found}")
    return Study(recipe, read_json(directory / "env.json"), points, states, missing)


def _loss(branch: Path) -> float | str:
    """Nats a token of validation text, or why there is none; "" where nothing has been measured yet."""
    record = read_result(branch / "results" / f"{LOSS}.json")
    if not record:
        return ""
    values = record["values"]
    if (skipped := Skipped.read(values)) is not None:
        return skipped.reason
    return math.fsum(values["bits"]) * math.log(2) / int(values["tokens"])

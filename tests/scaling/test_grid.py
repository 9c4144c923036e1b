"""The grid grows by its rules, and what cannot share a trunk is said before anything runs."""

from pathlib import Path
from typing import Any

import pytest
import torch

from clearhead.runs.grid import (
    at_size,
    branch_job,
    branching_steps,
    check_grid,
    family_job,
    rate,
    sizes,
    trunk_job,
)
from clearhead.runs.recipe import RecipeError, Train
from clearhead.runs.recipe_io import dump_toml, load_recipe, parse_recipe
from clearhead.train.optimiser import course
from clearhead.train.scale import check_sizes
from tests.scaling.tiny import raw_recipe


def recipe(**changes: Any) -> Any:
    return parse_recipe(raw_recipe("text", **changes), source="test")


def test_shapes_and_rates_grow_by_the_rule() -> None:
    made = recipe(
        model={
            "hidden_size": 32,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "intermediate_size": 80,
        },
        scaling={"widths": [16, 32, 128], "budgets": [1280, 2560], "depth_power": 0.5, "rate_power": 0.5},
    )
    small, base, large = sizes(made)
    assert (small.name, base.name, large.name) == ("w16", "w32", "w128")
    assert base.model.items() >= made.model.items()
    assert large.model == {
        "hidden_size": 128,
        "num_attention_heads": 16,
        "num_key_value_heads": 8,
        "head_dim": 8,
        "num_hidden_layers": 4,
        "intermediate_size": 320,
    }
    assert small.model["num_hidden_layers"] == 1
    arm = made.arms[0]
    assert rate(made, arm, base) == made.train.learning_rate
    assert rate(made, arm, large) == pytest.approx(made.train.learning_rate / 2)
    assert rate(made, arm, large, {arm.name: 8e-3}) == pytest.approx(4e-3)
    tuned = recipe(scaling={"widths": [16, 32], "budgets": [1280], "learning_rate": [5e-3, 2e-3]})
    assert [rate(tuned, tuned.arms[0], size) for size in sizes(tuned)] == [5e-3, 2e-3]
    assert at_size(made, large).model["hidden_size"] == 128
    assert parse_recipe(load(dump_toml(made)), source="again") == made


def load(text: str) -> dict[str, Any]:
    import tomllib

    return tomllib.loads(text)


def test_budgets_are_one_course_until_they_decay() -> None:
    made = recipe(
        train={"batch_tokens": 64, "schedule": "wsd", "warmup": 0.2, "decay": 0.25, "min_lr_ratio": 0.1}
    )
    job = family_job(made, made.arms[0], sizes(made)[0], 0)
    assert job.branches == (1280, 2560) and job.train.tokens == 2560
    trunk = trunk_job(job)
    assert branching_steps(job) == (15, 30) and trunk.train.steps == 30
    assert job.steps == 30 + 5 + 10
    shared = [course(trunk.train)(step) for step in range(30)]
    assert shared[:5] == [0.25, 0.5, 0.75, 1.0, 1.0] and set(shared[3:]) == {1.0}
    for tokens, start, steps in ((1280, 15, 20), (2560, 30, 40)):
        branch = branch_job(job, tokens)
        assert branch.branches == () and (branch.train.decay_start, branch.train.steps) == (start, steps)
        whole = [course(branch.train)(step) for step in range(steps + 1)]
        assert whole[: start + 1] == [*shared, 1.0][: start + 1]
        assert whole[start + 1] < 1.0 and whole[-1] == pytest.approx(0.1)
        falls = torch.tensor(whole[start:]).diff()
        assert torch.allclose(falls, falls[:1].expand_as(falls), atol=1e-6)


def test_wsd_by_itself() -> None:
    found = course(
        Train(tokens=1000, batch_tokens=10, schedule="wsd", warmup=0.1, decay=0.5, min_lr_ratio=0.0)
    )
    assert [found(step) for step in (0, 9, 50, 75, 100)] == pytest.approx([0.1, 1.0, 1.0, 0.5, 0.0])


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"train": {"batch_tokens": 64}}, 'train.schedule must be "wsd"'),
        ({"data": {"length": 32, "pairs_first": 0.5, "pair_share": 0.1}}, "data.pairs_first would give"),
        ({"evaluate": {"suites": []}}, "must have 'language_modelling'"),
        ({"model": {"hidden_size": 16}}, "model.num_hidden_layers is needed"),
        ({"scaling": {"widths": [12], "budgets": [1280]}}, "12 is not a multiple of the head width 8"),
        ({"scaling": {"widths": [16], "budgets": [64, 1280]}}, "inside the warm-up"),
        ({"arms": [{"name": "A", "model": {"hidden_size": 8}}]}, "model.hidden_size is set by"),
        ({"arms": [{"name": "A", "train": {"schedule": "cosine"}}]}, "train.schedule is the trunk's"),
    ],
)
def test_what_cannot_be_a_grid(changes: dict[str, Any], said: str) -> None:
    with pytest.raises(RecipeError, match=said):
        check_grid(recipe(**changes))


def test_what_is_no_table() -> None:
    with pytest.raises(RecipeError, match="widths must rise"):
        recipe(scaling={"widths": [32, 16], "budgets": [1280]})
    with pytest.raises(RecipeError, match="learning_rate has 1 values; expected 2"):
        recipe(scaling={"widths": [16, 32], "budgets": [1280], "learning_rate": [1e-3]})


def test_the_recipe_of_the_study() -> None:
    made = load_recipe(Path(__file__).parents[2] / "recipes" / "scaling.toml")
    counts = check_sizes(made)
    assert set(counts) == {"Transformer", "DIFF V1", "DIFF V2", "CoCA"}
    assert len(sizes(made)) >= 5 and len(made.scaling.budgets) >= 3 and len(made.seeds) >= 2  # type: ignore[union-attr]

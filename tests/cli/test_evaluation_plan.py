"""The plan of `clearhead evaluate`: what will be measured of what, known before anything is loaded or written."""

from pathlib import Path

import pytest

from clearhead.cli.evaluation_plan import EvaluateArguments, ExternalPlan, TrainedPlan, plan_evaluation
from clearhead.runs.recipe import RecipeError

SUITE = """
[corpus]
source = "stdlib"
[evaluate]
suites = ["perplexity", "knowledge_conflicts"]
[evaluate.perplexity]
lengths = [64]
[evaluate.knowledge_conflicts]
data = "{sets}/conflicts.jsonl"
"""


@pytest.fixture
def suite(tmp_path: Path) -> Path:
    (tmp_path / "suite.toml").write_text(SUITE)
    return tmp_path / "suite.toml"


def external(asked: EvaluateArguments) -> ExternalPlan:
    plan = plan_evaluation(asked)
    assert isinstance(plan, ExternalPlan)
    return plan


def test_a_hub_model_is_read_by_default_with_what_needs_no_data() -> None:
    plan = external(EvaluateArguments("some-owner/some-model"))
    assert plan.directory == Path("runs/some-model") and plan.spec.corpus == "stdlib"
    assert dict(plan.options) == {"perplexity": {}, "passkey": {}} and not plan.left_out


def test_a_suite_file_gives_options_and_the_command_line_overrides_them(suite: Path, tmp_path: Path) -> None:
    asked = EvaluateArguments(
        "some-model", settings=["perplexity.documents=3"], file=suite, sets=tmp_path, out=tmp_path / "o"
    )
    plan = external(asked)
    assert plan.directory == tmp_path / "o"
    assert plan.options["perplexity"] == {"lengths": [64], "documents": 3}
    assert plan.options["knowledge_conflicts"] == {"data": f"{tmp_path}/conflicts.jsonl"}


def test_what_lacks_its_data_is_left_out_unless_it_is_given_some(suite: Path) -> None:
    plan = external(EvaluateArguments("some-model", file=suite))
    assert list(plan.options) == ["perplexity"] and "--sets" in plan.left_out["knowledge_conflicts"]
    given = external(
        EvaluateArguments("some-model", file=suite, settings=["knowledge_conflicts.data=own.jsonl"])
    )
    assert given.options["knowledge_conflicts"]["data"] == "own.jsonl" and not given.left_out
    with pytest.raises(
        RecipeError, match="no evaluation is left to run: knowledge_conflicts is left out: name"
    ):
        plan_evaluation(EvaluateArguments("some-model", suites=["knowledge_conflicts"], file=suite))


def test_tasks_of_the_harness_are_an_evaluation_like_others() -> None:
    plan = external(EvaluateArguments("some-model", lm_eval="hellaswag, arc_easy"))
    assert dict(plan.options) == {"lm_eval": {"tasks": ["hellaswag", "arc_easy"]}}


def test_jobs_that_were_trained_here_have_a_recipe_of_their_own(tmp_path: Path, suite: Path) -> None:
    job = tmp_path / "run" / "arms" / "plain" / "seed-0"
    (job / "model").mkdir(parents=True)
    (job / "job.json").write_text("{}")
    (job / "model" / "config.json").write_text("{}")
    (job / "status.json").write_text('{"state": "trained"}')
    (tmp_path / "run" / "recipe.toml").write_text("")
    plan = plan_evaluation(
        EvaluateArguments(str(tmp_path / "run"), suites=["passkey"], settings=["samples=3"])
    )
    assert plan == TrainedPlan((job,), ("passkey",), ("samples=3",))
    with pytest.raises(RecipeError, match="--config is for models not trained here"):
        plan_evaluation(EvaluateArguments(str(tmp_path / "run"), file=suite))


def test_an_unknown_evaluation_is_named_before_anything_else() -> None:
    with pytest.raises(ValueError, match="unknown evaluation 'passkeys': did you mean 'passkey'"):
        plan_evaluation(EvaluateArguments("some-model", suites=["passkeys"]))

"""A budget that decays off the trunk ends with the weights of a training of that budget alone, interrupted or not."""

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from clearhead.runs.grid import branch_directory, branch_job, family_directory, family_job, sizes
from clearhead.runs.recipe import Job, Recipe
from clearhead.runs.recipe_io import parse_recipe
from clearhead.runs.status import Status, read_status, write_status
from clearhead.runs.study import load_study
from clearhead.train import branching, scale, trainer
from clearhead.train.branching import run_family
from clearhead.train.pool import Silent, TrainingTask, place
from tests.cli.fake_worker import FAILS, FINE
from tests.scaling.tiny import raw_recipe
from tests.train import small


class Stopped(Exception):
    """Training was meant to end there."""


@pytest.fixture(scope="module", autouse=True)
def settings(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CLEARHEAD_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Recipe:
    corpus = small.write_corpus(tmp_path_factory.mktemp("project") / "corpus")
    return parse_recipe(raw_recipe(str(corpus)), source="test")


@pytest.fixture(scope="module")
def job(recipe: Recipe) -> Job:
    return family_job(recipe, recipe.arms[1], sizes(recipe)[0], 0)


@pytest.fixture(scope="module")
def family(job: Job, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("family")
    place(TrainingTask(job, folder, "V1"))
    run_family(job, folder)
    return folder


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model" / "model.safetensors")


def same(first: Path, second: Path) -> None:
    ours, theirs = weights(first), weights(second)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_a_branch_is_the_training_of_its_budget(job: Job, family: Path, tmp_path: Path) -> None:
    for tokens in job.branches:
        alone = tmp_path / str(tokens)
        place(TrainingTask(branch_job(job, tokens), alone, "V1"))
        trainer.train_job(branch_job(job, tokens), alone)
        branch = family / branch_directory(tokens)
        same(branch, alone)
        logged, expected = (
            [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
            for folder in (branch, alone)
        )
        for record in (*logged, *expected):
            for key in ("seconds", "tokens_per_second"):
                record.pop(key, None)
        # The trunk's last record may sum up other steps where its end is none of the branch's.
        assert logged[-1] == expected[-1] and {r["step"] for r in logged} >= {r["step"] for r in expected}


def test_what_a_family_leaves(job: Job, family: Path) -> None:
    assert read_status(family).state == "evaluated" and read_status(family).step == job.steps
    # The trunk's were kept for its branches, and went when all of them were done.
    assert not list(family.rglob("checkpoint-*"))
    for tokens in job.branches:
        assert (family / branch_directory(tokens) / "results" / "language_modelling.json").exists()
    found = json.loads((family / "size.json").read_text())
    assert found["parameters"] - found["non_embedding_parameters"] == 2 * 300 * 16


@pytest.mark.parametrize(
    "step", [pytest.param(10, marks=pytest.mark.long), 22, pytest.param(36, marks=pytest.mark.long)]
)
def test_a_stopped_family_goes_on(
    job: Job, family: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: int
) -> None:
    place(TrainingTask(job, tmp_path, "V1"))
    log = trainer.ComparisonTrainer.training_step

    def stop(self: Any, *arguments: Any, **named: Any) -> Any:
        if self.state.global_step == step:
            raise Stopped
        return log(self, *arguments, **named)

    monkeypatch.setattr(trainer.ComparisonTrainer, "training_step", stop)
    with pytest.raises(Stopped):
        run_family(job, tmp_path)
    monkeypatch.setattr(trainer.ComparisonTrainer, "training_step", log)
    run_family(job, tmp_path)
    for tokens in job.branches:
        same(tmp_path / branch_directory(tokens), family / branch_directory(tokens))


@pytest.mark.long
def test_a_removed_branch_is_trained_again_to_the_same_end(job: Job, family: Path, tmp_path: Path) -> None:
    import shutil

    copy = tmp_path / "family"
    shutil.copytree(family, copy)
    branch = copy / branch_directory(job.branches[0])
    shutil.rmtree(branch)
    run_family(job, copy)
    same(branch, family / branch_directory(job.branches[0]))


def test_a_study_runs_every_family_and_says_what_failed(
    recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(scale, "WORKER", "tests.cli.fake_worker")
    monkeypatch.setenv("PYTHONPATH", f"{Path(__file__).parents[2] / 'src'}:{Path(__file__).parents[2]}")
    seeds = recipe.model_copy(update={"seeds": [FINE, FAILS], "arms": recipe.arms[:1]})
    outcome = scale.run_scaling(seeds, tmp_path / "run", watcher=Silent(), say=lambda text: None)
    assert [row.task.label for row in outcome.rows] == ["Transformer w16", "Transformer w32"] * 2
    assert {row.task.job.seed for row in outcome.failed} == {FAILS}
    calls = [len(path.read_text()) for path in sorted((tmp_path / "run").rglob("calls"))]
    again = scale.run_scaling(seeds, tmp_path / "run", watcher=Silent(), say=lambda text: None)
    assert len(again.failed) == 2 and calls == [1] * 4
    assert sorted(len(path.read_text()) for path in (tmp_path / "run").rglob("calls")) == [1, 1, 2, 2]
    study = load_study(tmp_path / "run")
    assert study.points == [] and study.states == {"evaluated": 2, "failed": 2}


def test_a_study_reads_its_losses(recipe: Recipe, job: Job, family: Path, tmp_path: Path) -> None:
    import shutil

    from clearhead.runs.recipe_io import dump_toml

    (tmp_path / "recipe.toml").write_text(dump_toml(recipe))
    folder = tmp_path / family_directory("w16", "diff-v1", 0)
    shutil.copytree(family, folder)
    study = load_study(tmp_path)
    assert [(p.arm, p.size, p.tokens) for p in study.points] == [
        ("DIFF V1", "w16", tokens) for tokens in job.branches
    ]
    result = json.loads(
        (folder / branch_directory(1280) / "results" / "language_modelling.json").read_text()
    )["values"]
    assert study.points[0].loss == pytest.approx(sum(result["bits"]) * 0.6931471805599453 / result["tokens"])
    assert 2.0 < study.points[0].loss < 6.0
    write_status(folder, replace(Status(), state="trained"))
    assert load_study(tmp_path).states["trained"] == 1


def test_the_tally_counts_shared_steps_once(job: Job, tmp_path: Path) -> None:
    trunk = branching.trunk_job(job)
    parts = [(branch_job(job, tokens), tmp_path / branch_directory(tokens)) for tokens in job.branches]
    for folder in (tmp_path, tmp_path / "trunk", *(folder for _, folder in parts)):
        folder.mkdir(exist_ok=True)
    write_status(tmp_path / "trunk", Status(state="training", step=20, loss=5.0))
    tally = branching.Tally(tmp_path, job.steps, trunk, parts)
    assert tally.done() == (20, 5.0)
    write_status(parts[0][1], Status(state="training", step=18, loss=4.0))
    start = parts[0][0].train.decay_start
    assert tally.done() == (20 + 18 - start, 4.0)
    tally.write()
    assert read_status(tmp_path).steps == job.steps

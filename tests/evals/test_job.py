"""A job on disk: evaluated with a real model, resumed, measured again when its options change, and read back."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from clearhead import registry
from clearhead.analysis.sections import Section
from clearhead.data.prepare import PreparedData
from clearhead.evals.evaluation import Evaluation, EvaluationConfig, EvaluationResult, Say
from clearhead.evals.runner import evaluate_job
from clearhead.evals.subject import Subject
from clearhead.models import ClearheadConfig, ClearheadForCausalLM
from clearhead.runs.directory import open_run
from clearhead.runs.files import write_json
from clearhead.runs.recipe_io import parse_recipe
from clearhead.runs.results import RunResults, load_run

SUITES = ["language_modelling", "loss_by_position", "needles", "allocation", "mastery"]
OPTIONS = {
    "language_modelling": {"max_documents": 3, "max_tokens": 128},
    "loss_by_position": {"max_documents": 4, "buckets": 4},
    "needles": {"lengths": [64], "depths": [0.5], "needles": [2], "samples": 3, "untrained_samples": 1},
    "allocation": {"length": 64, "depths": [0.5], "samples": 2, "normalisation": "signed"},
}
ARMS = {"Transformer": "softmax", "DIFF V1": "differential"}


@pytest.fixture
def run_dir(
    tmp_path: Path, data: PreparedData, corpus: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> Path:
    """Two untrained arms with everything else that a trained job has."""
    monkeypatch.setenv("CLEARHEAD_CACHE", str(cache))
    recipe = parse_recipe(
        {
            "name": "tiny",
            "corpus": {"source": str(corpus), "validation_fraction": 0.4},
            "tokenizer": {"vocab_size": 512},
            "data": {"length": 64, "needles": {"lengths": [32, 64]}},
            "model": {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4},
            "evaluate": {"suites": SUITES, **OPTIONS},
            "arms": [{"name": name, "attention": attention} for name, attention in ARMS.items()],
        },
        source="test",
    )
    root = tmp_path / "run"
    root.mkdir()
    open_run(root, recipe)
    for arm in recipe.arms:
        job = recipe.for_arm(arm.name, 0)
        directory = root / "arms" / arm.slug / "seed-0"
        directory.mkdir(parents=True)
        write_json(directory / "job.json", job.model_dump(mode="json"))
        torch.manual_seed(0)
        model = ClearheadForCausalLM(ClearheadConfig(vocab_size=512, **recipe.model_of(arm)))
        model.save_pretrained(directory / "model")
    return root


def test_every_evaluation_runs_on_a_real_model_and_reads_back(run_dir: Path) -> None:
    said: list[str] = []
    for job in sorted(run_dir.glob("arms/*/seed-0")):
        assert evaluate_job(job, progress=said.append) == SUITES
    assert said[0] == "DIFF V1, seed 0: language_modelling" and len(said) == 10
    run = load_run(run_dir)
    assert [arm.name for arm in run.arms] == list(ARMS) and run.baseline.attention == "softmax"
    assert run.training_length == 64
    for name in SUITES[:-1]:
        section = registry.resolve("evaluations", name)().section(run)
        assert not section.missing and "One seed proves nothing" in section.answer, section.answer
    mastery = registry.resolve("evaluations", "mastery")().section(run)
    assert mastery.missing and "train.probe_every" in mastery.answer
    assert (
        "Hardly: asked for one of 2 facts in 64 tokens"
        in registry.resolve("evaluations", "needles")().section(run).answer
    )
    shares = {arm: seeds[0]["parts"] for arm, seeds in run.values("allocation").items()}
    rows = {arm: sum(np.mean(part) for part in parts.values()) for arm, parts in shares.items()}
    assert rows["Transformer"] == pytest.approx(1.0, abs=1e-4)
    assert 0.5 < rows["DIFF V1"] < 0.8, "effective maps: rows sum to 1 - lambda, which starts at 0.2 and 0.36"
    record = json.loads((run_dir / "arms/diff-v1/seed-0/results/needles.json").read_text())
    assert record["seed"] == 0 and record["arm"] == "DIFF V1" and record["config"]["samples"] == 3
    assert record["values"]["n"] == 3 and record["values"]["chance"] > 0


def test_what_is_measured_is_not_measured_again_unless_its_options_change(run_dir: Path) -> None:
    job = run_dir / "arms/transformer/seed-0"
    assert evaluate_job(job, ["language_modelling"]) == ["language_modelling"]
    assert evaluate_job(job, ["language_modelling", "allocation"]) == ["allocation"]
    plain = json.loads((job / "job.json").read_text())
    plain["evaluate"]["allocation"]["samples"] = 3
    write_json(job / "job.json", plain)
    assert evaluate_job(job, ["language_modelling", "allocation"]) == ["allocation"]


def test_a_broken_result_is_made_again(run_dir: Path) -> None:
    job = run_dir / "arms/transformer/seed-0"
    evaluate_job(job, ["mastery"])
    (job / "results/mastery.json").write_text('{"eval')
    with pytest.raises(ValueError, match=r"mastery\.json is not valid JSON"):
        load_run(run_dir)
    assert evaluate_job(job, ["mastery"]) == ["mastery"]


class Stops(Evaluation[EvaluationConfig, EvaluationResult]):
    name = "stops"
    Config = EvaluationConfig
    Result = EvaluationResult

    def result(
        self, subject: Subject, config: EvaluationConfig, progress: Say | None = None
    ) -> EvaluationResult:
        raise KeyboardInterrupt

    def section(self, run: RunResults) -> Section:
        return self.missing(run, "Stops", "Does it stop?")


def test_an_interrupted_evaluation_leaves_the_finished_ones(
    run_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(registry.EVALUATIONS, "stops", f"{__name__}:Stops")
    job = run_dir / "arms/transformer/seed-0"
    with pytest.raises(KeyboardInterrupt):
        evaluate_job(job, ["mastery", "stops", "allocation"])
    assert [path.name for path in (job / "results").iterdir()] == ["mastery.json"]
    assert evaluate_job(job, ["mastery", "allocation"]) == ["allocation"]


def test_an_untrained_job_says_so(run_dir: Path) -> None:
    job = run_dir / "arms/transformer/seed-0"
    (job / "model/config.json").unlink()
    with pytest.raises(FileNotFoundError, match="has no trained model yet"):
        evaluate_job(job)


def test_the_untrained_level_is_the_same_architecture_with_other_weights(run_dir: Path) -> None:
    from clearhead.evals.runner import JobLoader
    from clearhead.runs.recipe_io import load_job

    directory = run_dir / "arms/diff-v1/seed-0"
    subject = JobLoader(load_job(directory / "job.json"), directory).subject
    before = torch.random.get_rng_state()
    fresh = subject.untrained()
    assert torch.equal(before, torch.random.get_rng_state()), "measuring must not move the random numbers"
    shapes = {name: tuple(weight.shape) for name, weight in subject.model.named_parameters()}
    assert shapes == {name: tuple(weight.shape) for name, weight in fresh.named_parameters()}

"""Models that compute NaN are not measured by any evaluation, and no NaN reaches a file."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch

from clearhead import registry
from clearhead.analysis.sections import Section
from clearhead.evals.evaluation import Evaluation, EvaluationConfig, EvaluationResult, Say
from clearhead.evals.finite import broken_weights
from clearhead.evals.runner import measured, run_suites
from clearhead.evals.subject import Subject
from clearhead.runs.files import write_json
from clearhead.runs.results import RunResults
from clearhead.train.callbacks import Journal
from tests.evals import tiny


class Options(EvaluationConfig):
    pass


class Counts(EvaluationResult):
    found: int
    spread: float


class Counting(Evaluation[Options, Counts]):
    """Counts right answers, and of a model that says nothing finds none."""

    name, Config, Result = "counting", Options, Counts

    def result(self, subject: Subject, config: Options, progress: Say | None = None) -> Counts:
        ids = torch.randint(3, 300, (2, 8), generator=torch.Generator().manual_seed(0))
        best = subject.model(input_ids=ids).logits.argmax(-1)
        return Counts(found=int((best[:, :-1] == ids[:, 1:]).sum()), spread=math.nan)

    def section(self, run: RunResults) -> Section:
        raise NotImplementedError


def test_weights_that_are_no_numbers_are_named() -> None:
    model = tiny.ours(attention="differential")
    assert broken_weights(model) is None
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[3, :2] = math.inf
    assert broken_weights(model) == (
        "the model's weights are not all numbers: 2 of 1536 in model.layers.1.mlp.up_proj.weight are NaN or infinite"
    )


def test_large_weights_are_numbers() -> None:
    model = tiny.ours()
    with torch.no_grad():
        model.lm_head.weight.fill_(3e38)
    assert broken_weights(model) is None


@pytest.mark.parametrize("name", registry.EVALUATIONS)
def test_no_evaluation_measures_a_broken_model(name: str) -> None:
    model = tiny.ours()
    with torch.no_grad():
        model.model.norm.weight.fill_(math.nan)
    evaluation = registry.resolve("evaluations", name)()
    # Nothing of the options is looked at: the model is refused before.
    values = measured(evaluation, tiny.subject(model), None)
    assert list(values) == ["skipped"] and "model.norm.weight" in values["skipped"]


def test_logits_that_overflow_are_no_answers() -> None:
    model = tiny.ours()
    subject = tiny.subject(model)
    assert "found" in measured(Counting(), subject, Options())
    with torch.no_grad():
        model.lm_head.weight.fill_(3e38)
    values = measured(Counting(), subject, Options())
    assert values == {"skipped": "the model's logits held NaN or infinity in 1 of 1 calls"}
    assert not model.lm_head._forward_hooks


def test_files_hold_null_where_a_number_is_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(registry.EVALUATIONS, "counting", f"{__name__}:Counting")

    class Loader:
        subject = tiny.subject(tiny.ours())

    run_suites(Loader(), tmp_path, {"counting": {}}, "arm", 0, None)
    write_json(tmp_path / "other.json", {"a": [math.inf, (1.0, -math.inf)], "b": "NaN"})
    journal = Journal(tmp_path / "metrics.jsonl", 0)
    journal.write({"step": 1, "loss": math.nan})

    def refuse(word: str) -> None:
        raise AssertionError(f"{word} is no JSON")

    texts = [file.read_text() for file in tmp_path.rglob("*.json*")]
    found = [json.loads(text, parse_constant=refuse) for text in texts]
    assert len(found) == 3
    assert json.loads((tmp_path / "results/counting.json").read_text())["values"]["spread"] is None
    assert json.loads((tmp_path / "other.json").read_text()) == {"a": [None, [1.0, None]], "b": "NaN"}

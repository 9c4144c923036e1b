"""Models that compute NaN are not measured by any evaluation, and no NaN reaches a file."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from clearhead import registry
from clearhead.evals.base import Evaluation, EvaluationConfig, RunResults, Section, Subject
from clearhead.evals.finite import broken_weights
from clearhead.evals.job import measured, run_suites
from clearhead.evals.lm_eval import turns_by_length
from clearhead.train.callbacks import Journal
from clearhead.train.status import write_json
from tests.evals import tiny


class Options(EvaluationConfig):
    pass


class Counting(Evaluation[Options]):
    """Counts right answers, and of a model that says nothing finds none."""

    name, Config = "counting", Options

    def run(self, subject: Subject, config: Options) -> dict[str, Any]:
        ids = torch.randint(3, 300, (2, 8), generator=torch.Generator().manual_seed(0))
        best = subject.model(input_ids=ids).logits.argmax(-1)
        return {"found": int((best[:, :-1] == ids[:, 1:]).sum()), "spread": math.nan}

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


@pytest.mark.parametrize("kind", ["dynamic", "longrope"])
def test_the_harness_reads_one_request_at_a_time_where_padding_would_lengthen_it(kind: str) -> None:
    """Under a scaling that looks at the length a score is that of a batch of one, whatever the batch size."""
    pytest.importorskip("lm_eval")
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM

    rope: dict[str, Any] = {"rope_type": kind, "rope_theta": 10000.0, "factor": 4.0}
    if kind == "longrope":
        rope |= {"short_factor": [1.0] * 4, "long_factor": [8.0] * 4, "original_max_position_embeddings": 16}
    model, plain = tiny.ours(rope_parameters=rope), tiny.ours()
    assert turns_by_length(model) and not turns_by_length(plain)
    assert turns_by_length(tiny.llama(rope_parameters=rope))
    texts = ["the sky", "grass is green and " * 3, "what is hidden here? " * 5, "a"]

    def scores(size: int) -> list[float]:
        reader = HFLM(pretrained=model, tokenizer=tiny.tokenizer(), batch_size=size, max_length=400)
        requests = [
            Instance("loglikelihood", {}, (text, " the grass is green"), i) for i, text in enumerate(texts)
        ]
        return [score for score, _ in reader.loglikelihood(requests, disable_tqdm=True)]

    alone = scores(1)
    # What the harness's own batching would say, and why the evaluation does not use it.
    assert max(abs(a - b) for a, b in zip(alone, scores(4), strict=True)) > 1e-2

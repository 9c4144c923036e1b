"""Numbers that are none: found in what is measured, in judges, in files that are read back; never computed with."""

from __future__ import annotations

import json
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from clearhead import registry
from clearhead.analysis.sections import Section
from clearhead.evals.evaluation import Evaluation, EvaluationConfig, EvaluationResult, Say
from clearhead.evals.faithfulness.judges.base import JudgeError
from clearhead.evals.faithfulness.judges.loading import load_judge
from clearhead.evals.faithfulness.judges.local import Local, LocalConfig
from clearhead.evals.faithfulness.judges.nli import Nli, NliConfig
from clearhead.evals.finite import exponential
from clearhead.evals.internals.quantisation import Quantisation, QuantisationConfig
from clearhead.evals.retrieval.mastery import Mastery, MasteryConfig
from clearhead.evals.runner import measured, parse_options, run_suites
from clearhead.evals.subject import Subject
from clearhead.evals.text.language_modelling import LanguageModelling, LanguageModellingConfig
from clearhead.evals.text.perplexity.evaluation import Perplexity, PerplexityConfig
from clearhead.runs.files import not_finite
from clearhead.runs.results import RunResults, read_metrics, read_result
from tests.evals import tiny
from tests.evals.judging import SKY


class Options(EvaluationConfig):
    pass


class Layer(EvaluationResult):
    loss: float


class Layers(EvaluationResult):
    layers: list[Layer]
    n: int


class Overflowing(Evaluation[Options, Layers]):
    """Has a result of which one number is none."""

    name, Config, Result = "overflowing", Options, Layers

    def result(self, subject: Subject, config: Options, progress: Say | None = None) -> Layers:
        return Layers(layers=[Layer(loss=1.0), Layer(loss=math.inf)], n=2)

    def section(self, run: RunResults) -> Section:
        return (
            self.missing(run, "Overflowing", "?") if not run.values(self.name) else Section("x", "x", "x", "")
        )


def test_a_result_with_a_number_that_is_none_is_skipped_with_its_place() -> None:
    values = measured(Overflowing(), tiny.subject(tiny.ours()), Options())
    assert values["skipped"] == "not all of it are numbers: layers.1.loss is inf"
    assert values["layers"] == [{"loss": 1.0}, {"loss": None}]
    assert not_finite({"a": [1, (2.0, None, "NaN")]}) is None


def test_losses_past_every_perplexity_are_said(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny.ours(tie_word_embeddings=False)
    with torch.no_grad():
        model.lm_head.weight.mul_(1e5)
    subject = tiny.subject(model)
    found = Perplexity().run(subject, PerplexityConfig(lengths=[16]))
    assert "too large for a perplexity" in found["skipped"]
    plain = LanguageModelling().run(subject, LanguageModellingConfig(length=16))
    assert plain["perplexity"] is None and plain["bits_per_byte"] > 0
    assert exponential(1.0) == math.e


def test_the_probes_that_are_no_numbers_count_for_nothing() -> None:
    probes: list[Any] = [0.2, None, 0.95]
    metrics = [{"step": i, "tokens": i, "probe": {"needle_accuracy": a}} for i, a in enumerate(probes)]
    found = Mastery().run(tiny.subject(tiny.ours(), metrics=metrics), MasteryConfig())
    assert found["tokens"] == 2 and found["n"] == 2


def test_needles_of_a_model_that_overflows_are_not_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_match(model: Any, samples: Any, *settings: Any) -> list[bool]:
        model.lm_head(torch.full((1, 1, 32), math.inf))
        return [False] * len(samples)

    monkeypatch.setattr("clearhead.evals.internals.quantisation.exact_match", no_match)
    subject = tiny.subject(tiny.ours(), tiny.store([40] * 5))
    found = Quantisation().run(
        subject, QuantisationConfig(logits=[8], weights=[], cache=[], length=32, samples=2)
    )
    assert "held NaN or infinity" in found["skipped"]


def test_a_judge_that_computes_nothing_does_not_judge(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers import AutoModelForCausalLM

    model = tiny.llama(max_position_embeddings=4096)
    with torch.no_grad():
        model.model.norm.weight.fill_(math.nan)
    tiny.save(tmp_path / "judge", model)
    with pytest.raises(JudgeError, match=r"cannot judge: .* in model\.norm\.weight are NaN"):
        load_judge(AutoModelForCausalLM, str(tmp_path / "judge"))
    # Weights that are numbers may overflow.
    judge = Local(LocalConfig(model="judge"))
    judge.tokenizer, judge.model, judge.longest = tiny.tokenizer(), model, None
    ((_, verdict),) = judge.judge([SKY])
    assert verdict.faithful is None and "not numbers" in verdict.reason
    nli = Nli(NliConfig(model="judge"))
    nli.tokenizer, nli.longest = tiny.tokenizer(), 400
    monkeypatch.setattr(nli, "_entailment", lambda pairs: [math.nan] * len(pairs))
    ((_, verdict),) = nli.judge([SKY])
    assert verdict.faithful is None and "not numbers" in verdict.reason


def test_an_earlier_result_with_nan_is_shown_as_skipped_and_measured_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(registry.EVALUATIONS, "overflowing", f"{__name__}:Overflowing")
    loader = SimpleNamespace(subject=tiny.subject(tiny.ours()))
    file = tmp_path / "results/overflowing.json"
    file.parent.mkdir()
    file.write_text('{"config": {}, "values": {"found": [1.0, NaN]}}')
    assert "found.1 is nan" in read_result(file)["values"]["skipped"]
    assert run_suites(loader, tmp_path, {"overflowing": {}}, "arm", 0, None) == ["overflowing"]
    assert run_suites(loader, tmp_path, {"overflowing": {}}, "arm", 0, None) == []
    assert json.loads(file.read_text())["values"]["n"] == 2
    for text, said in (("[" * 100_000, "not valid JSON"), ('{"config": {}}', "holds no values")):
        file.write_text(text)
        with pytest.raises(ValueError, match=said) as caught:
            read_result(file)
        assert str(file) in str(caught.value)


def test_metrics_are_read_with_nan_and_refused_without_a_step(tmp_path: Path) -> None:
    log = tmp_path / "metrics.jsonl"
    log.write_text('{"step": 1, "loss": NaN}\n{"step": 2, "loss": null}\n')
    assert [record["loss"] for record in read_metrics(log)] == [None, None]
    for line in ("5", '{"loss": 1}', "9" * 5000):
        log.write_text(f'{line}\n{{"step": 2}}\n')
        with pytest.raises(ValueError, match="line 1, is not valid JSON with a step"):
            read_metrics(log)


@pytest.mark.parametrize("value", ["9" * 5000, "[" * 5000])
def test_an_option_that_cannot_be_read_is_one_sentence(value: str) -> None:
    with pytest.raises(
        ValueError, match=r"^--set samples: its value is no number or table that can be read$"
    ):
        parse_options([f"samples={value}"], ["passkey"])


def test_arrays_of_numbers_are_json() -> None:
    assert not_finite({"a": np.float64(np.nan)}) == "a is nan"

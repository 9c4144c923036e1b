"""Any causal language model of Hugging Face: loaded, evaluated, resumed, reported; and everything that can be wrong."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import huggingface_hub.constants
import pytest
from typer.testing import CliRunner

from clearhead import registry
from clearhead.analysis.sections import Section
from clearhead.cli.main import app
from clearhead.evals.evaluation import Evaluation, EvaluationConfig, EvaluationResult, Say
from clearhead.evals.runner import evaluate_external, parse_options
from clearhead.evals.subject import Subject
from clearhead.evals.subjects.external import ExternalLoader, ExternalSpec, is_external
from clearhead.models import ClearheadEncoderConfig
from clearhead.report.build import build_report
from clearhead.runs.lock import RunError
from clearhead.runs.results import RunResults, load_run
from tests.evals import tiny

OPTIONS: dict[str, dict[str, Any]] = {
    "perplexity": {"lengths": [16, 32], "max_documents": 4, "segment": 4},
    "passkey": {"forms": ["mohtashami"], "lengths": [200], "samples": 2, "max_new_tokens": 4},
    "initial_angles": {"documents": 2, "positions": 8},
    "logit_outliers": {"length": 64, "queries": 8, "documents": 2, "layers": [1]},
    "scaling_factors": {
        "factors": [1, 2, 4],
        "perplexity": {"lengths": [32], "max_documents": 2, "segment": 0},
        "passkey": {"forms": ["mohtashami"], "lengths": [200], "samples": 2, "max_new_tokens": 4},
    },
    "language_modelling": {"length": 16, "max_documents": 3, "max_tokens": 32},
    "needles": {"lengths": [64], "depths": [0.5], "needles": [1], "samples": 2, "untrained_samples": 1},
    "loss_by_position": {"length": 32, "max_documents": 4},
    "allocation": {"length": 64, "depths": [0.5], "needles": 1, "samples": 2},
    "activation_outliers": {"length": 32, "tokens": 64},
    "quantisation": {"length": 64, "documents": 4, "samples": 2, "logits": [4], "weights": [4], "cache": []},
    "ar_hit": {"length": 64, "max_documents": 4},
}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.save(tmp_path_factory.mktemp("hub") / "tiny-llama")


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("texts")
    for number in range(6):
        (folder / f"{number}.txt").write_text(f"The grass is green and the sky is blue {number}.\n" * 12)
    return folder


def test_a_directory_of_hugging_face_is_evaluated_reported_and_resumed(
    model: Path, corpus: Path, tmp_path: Path
) -> None:
    spec = ExternalSpec(str(model), str(corpus))
    run = tmp_path / "run"
    said: list[str] = []
    ran = evaluate_external(spec, run, list(OPTIONS), options=OPTIONS, progress=said.append)
    assert ran == list(OPTIONS)
    results = load_run(run)
    assert results.training_length == 16 and [arm.name for arm in results.arms] == ["tiny-llama"]
    for name in OPTIONS:
        section = registry.resolve("evaluations", name)().section(results)
        assert not section.missing, (name, section.answer)
        assert "n=" in section.answer or "Hardly" in section.answer, section.answer
    page = build_report(run).read_text()
    assert "Passkey" in page and "tiny-llama" in page and "Initial angles" in page
    assert said.count(f"reading {corpus}") == 1
    # Nothing is loaded again for what is finished, and a result that was lost is made again alone.
    (run / "arms/tiny-llama/seed-0/results/passkey.json").unlink()
    assert evaluate_external(spec, run, list(OPTIONS), options=OPTIONS) == ["passkey"]
    changed = {"perplexity": {**OPTIONS["perplexity"], "stride": 8}}
    assert evaluate_external(spec, run, ["perplexity"], options=changed) == ["perplexity"]
    assert "passkey" in load_run(run).recipe["evaluate"]["suites"], "earlier evaluations stay in the report"


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


def test_an_interrupted_run_goes_on(
    model: Path, corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(registry.EVALUATIONS, "stops", f"{__name__}:Stops")
    spec, run = ExternalSpec(str(model), str(corpus)), tmp_path / "run"
    with pytest.raises(KeyboardInterrupt):
        evaluate_external(spec, run, ["perplexity", "stops", "passkey"], options=OPTIONS)
    assert [path.name for path in run.glob("arms/*/*/results/*")] == ["perplexity.json"]
    assert evaluate_external(spec, run, ["perplexity", "passkey"], options=OPTIONS) == ["passkey"]


def test_the_command_line(model: Path, corpus: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    runner = CliRunner()
    arguments = ["evaluate", str(model), "--suite", "perplexity", "--corpus", str(corpus), "--out", str(run)]
    options = ["--set", "lengths=[16]", "--set", "perplexity.max_documents=2"]
    done = runner.invoke(app, [*arguments, *options])
    assert done.exit_code == 0, done.output
    record = json.loads((run / "arms/tiny-llama/seed-0/results/perplexity.json").read_text())
    assert record["config"]["lengths"] == [16] and record["values"]["n"] == 2
    # The run directory says what it is of.
    again = runner.invoke(app, ["evaluate", str(run), "--suite", "initial_angles", "--set", "documents=1"])
    assert again.exit_code == 0, again.output
    assert (run / "arms/tiny-llama/seed-0/results/initial_angles.json").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--suite", "perplexty"], "unknown evaluation 'perplexty': did you mean 'perplexity'"),
        (
            ["--suite", "passkey", "--set", "sample=3"],
            "passkey has no option 'sample': did you mean 'samples'",
        ),
        (["--set", "samples=3"], "does not say of which evaluation"),
        (["--suite", "passkey", "--set", "needles.samples=3"], "'needles' is not run"),
        (["--suite", "passkey", "--set", "samples"], "not of the form key=value"),
    ],
)
def test_what_is_typed_wrong_is_named(model: Path, arguments: list[str], message: str) -> None:
    done = CliRunner().invoke(app, ["evaluate", str(model), *arguments])
    assert isinstance(done.exception, ValueError) and message in str(done.exception), done.exception


def test_what_is_no_model_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    (tmp_path / "empty").mkdir()
    assert not is_external(str(tmp_path / "empty")) and is_external("some-owner/no-such-model")
    done = CliRunner().invoke(app, ["evaluate", str(tmp_path / "empty")])
    assert "neither a run directory nor a trained model" in str(done.exception)
    with pytest.raises(ValueError, match="check the name and the network"):
        evaluate_external(ExternalSpec("some-owner/no-such-model"), tmp_path / "run", ["passkey"])
    assert not (tmp_path / "run").exists(), "a model that is not there leaves nothing behind"
    (tmp_path / "empty/config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(ValueError, match="cannot be loaded"):
        assert ExternalLoader(ExternalSpec(str(tmp_path / "empty"))).subject


def test_an_encoder_is_named(tmp_path: Path) -> None:
    ClearheadEncoderConfig(num_hidden_layers=1).save_pretrained(tmp_path / "bert")
    with pytest.raises(ValueError, match=r"is an encoder \(clearhead_encoder\); .* causal language models"):
        assert ExternalLoader(ExternalSpec(str(tmp_path / "bert"))).config


def test_a_directory_of_something_else_is_refused(model: Path, corpus: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    evaluate_external(ExternalSpec(str(model), str(corpus)), run, ["initial_angles"], options=OPTIONS)
    with pytest.raises(RunError, match="choose another --out"):
        evaluate_external(ExternalSpec(str(model), "stdlib"), run, ["initial_angles"], options=OPTIONS)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/thesis.txt").write_text("words")
    with pytest.raises(RunError, match="not empty"):
        evaluate_external(ExternalSpec(str(model)), tmp_path / "mine", ["initial_angles"], options=OPTIONS)


def test_a_tokenizer_without_bos_begins_with_its_eos_and_says_so(corpus: Path, tmp_path: Path) -> None:
    words = tiny.tokenizer()
    words.bos_token = None
    said: list[str] = []
    loader = ExternalLoader(
        ExternalSpec(str(tiny.save(tmp_path / "m", tokenizer=words)), str(corpus)), said.append
    )
    assert loader.subject.tokenizer.bos_token_id == words.eos_token_id
    assert any("no bos token: its eos token '<|eos|>' begins each text" in line for line in said)
    words.eos_token = None
    loader = ExternalLoader(
        ExternalSpec(str(tiny.save(tmp_path / "n", tokenizer=words)), str(corpus)), said.append
    )
    values = registry.resolve("evaluations", "perplexity")().run(
        loader.subject,
        registry.resolve("evaluations", "perplexity").Config(lengths=[16], max_documents=2),
    )
    assert values["bos"] == "none", "and without either, with nothing"


def test_an_empty_corpus_is_named(model: Path, tmp_path: Path) -> None:
    (tmp_path / "void.txt").write_text("")
    with pytest.raises(ValueError, match=r"void\.txt' is empty"):
        evaluate_external(
            ExternalSpec(str(model), str(tmp_path / "void.txt")), tmp_path / "run", ["initial_angles"]
        )


def test_the_training_length_is_the_one_before_scaling(tmp_path: Path) -> None:
    scaling = {
        "rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 16,
    }  # fmt: skip
    folder = tiny.save(tmp_path / "m", rope_parameters=scaling, max_position_embeddings=64)
    assert ExternalLoader(ExternalSpec(str(folder))).training_length == 16


def test_options_are_toml() -> None:
    found = parse_options(["a.x=[1, 2]", "a.y=word", 'b.z={k = "v"}'], ["a", "b"])
    assert found == {"a": {"x": [1, 2], "y": "word"}, "b": {"z": {"k": "v"}}}

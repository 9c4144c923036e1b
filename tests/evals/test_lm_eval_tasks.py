"""The tasks for lm-evaluation-harness ask what the evaluation asks and give the same score."""

from __future__ import annotations

import importlib
import importlib.util
import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from clearhead.evals.asking.decoding import found
from clearhead.evals.external.lm_eval import LmEval, LmEvalConfig
from clearhead.evals.retrieval.multi_needle.evaluation import MultiNeedle, MultiNeedleConfig
from clearhead.lm_eval_tasks import INCLUDE_PATH
from clearhead.runs.results import ArmResults, RunResults, SeedResults
from tests.evals import tiny
from tests.evals.test_multineedle import Oracle, all_right, first_only, subject_of
from tests.evals.test_multineedle_prompts import TEMPLATE, TEXT, plain

needs_harness = pytest.mark.skipif(
    importlib.util.find_spec("lm_eval") is None,
    reason="lm-eval is not installed: pip install 'clearhead[lm-eval]'",
)
PAIRS = {(1, 1), (2, 2), (4, 2), (6, 2), (8, 1)}


def test_there_is_a_task_for_every_pair_and_form() -> None:
    yaml.SafeLoader.add_constructor("!function", lambda loader, node: loader.construct_scalar(node))
    files = [yaml.safe_load(file.read_text()) for file in sorted(INCLUDE_PATH.glob("needles*.yaml"))]
    tasks = {file["task"]: file for file in files if "group" not in file}
    kinds = {(int(n), int(r)) for name in tasks for n, r in [re.findall(r"\d+", name)[:2]]}
    assert kinds == PAIRS and len(tasks) == 10
    for group in (file for file in files if "group" in file):
        assert set(group["task"]) == {
            name for name in tasks if name.endswith("_chat") == group["group"].endswith("_chat")
        }
    for name, task in tasks.items():
        asked = int(re.findall(r"\d+", name)[1])
        assert task["generation_kwargs"]["max_gen_toks"] == MultiNeedleConfig().new_tokens(asked)
        assert task["generation_kwargs"]["until"] == ([] if name.endswith("_chat") else ["\n"])


def both(
    model: Any, tmp_path: Path, pair: tuple[int, int], form: str
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """The records of the evaluation and those of the harness, for the same seed."""
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    words = plain()
    words.chat_template = TEMPLATE
    words.save_pretrained(tmp_path / "words")
    text = tmp_path / "text.txt"
    text.write_text(TEXT, encoding="utf-8")
    common: dict[str, Any] = {
        "samples": 4,
        "haystacks": 2,
        "depths": [0.0, 1.0],
        "seed": 11,
        "haystack": [str(text)],
    }
    config = MultiNeedleConfig(pairs=[pair], length=420, grid=None, form=form, **common)  # type: ignore[arg-type]
    MultiNeedle().run(subject_of(model, words, tmp_path), config)
    ours = [json.loads(line) for line in (tmp_path / "multi_needle.jsonl").read_text().splitlines()][1:]
    name = f"clearhead_needles_{pair[0]}_{pair[1]}" + ("_chat" if form == "chat" else "")
    metadata = {"tokenizer": str(tmp_path / "words"), "lengths": [420], **common}
    done = simple_evaluate(
        model=HFLM(pretrained=model, tokenizer=words, batch_size=3),
        tasks=[name],
        task_manager=TaskManager(include_path=str(INCLUDE_PATH), include_defaults=False, metadata=metadata),
        log_samples=True,
        bootstrap_iters=0,
    )
    theirs = done["samples"][name]
    for row in theirs:
        assert done["results"][name]["exact,none"] == pytest.approx(
            sum(r["exact"] for r in theirs) / len(theirs)
        )
        row.update(row["doc"], answer=row["resps"][0][0], asked_prompt=row["arguments"][0][0])

    def key(row: dict[str, Any]) -> tuple[Any, ...]:
        return row["depth"], row["index"]

    return sorted(ours, key=key), sorted(theirs, key=key)


@needs_harness
@pytest.mark.parametrize("form", ["completion", "chat"])
def test_a_random_model_says_the_same_to_both(form: str, tmp_path: Path) -> None:
    model = tiny.llama(400, max_position_embeddings=1024).double()
    ours, theirs = both(model, tmp_path, (2, 2), form)
    assert len(ours) == len(theirs) == 8
    for our, their in zip(ours, theirs, strict=True):
        assert our["prompt"] == their["asked_prompt"] and our["numbers"] == their["numbers"]
        assert our["answer"] == their["answer"]
        assert their["exact"] == float(all(our["found"])) == 0.0
    assert len({row["answer"] for row in ours}) > 1


@needs_harness
def test_both_score_what_a_reader_says_alike(tmp_path: Path) -> None:
    def sometimes(prompt: str) -> str:
        return all_right(prompt) if prompt.index("The special magic") % 2 else first_only(prompt)

    ours, theirs = both(Oracle(plain(), sometimes).eval(), tmp_path, (2, 2), "completion")
    for our, their in zip(ours, theirs, strict=True):
        assert their["answer"].startswith(our["answer"])
        assert their["exact"] == float(all(our["found"])) and their["share"] == sum(our["found"]) / 2
        assert found(their["answer"], their["numbers"]) == our["found"]
    assert {row["exact"] for row in theirs} == {0.0, 1.0} and {row["share"] for row in theirs} == {0.5, 1.0}


@needs_harness
def test_the_harness_runs_from_the_command_line_into_the_same_report(tmp_path: Path) -> None:
    from typer.testing import CliRunner

    from clearhead.cli.main import app
    from clearhead.evals.external.lm_eval import LmEval
    from clearhead.runs.results import load_run

    model = tiny.save(tmp_path / "model", tokenizer=plain(), max_position_embeddings=1024)
    text = tmp_path / "text.txt"
    text.write_text(TEXT, encoding="utf-8")
    metadata = f'{{haystack = "{text}", lengths = [300], samples = 2, depths = [0.5]}}'
    out = tmp_path / "run"
    command = ["evaluate", str(model), "--out", str(out), "--lm-eval", "clearhead_needles_1_1,no_such_task"]
    done = CliRunner().invoke(app, [*command, "--set", f"lm_eval.metadata={metadata}"])
    assert done.exit_code == 0, done.output
    values = load_run(out).values("lm_eval")["model"][0]
    task = values["tasks"]["clearhead_needles_1_1"]
    assert task["n"] == 2 and task["main"] == "exact" and task["samples"] == [0.0, 0.0]
    assert set(task["metrics"]) == {"exact", "share"} and "no_such_task" in values["skipped_tasks"]
    section = LmEval().section(load_run(out))
    assert "clearhead_needles_1_1 (exact): model: 0.00" in section.answer
    assert any("no_such_task" in note for note in section.notes)


def test_benchmarks_are_compared_question_by_question() -> None:
    def values(marks: list[float], error: float) -> dict[str, Any]:
        metrics = {"acc": {"value": sum(marks) / len(marks), "stderr": error}}
        task = {
            "metrics": metrics,
            "main": "acc",
            "samples": marks,
            "n": len(marks),
            "version": "1",
            "num_fewshot": 0,
        }
        return {"tasks": {"arc": task}, "skipped_tasks": {}, "n": len(marks)}

    arms = {"a": values([0.0, 1.0] * 20, 0.08), "b": values([1.0] * 40, 0.0)}
    results = {
        name: ArmResults(
            name, name, "softmax", {0: SeedResults(results={"lm_eval": {"config": {}, "values": v}})}
        )
        for name, v in arms.items()
    }
    section = LmEval().section(RunResults({"name": "run"}, {}, list(results.values())))
    assert "arc (acc): b is better than a by 0.50" in section.answer
    assert section.tables[0].rows == [["arc, acc", "0.500 ± 0.080 (n=40)", "1.000 ± 0.000 (n=40)"]]


@needs_harness
def test_an_interrupted_run_goes_on_with_the_next_task(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[str] = []
    harness = importlib.import_module("clearhead.evals.external.lm_eval")

    def measured(model: Any, name: str, manager: Any, config: LmEvalConfig) -> Any:
        asked.append(name)
        if name == "gone":
            raise ConnectionError("no network\nat all")
        if name == "last" and asked.count("last") == 1:
            raise KeyboardInterrupt
        one = {"metrics": {"acc": {"value": 0.5, "stderr": None}}, "main": "acc", "samples": [0.0, 1.0]}
        task = harness.TaskResult.model_validate({**one, "n": 2, "version": "1", "num_fewshot": 0})
        return {f"{name}_part": task}, {f"{name}_odd": "it is nan"}

    monkeypatch.setattr(harness, "measured", measured)
    monkeypatch.setattr(harness, "harness_model", lambda *given: None)
    monkeypatch.setattr("lm_eval.tasks.TaskManager", lambda **given: None)
    subject = tiny.subject(tiny.gpt2(), folder=tmp_path)
    config = LmEvalConfig(tasks=["first", "gone", "last"])
    with pytest.raises(KeyboardInterrupt):
        LmEval().run(subject, config)
    values = LmEval().run(subject, config)
    assert asked == ["first", "gone", "last", "gone", "last"]
    assert list(values["tasks"]) == ["first_part", "last_part"] and values["n"] == 4
    assert values["skipped_tasks"] == {
        "first_odd": "it is nan", "gone": "no network", "last_odd": "it is nan"
    }  # fmt: skip
    assert not list(tmp_path.iterdir())
    nothing = LmEval().run(subject, LmEvalConfig(tasks=["gone"]))
    assert nothing == {"skipped": "gone: no network"}


def test_without_the_harness_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"pip install 'clearhead\[lm-eval\]'"):
        LmEval().run(tiny.subject(tiny.llama()), LmEvalConfig(tasks=["hellaswag"]))


def test_the_include_path_is_printed() -> None:
    from typer.testing import CliRunner

    from clearhead.cli.main import app

    done = CliRunner().invoke(app, ["evaluate", "--lm-eval-path"])
    assert done.exit_code == 0 and done.output.strip() == str(INCLUDE_PATH)
    assert (INCLUDE_PATH / "multi_needle.py").exists()


@needs_harness
def test_without_a_tokenizer_it_says_what_to_give() -> None:
    from clearhead.lm_eval_tasks.multi_needle import one_of_one

    with pytest.raises(ValueError, match="no tokenizer to count tokens with"):
        one_of_one(version=1.0)

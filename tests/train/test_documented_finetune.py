"""The two recipes of docs/encoder.md train at a size for a test, from pretraining to the accuracy of the classifier."""

import json
import re
import tomllib
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tests.train import task_runs

from clearhead.report.build import evaluation_sections
from clearhead.report.card import card
from clearhead.runs.directory import open_run
from clearhead.runs.recipe import Recipe
from clearhead.runs.recipe_io import parse_recipe
from clearhead.runs.results import load_run
from clearhead.runs.status import read_status
from clearhead.train.begun import with_attention
from clearhead.train.comparison import arm_tasks, check_models, prepare_rows
from clearhead.train.pool import place
from clearhead.train.worker import run_job

PAGE = Path(__file__).parents[2] / "docs" / "encoder.md"
SMALL = {
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "head_dim": 8,
}
ROWS = {"save_every": 4, "log_every": 4, "report_to": []}


def compared(recipe: Recipe, run: Path) -> list[str]:
    """What `clearhead compare` does, in this process; what it said."""
    said: list[str] = []
    check_models(recipe)
    recipe = with_attention(recipe)
    run.mkdir(parents=True)
    open_run(run, recipe)
    began = prepare_rows(recipe, run, said.append)
    for task in arm_tasks(recipe, run):
        place(task, began)
        run_job(task.job, task.directory)
        assert read_status(task.directory).state == "evaluated"
    return said


def documented(monkeypatch: pytest.MonkeyPatch, folder: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """Both recipes as they are printed, with the text and the examples that they name in the working directory."""
    section = PAGE.read_text(encoding="utf-8").partition("## Fine-tune it")[2].partition("\n## ")[0]
    first, second = (
        tomllib.loads(block) for block in re.findall(r"```toml\n(.*?)```", section, flags=re.DOTALL)
    )
    monkeypatch.chdir(folder)
    monkeypatch.setenv("CLEARHEAD_CACHE", str(folder / "cache"))
    task_runs.write_data(folder).rename(folder / first["corpus"]["source"])
    (folder / "pairs.jsonl").rename(folder / second["data"]["examples"]["source"])
    return first, second


def test_from_pretraining_to_accuracy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.set_num_threads(1)
    first, second = documented(monkeypatch, tmp_path)
    for printed in (first, second):
        parse_recipe(printed, source="as printed")
        printed["data"]["length"] = 32
        printed["train"] |= {"tokens": 8 * 128, "batch_tokens": 128, **ROWS}
        printed["corpus"]["validation_fraction"] = 0.2
    first["model"], first["tokenizer"]["vocab_size"] = SMALL, 300
    first["evaluate"] = {"suites": ["masked_language_modelling"]}
    compared(parse_recipe(first, source="pretrain.toml"), Path("runs/pretrained"))
    run = Path("runs/finetuned")
    said = compared(parse_recipe(second, source="finetune.toml"), run)
    assert said[-1].startswith("the checkpoints have no head for these labels: a new one is drawn")
    found = load_run(run)
    assert [arm.attention for arm in found.arms] == ["softmax", "differential"]
    for arm in found.arms:
        values = arm.seeds[0].results["classification"]["values"]
        assert values["labels"] == ["even", "odd"] and values["n"] == 8 and 0 <= values["accuracy"] <= 1
    headlines = {h.arm for section in evaluation_sections(found) for h in section.headlines}
    assert headlines == {"Transformer", "DIFF V1"}
    model = run / "arms" / "diff-v1" / "seed-0" / "model"
    text = card(model)
    assert "differential attention V1" in text and "text-classification" in text
    assert "It began with the weights of `pretrained/arms/diff-v1/seed-0/model`." in text
    assert json.loads((model / "config.json").read_text())["label2id"] == {"even": 0, "odd": 1}
    before, after = (
        load_file(Path("runs") / name / "arms/diff-v1/seed-0/model/model.safetensors")
        for name in ("pretrained", "finetuned")
    )
    assert set(after) - set(before) == {"classifier.weight", "classifier.bias"}
    assert any(not torch.equal(after[name], before[name]) for name in after if name in before)

"""Encoders and encoder-decoders that begin with a checkpoint: what stays, what is drawn anew, what is refused."""

import json
import logging
import shutil
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tests.train import finetune_runs, small
from tests.train.finetune_runs import begun, checkpoint, recipe, weights
from tests.train.task_runs import SAVE_EVERY, STEPS
from transformers.distributed import mixin

from clearhead.data.readers import CorpusError
from clearhead.runs.files import BrokenFile
from clearhead.runs.recipe import RecipeError
from clearhead.runs.recipe_io import parse_recipe
from clearhead.train import trainer
from clearhead.train.begun import new_parameters, with_attention
from clearhead.train.comparison import check_models, prepare_rows
from clearhead.train.pool import TrainingTask, place

PATIENCE = 300


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    yield from finetune_runs.project(tmp_path_factory)


# --- what a model begins with ---


@pytest.mark.parametrize("arm", ["Transformer", "V1"])
def test_a_classifier_is_the_checkpoint_under_a_new_head(corpus: Path, arm: str, tmp_path: Path) -> None:
    model = begun(recipe(corpus, "classify"), arm, tmp_path / "job")
    assert type(model).__name__ == "ClearheadEncoderForSequenceClassification"
    assert model.config.id2label == {0: "even", 1: "odd"} and model.config.label2id == {"even": 0, "odd": 1}
    assert model.config.attention == {"Transformer": "softmax", "V1": "differential"}[arm]
    before, after = weights(checkpoint(corpus, arm.lower())), model.state_dict()
    shared = {name for name in before if not name.startswith("lm_head")}
    assert any(name.startswith("head.") for name in shared)
    assert set(after) == shared | {"classifier.weight", "classifier.bias"}
    assert all(torch.equal(after[name], before[name]) for name in shared)
    assert set(new_parameters(recipe(corpus, "classify").for_arm(arm, 0), tmp_path / "job") or ()) == {
        "classifier.weight",
        "classifier.bias",
    }


def test_whichever_process_comes_first_writes_the_start_and_nothing_is_reported(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """transformers lets no process but the first write, once they have met; here it is the second that has the lock."""
    one = begun(recipe(corpus, "classify"), "V1", tmp_path / "one").state_dict()
    monkeypatch.setattr(mixin, "_is_torch_distributed_initialized", lambda: True)
    monkeypatch.setattr(mixin, "_get_torch_distributed_rank", lambda: 1)
    log = logging.getLogger("transformers")
    monkeypatch.setattr(log, "propagate", True)
    two = begun(recipe(corpus, "classify"), "V1", tmp_path / "two").state_dict()
    assert one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)
    assert not [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]


def test_a_new_head_is_the_seed_s_and_the_same_for_twins(corpus: Path, tmp_path: Path) -> None:
    made = recipe(corpus, "classify")
    heads = {
        (arm, seed): begun(made, arm, tmp_path / f"{arm}-{seed}", seed).classifier.weight.detach()
        for arm in ("Transformer", "V1")
        for seed in (0, 1)
    }
    assert torch.equal(heads["Transformer", 0], heads["V1", 0])
    assert not torch.equal(heads["V1", 0], heads["V1", 1])
    deviation = float(torch.stack(list(heads.values())).std())
    assert 0.5 < deviation / (2 / (5 * 16)) ** 0.5 < 1.5


def test_random_numbers_go_on_alike_with_a_start_that_is_made_and_one_that_is_there(
    corpus: Path, tmp_path: Path
) -> None:
    states = []
    for _ in range(2):
        torch.manual_seed(3)
        begun(recipe(corpus, "classify"), "V1", tmp_path / "job")
        states.append(torch.get_rng_state())
    assert torch.equal(*states)


@pytest.mark.parametrize("same", [True, False])
def test_a_head_for_the_same_labels_is_kept(corpus: Path, same: bool, tmp_path: Path) -> None:
    first = recipe(corpus, "classify")
    begun(first, "V1", tmp_path / "first")
    found = tmp_path / "first" / "start"
    raw = json.loads(first.model_dump_json(exclude_none=True))
    raw["model"] = {"from": str(found)}
    if not same:
        examples = tmp_path / "others.jsonl"
        text = (corpus.parent / "pairs.jsonl").read_text()
        examples.write_text(text.replace('"odd"', '"uneven"').replace('"even"', '"straight"'))
        raw["data"]["examples"]["source"] = str(examples)
    raw["arms"] = [{"name": "on"}]
    made = parse_recipe(raw, source="test")
    model = begun(made, "on", tmp_path / "second")
    assert model.config.id2label == ({0: "even", 1: "odd"} if same else {0: "straight", 1: "uneven"})
    # With the seed of the first, the head would be the same one again; so it was moved.
    moved = weights(found)
    moved["classifier.weight"] += 1.0
    save_file(moved, found / "model.safetensors", {"format": "pt"})
    (found / "checksums.json").unlink()
    shutil.rmtree(tmp_path / "second")
    after = begun(made, "on", tmp_path / "second").state_dict()
    assert torch.equal(after["classifier.weight"], moved["classifier.weight"]) == same
    assert all(torch.equal(after[name], moved[name]) for name in moved if "classifier" not in name)
    said: list[str] = []
    (tmp_path / "run").mkdir()
    prepare_rows(made, tmp_path / "run", said.append)
    assert ("their heads are kept" if same else "a new one is drawn") in said[-1]


def test_more_labels_than_the_checkpoint_has(corpus: Path, tmp_path: Path) -> None:
    made = recipe(corpus, "classify")
    begun(made, "V1", tmp_path / "first")
    raw = json.loads(made.model_dump_json(exclude_none=True))
    raw["model"] = {"from": str(tmp_path / "first" / "start")}
    raw["data"]["examples"]["target_field"] = "answer"
    raw["arms"] = [{"name": "on"}]
    model = begun(parse_recipe(raw, source="test"), "on", tmp_path / "second")
    assert model.classifier.weight.shape == (5, 16) and model.config.num_labels == 5


@pytest.mark.parametrize(("task", "family"), [("masked", "encoders"), ("seq2seq", "pairs")])
def test_going_on_with_the_same_task_changes_nothing_at_first(
    corpus: Path, task: str, family: str, tmp_path: Path
) -> None:
    made = recipe(corpus, task)
    model = begun(made, "V1", tmp_path / "job")
    before, after = weights(checkpoint(corpus, family=family)), model.state_dict()
    assert set(before) <= set(after)
    assert all(torch.equal(after[name], before[name]) for name in before)
    assert new_parameters(made.for_arm("V1", 0), tmp_path / "job") == ()


def test_a_classifier_becomes_a_masked_language_model_again(corpus: Path, tmp_path: Path) -> None:
    begun(recipe(corpus, "classify"), "V1", tmp_path / "first")
    raw = json.loads(recipe(corpus, "masked").model_dump_json(exclude_none=True))
    raw |= {"model": {"from": str(tmp_path / "first" / "start")}, "arms": [{"name": "back"}]}
    made = parse_recipe(raw, source="test")
    model = begun(made, "back", tmp_path / "second")
    assert new_parameters(made.for_arm("back", 0), tmp_path / "second") == ("lm_head.bias",)
    assert torch.equal(model.lm_head.weight, weights(checkpoint(corpus))["model.embed_tokens.weight"])
    assert not model.lm_head.bias.any()


def test_rows_may_be_longer_than_the_checkpoint_s(corpus: Path, tmp_path: Path) -> None:
    raw = json.loads(recipe(corpus, "classify").model_dump_json(exclude_none=True))
    raw["data"]["length"] = 64
    raw["arms"] = [{"name": "V1"}]
    made = parse_recipe(raw, source="test")
    check_models(made)
    model = begun(made, "V1", tmp_path / "job")
    assert model.config.max_position_embeddings == 32
    assert model(torch.arange(64)[None]).logits.isfinite().all()


# --- training ---


@pytest.mark.parametrize(
    ("train", "moves"),
    [
        ({"trainable": "attention"}, (".self_attn.", "classifier.")),
        ({"trainable": "new"}, ("classifier.",)),
        ({"trainable": "lora", "lora_modules": ["o_proj"], "lora_rank": 2}, (".o_proj.", "classifier.")),
    ],
)
def test_a_part_is_trained_and_the_new_head_with_it(
    corpus: Path, train: dict[str, Any], moves: tuple[str, ...], tmp_path: Path
) -> None:
    made = recipe(corpus, "classify", **train)
    before = begun(made, "V1", tmp_path / "begun").state_dict()
    finetune_runs.train(made, tmp_path / "run")
    after = weights(tmp_path / "run" / "model")
    assert set(after) == set(before)
    moved = {name for name, value in after.items() if not torch.equal(before[name], value)}
    assert moved == {name for name in after if any(part in name for part in moves)}
    cost = json.loads((tmp_path / "run" / "cost.json").read_text())
    if train["trainable"] == "new":
        assert cost["trained_parameters"] == 2 * 16 + 2
    assert cost["trained_parameters"] < cost["parameters"]


@pytest.mark.parametrize("task", ["classify", "masked", "seq2seq"])
def test_a_killed_run_ends_with_the_same_weights(corpus: Path, task: str, tmp_path: Path) -> None:
    made = recipe(corpus, task)
    environment = {"CLEARHEAD_CACHE": str(corpus.parent / "cache"), "OMP_NUM_THREADS": "1"}
    killed = small.process(finetune_runs.train_until_killed, made, tmp_path / "killed", environment)
    finetune_runs.train(made, tmp_path / "whole")
    killed.join(PATIENCE)
    assert killed.exitcode == -signal.SIGKILL
    assert (tmp_path / "killed" / "checkpoints" / f"checkpoint-{SAVE_EVERY}").exists()
    assert (tmp_path / "killed" / "start" / "config.json").exists()
    finetune_runs.train(made, tmp_path / "killed")
    files = [(tmp_path / run / "model" / "model.safetensors").read_bytes() for run in ("whole", "killed")]
    assert files[0] == files[1]
    assert not (tmp_path / "killed" / "start").exists()
    last = (tmp_path / "whole" / "metrics.jsonl").read_text().splitlines()[-1]
    assert json.loads(last)["step"] == STEPS


def test_a_start_that_was_half_written_is_written_again(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = recipe(corpus, "classify")
    from clearhead.train import begun as module

    def full(*arguments: Any) -> None:
        raise OSError("no space")

    monkeypatch.setattr(module, "seal", full)
    with pytest.raises(OSError, match="no space"):
        begun(made, "V1", tmp_path / "job")
    assert not (tmp_path / "job" / "start").exists() and not (tmp_path / "job" / ".start.part").exists()
    monkeypatch.undo()
    (tmp_path / "job" / ".start.part").mkdir()
    (tmp_path / "job" / ".start.part" / "config.json").write_text("{}")
    begun(made, "V1", tmp_path / "job")
    (tmp_path / "job" / "start" / "config.json").write_text("{}")
    with pytest.raises(BrokenFile, match=r"start' is damaged \(config\.json is not what was written\)"):
        begun(made, "V1", tmp_path / "job")


def test_a_damaged_checkpoint_is_found_before_anything_runs(corpus: Path, tmp_path: Path) -> None:
    begun(recipe(corpus, "classify"), "V1", tmp_path / "first")
    found = tmp_path / "first" / "start"
    raw = json.loads(recipe(corpus, "classify", trainable="new").model_dump_json(exclude_none=True))
    made = parse_recipe(raw | {"model": {"from": str(found)}, "arms": [{"name": "a"}]}, source="test")
    with pytest.raises(RecipeError, match=r'"new": .* has the head for these labels already'):
        check_models(made)
    save_file(weights(found) | {"classifier.bias": torch.ones(2)}, found / "model.safetensors")
    with pytest.raises(RecipeError, match=r"is damaged \(model\.safetensors is not what was written\)"):
        check_models(made)


def test_a_job_that_has_begun_keeps_what_it_began_with(corpus: Path, tmp_path: Path) -> None:
    copied = shutil.copytree(corpus.parent, tmp_path / "project") / corpus.name
    made = recipe(copied, "classify")
    first = begun(made, "V1", tmp_path / "job").state_dict()
    shutil.rmtree(checkpoint(copied))
    again = begun(made, "V1", tmp_path / "job").state_dict()
    assert all(torch.equal(first[name], again[name]) for name in first)


def test_a_checkpoint_that_changes_between_two_arms_is_refused(corpus: Path, tmp_path: Path) -> None:
    copied = shutil.copytree(corpus.parent, tmp_path / "project") / corpus.name
    made = with_attention(recipe(copied, "classify"))
    run = tmp_path / "run"
    run.mkdir()
    began = prepare_rows(made, run, lambda text: None)
    names = [name for name in began["evaluation_sets"] if name.endswith("model.safetensors")]
    assert len(names) == 2 * len(made.seeds)
    jobs = [TrainingTask(made.for_arm(arm, 0), run / arm, arm) for arm in ("Transformer", "V1")]
    for one in jobs:
        place(one, began)
    trainer.train_job(jobs[0].job, jobs[0].directory)
    changed = checkpoint(copied) / "model.safetensors"
    values = load_file(changed)
    save_file({name: value + 1 for name, value in values.items()}, changed, {"format": "pt"})
    with pytest.raises(CorpusError, match=r"the file '.*v1/seed-0/model/model\.safetensors' has changed"):
        trainer.train_job(jobs[1].job, jobs[1].directory)

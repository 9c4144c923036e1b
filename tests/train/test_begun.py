"""Training that begins with a checkpoint: retrofits, what is trained by name, schedules, instructions, resumption."""

from __future__ import annotations

import json
import shutil
import tomllib
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.train.small import write_corpus
from torch import Tensor

from clearhead.data.prepare import prepare
from clearhead.data.readers import CorpusError
from clearhead.models import ClearheadConfig, ClearheadForCausalLM
from clearhead.nn import ProjectedAttention
from clearhead.runs.recipe import Recipe, RecipeError, Train
from clearhead.runs.recipe_io import dump_toml, load_job, parse_recipe
from clearhead.runs.rows import data_spec, training_rows
from clearhead.train import trainer
from clearhead.train.begun import begun_model, with_attention
from clearhead.train.comparison import check_models, prepare_rows
from clearhead.train.optimiser import adamw
from clearhead.train.pool import TrainingTask, place
from clearhead.train.trainable import choose_part, trained_numbers
from clearhead.variants.schedule import TrainingProgress

TEMPLATE = (
    "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}<end>\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
STEPS = 4
ARMS: list[dict[str, Any]] = [
    {"name": "plain"},
    {"name": "W_O", "train": {"trainable": "lora", "lora_rank": 1, "lora_modules": ["o_proj"]}},
    {"name": "mirror", "retrofit": {"attention": "differential_v2", "init": "mirror"}},
    {
        "name": "own",
        "retrofit": {"attention": "differential", "layers": "upper", "options": {"lambda_warmup": 8}},
        "train": {"trainable": "new"},
    },
    {
        "name": "dex",
        "retrofit": {"attention": "dex", "options": {"anneal": 3}},
        "train": {"trainable": "lora", "lora_rank": 2},
    },
]


@pytest.fixture(scope="module")
def begun(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A corpus, and a tiny plain model with the tokenizer of that corpus, for two seeds."""
    folder = tmp_path_factory.mktemp("begun")
    corpus = write_corpus(folder / "corpus")
    raw = recipe_of(corpus, "unused", [{"name": "plain"}])
    raw |= {"tokenizer": {"vocab_size": 300}, "model": {}}
    tokenizer = prepare(data_spec(parse_recipe(raw, source="test"))).tokenizer
    tokenizer.chat_template = TEMPLATE
    for seed in (0, 1):
        torch.manual_seed(seed)
        config = ClearheadConfig(
            vocab_size=len(tokenizer),
            hidden_size=16,
            intermediate_size=32,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            initializer_range=0.2,
        )
        ClearheadForCausalLM(config).save_pretrained(folder / f"plain-{seed}")
        tokenizer.save_pretrained(folder / f"plain-{seed}")
    return {"folder": folder, "corpus": corpus}


def recipe_of(corpus: Path, start: str, arms: list[dict[str, Any]], **data: Any) -> dict[str, Any]:
    batch = 2 * data.get("length", 32)
    train = {"tokens": STEPS * batch, "batch_tokens": batch, "learning_rate": 4e-3}
    train |= {"save_every": 2, "log_every": 2}
    return {
        "name": "begun",
        "seeds": [0],
        "corpus": {"source": str(corpus), "validation_fraction": 0.2},
        "tokenizer": {"source": start.replace("{seed}", "0")},
        "data": {"length": 32, **data},
        "model": {"from": start},
        "train": train,
        "evaluate": {"suites": []},
        "arms": arms,
    }


def recipe(begun: dict[str, Path], arms: list[dict[str, Any]] = ARMS, **data: Any) -> Recipe:
    raw = recipe_of(begun["corpus"], f"{begun['folder']}/plain-{{seed}}", arms, **data)
    return parse_recipe(raw, source="test")


def task(recipe: Recipe, arm: str, run: Path) -> TrainingTask:
    made = TrainingTask(recipe.for_arm(arm, 0), run, arm)
    place(made)
    return made


def trained(recipe: Recipe, arm: str, run: Path) -> dict[str, Tensor]:
    made = task(recipe, arm, run)
    trainer.train_job(load_job(made.directory / "job.json"), made.directory)
    return ClearheadForCausalLM.from_pretrained(run / "model").state_dict()


@pytest.mark.parametrize("arm", [arm["name"] for arm in ARMS])
def test_an_arm_trains_its_part_and_nothing_else(arm: str, begun: dict[str, Path], tmp_path: Path) -> None:
    made = recipe(begun)
    before = begun_model(made.for_arm(arm, 0), tmp_path, prepare(data_spec(made))).state_dict()
    after = trained(made, arm, tmp_path)
    assert before.keys() == after.keys()
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    buffers = {name for name in moved if name.endswith("progress")}
    moved -= buffers
    matrices = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
    if arm == "W_O":
        assert moved == {f"model.layers.{i}.self_attn.o_proj.weight" for i in (0, 1)}
    elif arm == "own":
        own = {f"model.layers.1.self_attn.variant.lambda_{n}" for n in ("q1", "k1", "q2", "k2")}
        assert moved == own | {f"model.layers.1.self_attn.{part}_proj.weight" for part in "qk"}
        old = torch.arange(before["model.layers.1.self_attn.q_proj.weight"].shape[0]) // 4 % 2 == 0
        name = "model.layers.1.self_attn.q_proj.weight"
        assert torch.equal(before[name][old], after[name][old])
        assert bool((before[name][~old] != after[name][~old]).all())
        assert buffers == {"model.layers.1.self_attn.variant.warmup.progress"}
        assert float(after[next(iter(buffers))]) == STEPS / 8
    elif arm == "dex":
        assert {name for name in before if name.split(".")[-2] in matrices} <= moved
        assert not any("norm" in name or "embed" in name for name in moved)
        assert all(float(after[name]) == 1.0 for name in buffers) and len(buffers) == 2
    else:
        assert moved == set(before) - buffers
    cost = json.loads((tmp_path / "cost.json").read_text())
    assert 0 < cost["trained_parameters"] <= cost["parameters"]
    assert not (tmp_path / "start").exists() and not (tmp_path / ".start.lock").exists()


def test_a_training_that_was_interrupted_ends_with_the_same_weights(
    begun: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With LoRA, a schedule, and a start that is not made again."""
    made, arm = recipe(begun), "dex"
    whole = trained(made, arm, tmp_path / "whole")

    class Stopped(Exception):
        pass

    def stop(*arguments: Any) -> None:
        raise Stopped

    monkeypatch.setattr(trainer, "drop_old", stop)
    with pytest.raises(Stopped):
        trained(made, arm, tmp_path / "again")
    monkeypatch.undo()
    assert not (tmp_path / "again" / "model").exists()
    again = trained(made, arm, tmp_path / "again")
    assert all(torch.equal(whole[name], again[name]) for name in whole)


def small_model(attention: str, **options: Any) -> ClearheadForCausalLM:
    sizes: dict[str, Any] = {"hidden_size": 16, "num_attention_heads": 4, "num_hidden_layers": 2}
    return ClearheadForCausalLM(
        ClearheadConfig(vocab_size=9, attention=attention, attention_options=options, **sizes)
    )


@pytest.mark.parametrize(("attention", "options"), [("differential_v2", {}), ("diff_lora", {"rank": 2})])
def test_weight_decay_does_not_move_rows_that_are_not_trained(
    attention: str, options: dict[str, Any]
) -> None:
    model = small_model(attention, **options)
    train = Train(trainable="new", weight_decay=0.5, learning_rate=0.1)
    part = choose_part(model, train)
    assert trained_numbers(model, part) == sum(
        sum(p.numel() for p in layer.variant.parameters())
        + sum(int(rows.sum()) * 16 for rows in layer.variant.new_rows().values())
        for layer in model.modules()
        if isinstance(layer, ProjectedAttention)
    )
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer = adamw(model, train, part.partial)
    for _ in range(3):
        model(torch.arange(1, 8)[None], labels=torch.arange(1, 8)[None]).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    for index, layer in enumerate(model.model.layers):
        for name, rows in layer.self_attn.variant.new_rows().items():
            weight = getattr(layer.self_attn, name).weight
            old = before[f"model.layers.{index}.self_attn.{name}.weight"]
            assert torch.equal(weight[~rows], old[~rows])
            assert bool((weight[rows] != old[rows]).any())


def test_attention_alone() -> None:
    model = small_model("softmax")
    choose_part(model, Train(trainable="attention"))
    found = {name for name, p in model.named_parameters() if p.requires_grad}
    assert found == {f"model.layers.{i}.self_attn.{part}_proj.weight" for i in (0, 1) for part in "qkvo"}


def test_a_schedule_that_has_ended_is_left_alone(begun: dict[str, Path], tmp_path: Path) -> None:
    """A model that was retrofitted and trained, and is trained on."""
    model = ClearheadForCausalLM.from_pretrained(begun["folder"] / "plain-0")
    config = model.config.to_dict() | {"attention": "dex", "attention_options": {"anneal": 3}}
    further = ClearheadForCausalLM(ClearheadConfig.from_dict(config))
    for part in further.modules():
        if isinstance(part, TrainingProgress):
            part.progress.fill_(0.5)
    further.save_pretrained(tmp_path / "further")
    raw = recipe_of(begun["corpus"], str(tmp_path / "further"), [{"name": "on"}])
    raw["tokenizer"] = {"source": str(begun["folder"] / "plain-0")}
    after = trained(parse_recipe(raw, source="test"), "on", tmp_path / "run")
    assert {float(value) for name, value in after.items() if name.endswith("progress")} == {0.5}


# --- instruction data ---


def instructions(folder: Path, lines: list[dict[str, Any]]) -> Path:
    file = folder / "talk.jsonl"
    file.write_text("\n".join(json.dumps(line) for line in lines) + "\n")
    return file


def test_the_loss_is_on_completions_alone(begun: dict[str, Path], tmp_path: Path) -> None:
    talk = [
        {"messages": [{"role": "user", "content": "sat?"}, {"role": "assistant", "content": "The cat"}]},
        {"prompt": "mat?", "completion": "on it"},
    ]
    made = recipe(begun, instructions=str(instructions(tmp_path, talk)), length=96)
    data = prepare(data_spec(made))
    rows = training_rows(made.for_arm("plain", 0), data)
    row = rows[0]
    tokenizer = data.tokenizer
    assert set(row) == {"input_ids", "labels", "position_ids"} and len(row["input_ids"]) == 96
    starts = [i for i, place in enumerate(row["position_ids"]) if place == 0]
    assert len(starts) == 3, "two conversations and padding"
    learned = []
    for first, last in pairwise(starts):
        ids, labels = row["input_ids"][first:last], row["labels"][first:last]
        taught = labels != -100
        assert (ids[taught] == labels[taught]).all()
        learned.append(tokenizer.decode(ids[taught]))
        text = tokenizer.decode(ids)
        assert text.startswith("<user>") and text.endswith("<end>\n")
    assert sorted(learned) == ["The cat<end>\n", "on it<end>\n"]
    assert (row["labels"][starts[2] :] == -100).all()
    assert (rows[0]["input_ids"] == training_rows(made.for_arm("plain", 0), data)[0]["input_ids"]).all()


def test_training_on_instructions(begun: dict[str, Path], tmp_path: Path) -> None:
    talk = [{"prompt": f"say {i}", "completion": f"it is {i * i}"} for i in range(7)]
    made = recipe(begun, instructions=str(instructions(tmp_path, talk)))
    prepare_rows(made, tmp_path, lambda text: None)
    began = json.loads((tmp_path / "data.json").read_text())["evaluation_sets"]
    assert any(name.endswith("talk.jsonl") for name in began)
    assert any(name.endswith("plain-0/model.safetensors") for name in began)
    after = trained(made, "mirror", tmp_path / "run")
    assert all(bool(value.isfinite().all()) for value in after.values())
    records = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert all(record["bits_per_byte"] is None for record in records)


@pytest.mark.parametrize("changed", ["talk.jsonl", "plain-0/model.safetensors"])
def test_files_that_changed_since_the_run_began_are_refused(
    changed: str, begun: dict[str, Path], tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(begun["folder"], tmp_path / "begun"))
    talk = [{"prompt": f"say {i}", "completion": f"it is {i * i}"} for i in range(7)]
    here = {"folder": folder, "corpus": folder / begun["corpus"].name}
    made = recipe(here, instructions=str(instructions(folder, talk)))
    run = tmp_path / "run"
    run.mkdir()
    began = prepare_rows(made, run, lambda text: None)
    later = TrainingTask(made.for_arm("mirror", 0), run / "mirror", "mirror")
    place(later, began)
    other = (folder / changed).with_stem("other")
    if changed.endswith(".jsonl"):
        other.write_text((folder / changed).read_text().replace("it is", "it was"))
    else:
        other.write_bytes((folder / "plain-1" / "model.safetensors").read_bytes())
    other.replace(folder / changed)
    with pytest.raises(CorpusError, match=rf"the file '.*{changed}' has changed since the run began"):
        trainer.train_job(later.job, later.directory)


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ({"text": "x"}, "line 1 of '{file}' has neither 'messages' nor 'prompt' and 'completion'"),
        ({"messages": [{"role": "user", "content": "x"}]}, "one of them the assistant's"),
        ({"messages": "x"}, "messages must be a list of objects"),
    ],
)
def test_lines_that_are_no_conversation(
    line: dict[str, Any], words: str, begun: dict[str, Path], tmp_path: Path
) -> None:
    file = instructions(tmp_path, [line])
    made = recipe(begun, instructions=str(file))
    with pytest.raises(ValueError) as error:
        training_rows(made.for_arm("plain", 0), prepare(data_spec(made)))
    assert words.format(file=file) in str(error.value)


# --- recipes ---


def test_a_recipe_says_what_its_arms_begin_with(begun: dict[str, Path]) -> None:
    made = recipe(begun)
    again = parse_recipe(tomllib.loads(dump_toml(made)), source="again")
    assert again == made
    assert made.for_arm("own", 1).start == f"{begun['folder']}/plain-1"
    counts = check_models(made)
    # Two layers: queries twice and W_λ; in one layer queries and keys twice and four vectors; W_D and one number.
    assert counts["mirror"] - counts["plain"] == 2 * (16 * 16 + 4 * 16)
    assert counts["own"] - counts["plain"] == 16 * 16 + 8 * 16 + 4 * 4
    assert counts["dex"] - counts["plain"] == 2 * (4 * 4 + 1)
    assert counts["W_O"] == counts["plain"]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"model": {"from": "x", "hidden_size": 16}}, "model.hidden_size cannot be set beside model.from"),
        ({"tokenizer": {}}, "model.from needs the checkpoint's own tokenizer"),
        ({"model": {"from": 3}}, "model.from must name a checkpoint, got 3"),
        ({"arms": [{"name": "a", "model": {"hidden_size": 16}}]}, "the model is the checkpoint's: leave out"),
        ({"arms": [{"name": "a", "attention": "dex", "retrofit": {"attention": "dex"}}]}, "attention is retrofit's"),
        ({"arms": [{"name": "a", "retrofit": {"attention": "dx"}}]}, "unknown attention 'dx'"),
        ({"arms": [{"name": "a", "train": {"trainable": "new"}}]}, "a plain model has nothing new"),
        ({"model": {}, "tokenizer": {}, "arms": [{"name": "a", "retrofit": {"attention": "dex"}}]}, "set model.from"),
        ({"model": {}, "tokenizer": {}, "train": {"trainable": "attention"}}, "needs model.from"),
        ({"data": {"instructions": "x.jsonl", "needle_share": 0.1}}, "instructions take all rows"),
    ],
)  # fmt: skip
def test_recipes_that_cannot_be(change: dict[str, Any], words: str, begun: dict[str, Path]) -> None:
    raw = recipe_of(begun["corpus"], str(begun["folder"] / "plain-0"), [{"name": "plain"}])
    raw["data"] |= change.pop("data", {})
    raw["train"] |= change.pop("train", {})
    with pytest.raises(RecipeError, match=words):
        parse_recipe(raw | change, source="test")


def test_an_arm_has_the_attention_of_its_checkpoint(begun: dict[str, Path], tmp_path: Path) -> None:
    raw = recipe_of(begun["corpus"], str(begun["folder"] / "plain-0"), [{"name": "a", "attention": "dex"}])
    with pytest.raises(RecipeError, match="attention 'dex' is not what its checkpoint has, 'softmax'"):
        check_models(parse_recipe(raw, source="test"))
    small_model("differential_v2", lambda_bias=-1.0).save_pretrained(tmp_path / "v2")
    raw = recipe_of(begun["corpus"], str(begun["folder"] / "plain-0"), [{"name": "v2"}])
    raw["model"] = {"from": str(tmp_path / "{arm}")}
    told = with_attention(parse_recipe(raw, source="test")).for_arm("v2", 0)
    assert (told.attention, told.model["attention_options"]) == ("differential_v2", {"lambda_bias": -1.0})


@pytest.mark.parametrize(
    ("retrofit", "start", "words"),
    [
        ({"attention": "dex", "init": "mirror"}, "plain-0", "'mirror' is no way to begin with 'dex'"),
        (
            {"attention": "dex", "options": {"annal": 3}},
            "plain-0",
            "no option 'annal': did you mean 'anneal'",
        ),
        ({"attention": "dex"}, "plain-{seed}", "plain-7"),
    ],
)
def test_what_cannot_begin_is_found_before_anything_runs(
    retrofit: dict[str, Any], start: str, words: str, begun: dict[str, Path]
) -> None:
    raw = recipe_of(begun["corpus"], f"{begun['folder']}/{start}", [{"name": "a", "retrofit": retrofit}])
    with pytest.raises(RecipeError, match=words):
        check_models(parse_recipe(raw | {"seeds": [0, 7]}, source="test"))

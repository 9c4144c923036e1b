"""Every task trains: its loss is a sum by hand, arms see the same, a killed run ends with the same weights."""

import json
import math
import shutil
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.train import small, task_runs
from tests.train.task_runs import SAVE_EVERY, STEPS, TASKS, recipe

from clearhead.data.prepare import PreparedData, prepare
from clearhead.data.readers import CorpusError
from clearhead.models.tasks import collate, mean_by_row, task_of
from clearhead.runs.recipe import RecipeError
from clearhead.runs.recipe_io import parse_recipe
from clearhead.runs.rows import data_spec
from clearhead.train import trainer
from clearhead.train.comparison import check_models, prepare_rows
from clearhead.train.pool import TrainingTask, place
from clearhead.train.probe import make_probe

PATIENCE = 300


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    made = task_runs.write_data(tmp_path_factory.mktemp("project"))
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CLEARHEAD_CACHE", str(made.parent / "cache"))
        yield made
    torch.set_num_threads(threads)


def log(run: Path) -> list[Any]:
    """What was logged, without times."""
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in r.items() if "second" not in k} for r in records]


@pytest.mark.parametrize("kind", TASKS)
def test_a_killed_run_ends_with_the_same_weights(corpus: Path, kind: str) -> None:
    whole, run = corpus.parent / f"{kind}-whole", corpus.parent / f"{kind}-killed"
    environment = {"CLEARHEAD_CACHE": str(corpus.parent / "cache"), "OMP_NUM_THREADS": "1"}
    killed = small.process(task_runs.train_until_killed, corpus, run, kind, environment)
    task_runs.train(corpus, whole, kind)
    killed.join(PATIENCE)
    assert killed.exitcode == -signal.SIGKILL
    assert not (run / "model").exists() and (run / "checkpoints" / f"checkpoint-{SAVE_EVERY}").exists()
    task_runs.train(corpus, run, kind)
    weights = [(folder / "model" / "model.safetensors").read_bytes() for folder in (whole, run)]
    assert weights[0] == weights[1]
    assert log(run) == log(whole)
    assert log(whole)[-1]["step"] == STEPS
    found = next(record["probe"] for record in reversed(log(whole)) if "probe" in record)
    if kind == "classify":
        assert set(found) == {"validation_loss", "validation_accuracy"}
    else:
        assert set(found) == {"validation_loss", "validation_bits_per_byte"}


def test_examples_that_changed_since_the_run_began_are_refused(corpus: Path, tmp_path: Path) -> None:
    copied = shutil.copytree(corpus.parent, tmp_path / "project")
    made = task_runs.recipe(copied / corpus.name, "classify")
    run = tmp_path / "run"
    run.mkdir()
    began = prepare_rows(made, run, lambda text: None)
    jobs = [TrainingTask(made.for_arm(arm, 0), run / arm, arm) for arm in ("Transformer", "V2")]
    for one in jobs:
        place(one, began)
    trainer.train_job(jobs[0].job, jobs[0].directory)
    examples = copied / "pairs.jsonl"
    examples.write_text(examples.read_text().replace("cat", "dog"))
    with pytest.raises(CorpusError, match=r"the file '.*pairs\.jsonl' has changed since the run began"):
        trainer.train_job(jobs[1].job, jobs[1].directory)


def opened(corpus: Path, kind: str, arm: str = "V2", seed: int = 0) -> tuple[Any, Any, PreparedData]:
    job = recipe(corpus, kind).for_arm(arm, seed)
    return task_of(job.task), job, prepare(data_spec(job))


@pytest.mark.parametrize("kind", [*TASKS, "gaps"])
def test_arms_see_the_same_rows_in_the_same_order(corpus: Path, kind: str) -> None:
    made = [opened(corpus, kind, arm) for arm in ("Transformer", "V2")]
    one, other = (task.rows(job, data) for task, job, data in made)
    assert len(one) == len(other) == STEPS * 4
    # As a run that goes on from a checkpoint asks for them: from the middle on.
    for index in (*range(10, len(one)), 3):
        assert set(one[index]) == set(other[index])
        assert all((one[index][key] == other[index][key]).all() for key in one[index])
    task, job, data = opened(corpus, kind, seed=1)
    again = task.rows(job, data)
    assert any((again[i]["input_ids"] != one[i]["input_ids"]).any() for i in range(8))
    held = [t.held_out(j, d, 6) for t, j, d in made]
    assert all((a[k] == b[k]).all() for a, b in zip(*held, strict=True) for k in a)


@pytest.mark.parametrize("kind", [*TASKS, "gaps"])
def test_the_loss_is_the_mean_by_row_of_means_by_label(corpus: Path, kind: str) -> None:
    task, job, data = opened(corpus, kind)
    torch.manual_seed(0)
    model = task.untrained(job, data).double().eval()
    rows = task.rows(job, data)
    batch = collate([rows[i] for i in range(4)])
    labels = batch.pop("labels")
    with torch.no_grad():
        logits = model(**batch, **task.forward).logits
    found = mean_by_row(*task.losses(logits, labels))
    expected = 0.0
    for i in range(4):
        told = {key: torch.from_numpy(rows[i][key])[None] for key in rows[i]}
        wanted = told.pop("labels")[0]
        with torch.no_grad():
            alone = model(**told, **task.forward).logits[0]
        if kind == "classify":
            assert alone.shape == (2,)
            expected -= float(alone.log_softmax(-1)[wanted]) / 4
            continue
        nats = [
            -float(alone[place].log_softmax(-1)[label])
            for place, label in enumerate(wanted.tolist())
            if label != -100
        ]
        expected += math.fsum(nats) / len(nats) / 4
    # Losses are taken in float32.
    assert abs(float(found) - expected) < 2e-6 * expected


def test_the_models_are_the_tasks_own(corpus: Path) -> None:
    names = {
        kind: type(task.untrained(job, data)).__name__
        for kind in TASKS
        for task, job, data in [opened(corpus, kind)]
    }
    assert names == {
        "masked": "ClearheadForMaskedLM",
        "classify": "ClearheadEncoderForSequenceClassification",
        "seq2seq": "ClearheadForConditionalGeneration",
    }
    task, job, data = opened(corpus, "classify")
    config = task.untrained(job, data).config
    assert (config.num_labels, config.id2label) == (2, {0: "even", 1: "odd"})
    task, job, data = opened(corpus, "masked")
    assert task.untrained(job, data).config.mask_token_id == data.tokenizer.mask_token_id == 3


@pytest.mark.parametrize("kind", TASKS)
def test_twins_differ_in_what_the_variant_adds(corpus: Path, kind: str) -> None:
    counts = check_models(recipe(corpus, kind))
    layers = 1 if kind != "seq2seq" else 3  # Encoder, decoder and between them.
    # V2 adds h · d · d_model for queries and h · d_model for λ in every layer.
    assert counts["V2"] - counts["Transformer"] == layers * (16 * 16 + 2 * 16)


def test_seeds_hold_out_different_folds(corpus: Path) -> None:
    held = []
    for seed in range(5):
        task, job, data = opened(corpus, "classify", seed=seed)
        rows = task.rows(job, data)
        learned = {row["input_ids"].tobytes() for row in (rows[i] for i in range(len(rows)))}
        here = {row["input_ids"].tobytes() for row in task.held_out(job, data, 100)}
        assert len(here) == 8 and not here & learned
        held.append(here)
    assert len(set.union(*held)) == 40


def test_the_probe_is_the_loss_of_held_out_rows(corpus: Path) -> None:
    task, job, data = opened(corpus, "classify")
    torch.manual_seed(0)
    model = task.untrained(job, data).eval()
    found = make_probe(task, job, data, model)()
    batch = collate(task.held_out(job, data, 100))
    labels = batch.pop("labels")
    with torch.no_grad():
        logits = model(**batch).logits
    assert found["validation_loss"] == pytest.approx(float(torch.nn.functional.cross_entropy(logits, labels)))
    assert found["validation_accuracy"] == float((logits.argmax(-1) == labels).float().mean())


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"task": "classify", "data": {"length": 32}}, r'task = "classify" needs data\.examples\.source'),
        ({"task": "causal"}, r'task = "causal" hides no tokens: leave out data\.masks'),
        (
            {"task": "masked", "data": {"length": 32, "examples": {"source": "a.csv"}}},
            r'task = "masked" does not read data\.examples: leave it out',
        ),
        (
            {"data": {"length": 32, "needle_share": 0.5, "needles": {"lengths": [16, 32]}}},
            r'task = "masked" has no rows of data\.needle_share, which is causal\'s',
        ),
        (
            {"data": {"length": 32, "examples": {"source": "a.txt"}}},
            r"data\.examples\.source: .*'a\.txt' is none of \.jsonl, \.jsonl\.gz, \.csv",
        ),
        (
            {"task": "mask"},
            r"task: input should be 'causal', 'masked', 'seq2seq' or 'classify', got \"mask\"",
        ),
        (
            {"model": {"from": "somewhere", "hidden_size": 16}, "tokenizer": {"source": "somewhere"}},
            r"model\.hidden_size cannot be set beside model\.from: the model is the checkpoint's",
        ),
        (
            {"train": {"stop_at_mastery": True, "probe_every": 5}},
            r'task = "masked" masters no retrieval: leave out train\.stop_at_mastery',
        ),
    ],
)
def test_recipes_that_no_task_has_are_refused(corpus: Path, change: dict[str, Any], said: str) -> None:
    raw = {**json.loads(recipe(corpus, "masked").model_dump_json(exclude_none=True)), **change}
    with pytest.raises(RecipeError, match=said):
        parse_recipe(raw, source="test")


def test_keys_of_another_family_are_refused_by_name(corpus: Path) -> None:
    for kind, key in (("masked", "cross_position"), ("seq2seq", "classifier_pooling")):
        made = recipe(corpus, kind, model={"hidden_size": 16, "num_attention_heads": 2, key: "rope"})
        with pytest.raises(RecipeError, match=rf"unknown key 'model\.{key}'"):
            check_models(made)


def test_keys_of_a_side_are_looked_at_too(corpus: Path) -> None:
    sizes = {"hidden_size": 16, "num_attention_heads": 2}
    for side, key, known in (
        ("encoder", "num_hiden_layers", "num_hidden_layers"),
        ("decoder", "classifier_pooling", ""),
        ("encoder", "vocab_size", ""),
    ):
        made = recipe(corpus, "seq2seq", model={**sizes, side: {key: 1}})
        with pytest.raises(RecipeError, match=rf"unknown key 'model\.{side}\.{key}'; .*{known}"):
            check_models(made)
    own = {"encoder": {"num_hidden_layers": 1, "attention": "differential"}, "decoder": {"sliding_window": 4}}
    check_models(recipe(corpus, "seq2seq", model={**sizes, **own}))


def test_suites_are_the_task_s_where_none_are_named(corpus: Path) -> None:
    assert recipe(corpus, "masked").evaluate.suites[0] == "masked_language_modelling"
    assert recipe(corpus, "classify").evaluate.suites[0] == "classification"
    assert recipe(corpus, "seq2seq").evaluate.suites == ["target_modelling"]
    assert recipe(corpus, "masked", evaluate={"suites": ["allocation"]}).evaluate.suites == ["allocation"]

"""Recipes whose encoders and encoder-decoders begin with a checkpoint: what they say, and what they cannot say."""

import json
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from tests.train import finetune_runs
from tests.train.finetune_runs import checkpoint, recipe

from clearhead.cli.main import app
from clearhead.data.prepare import prepare
from clearhead.models.cost import forward_flops_per_token
from clearhead.models.tasks import task_of
from clearhead.runs.directory import open_run
from clearhead.runs.recipe import RecipeError
from clearhead.runs.recipe_io import dump_toml, load_job, parse_recipe
from clearhead.runs.results import load_run
from clearhead.runs.rows import data_spec
from clearhead.train.begun import config_of, with_attention
from clearhead.train.comparison import check_models
from clearhead.train.pool import TrainingTask, place


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    yield from finetune_runs.project(tmp_path_factory)


def test_the_run_names_the_attention_of_the_checkpoint(corpus: Path, tmp_path: Path) -> None:
    made = with_attention(recipe(corpus, "classify"))
    job = made.for_arm("V1", 1)
    assert job.attention == "differential" and job.model["attention_options"] == {"lambda_init": 0.7}
    assert job.start == str(checkpoint(corpus, "v1", 1))
    open_run(tmp_path, made)
    assert [arm.attention for arm in load_run(tmp_path).arms] == ["softmax", "differential"]
    # The written recipe is a recipe, of the same run.
    again = parse_recipe(tomllib.loads((tmp_path / "recipe.toml").read_text()), source="again")
    check_models(again)
    open_run(tmp_path, with_attention(again))
    place(TrainingTask(job, tmp_path / "job", "V1"))
    assert load_job(tmp_path / "job" / "job.json").attention == "differential"


def test_what_explain_counts_is_the_checkpoint_under_the_new_head(corpus: Path) -> None:
    made = recipe(corpus, "classify")
    counts = check_models(made)
    data = prepare(data_spec(made))
    for arm in made.arms:
        config = config_of(made, arm, 0)
        model = task_of("classify").model_class(config)
        assert counts[arm.name] == sum(weight.numel() for weight in model.parameters())
        assert config.vocab_size == len(data.tokenizer) and config.num_labels == 2
    masked = config_of(recipe(corpus, "masked"), made.arms[0], 0)
    heads = 2 * 16 * (len(data.tokenizer) + 16) - 2 * 16 * (16 + 2) / 32
    counted = [forward_flops_per_token(c, 32) for c in (masked, config_of(made, made.arms[0], 0))]
    assert counted[0] - counted[1] == round(heads)
    # Four vectors of a head's width and a norm of twice that.
    assert counts["V1"] - counts["Transformer"] == 6 * 8


def test_explain_shows_them(corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    made = recipe(corpus, "classify")
    file = tmp_path / "finetune.toml"
    file.write_text(dump_toml(with_attention(made)))
    app(["explain", str(file), "--json"], standalone_mode=False)
    found = json.loads(capsys.readouterr().out)
    counts = {arm: cost["parameters"] for arm, cost in found["costs"].items()}
    assert counts == check_models(with_attention(made))
    kinds = {arm: list(kinds) for arm, kinds in found["attention"].items()}
    assert kinds == {"Transformer": ["softmax"], "V1": ["differential {'lambda_init': 0.7}"]}


def test_a_model_without_a_mask_token_fills_no_gaps(corpus: Path) -> None:
    raw = json.loads(recipe(corpus, "seq2seq").model_dump_json(exclude_none=True))
    raw["arms"] = [{"name": "V1"}]
    del raw["data"]["examples"]["source"]
    with pytest.raises(RecipeError, match=r'has no mask token, with which task = "seq2seq" hides text'):
        check_models(parse_recipe(raw, source="test"))


def test_causal_models_know_the_arm_too(corpus: Path) -> None:
    raw = json.loads(recipe(corpus, "masked").model_dump_json(exclude_none=True))
    del raw["evaluate"], raw["data"]["masks"]
    raw |= {"task": "causal", "model": {"from": str(corpus.parent / "none-{arm}-{seed}")}}
    made = parse_recipe(raw, source="test")
    assert made.for_arm("V1", 1).start == str(corpus.parent / "none-v1-1")
    with pytest.raises(RecipeError, match=r"no directory '.*none-transformer-0' .* has bert, cache, corpus"):
        check_models(made)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (
            {"arms": [{"name": "V3"}]},
            r"arms\.0 \(V3\): there is no directory '.*v3/seed-0/model' .*; '.*encoders/arms' has transformer, v1$",
        ),
        ({"seeds": [0, 7]}, r"no directory '.*transformer/seed-7/model' .*transformer' has seed-0, seed-1$"),
        ({"model": {"from": "{pairs}/arms/{arm}/seed-0"}}, r"is a 'clearhead_seq2seq' model; task = \"classify\""),
        ({"model": {"from": "{bert}"}}, r"is a 'bert' model; task = \"classify\" begins with one of this library's"),
        ({"model": {"from": "{encoders}"}}, r"is a run; give one of its models, such as '.*seed-0/model'"),
        ({"model": {"from": "{corpus}"}}, r"holds no model to begin with: it has no config\.json"),
        ({"tokenizer": {"source": "{other}"}}, r"is not the tokenizer of '.*seed-0/model'; give the checkpoint's own"),
        ({"arms": [{"name": "V1", "attention": "softmax"}]}, r"attention 'softmax' is not what its checkpoint has"),
        (
            {"arms": [{"name": "V1", "attention_options": {"lambda_init": 0.8}}]},
            r"attention_options \{'lambda_init': 0\.8\} is not what its checkpoint has, \{'lambda_init': 0\.7\}",
        ),
        ({"arms": [{"name": "V1", "retrofit": {"attention": "dex"}}]}, r'task = "classify" knows no retrofit'),
        ({"arms": [{"name": "V1", "model": {"hidden_size": 8}}]}, r"the model is the checkpoint's: leave out the arm"),
        ({"tokenizer": {}}, r"model\.from needs the checkpoint's own tokenizer"),
        ({"model": {"from": "{mixed}/seed-{seed}"}}, r"different models: softmax of .* with seed 0, differential"),
    ],
)  # fmt: skip
def test_what_cannot_begin_is_a_sentence(corpus: Path, change: dict[str, Any], words: str) -> None:
    places = {name: str(corpus.parent / name) for name in ("pairs", "bert", "encoders", "other", "mixed")}
    text = json.dumps(change)
    for name, place_ in {**places, "corpus": str(corpus)}.items():
        text = text.replace(f"{{{name}}}", place_)
    raw = json.loads(recipe(corpus, "classify").model_dump_json(exclude_none=True)) | json.loads(text)
    with pytest.raises(RecipeError, match=words):
        check_models(parse_recipe(raw, source="test"))


def test_nothing_new_to_train_is_refused(corpus: Path) -> None:
    with pytest.raises(
        RecipeError, match=r'"new": a checkpoint of task = "masked" has all that the model has'
    ):
        recipe(corpus, "masked", trainable="new")


def test_the_same_attention_may_be_said(corpus: Path) -> None:
    arms = [{"name": "V1", "attention": "differential", "attention_options": {"lambda_init": 0.7}}]
    raw = json.loads(recipe(corpus, "classify").model_dump_json(exclude_none=True)) | {"arms": arms}
    made = parse_recipe(raw, source="test")
    check_models(made)
    assert dump_toml(with_attention(made)) == dump_toml(made)

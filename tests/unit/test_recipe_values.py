"""Every value that a recipe can hold is accepted with a meaning or answered with one sentence before anything runs."""

import inspect
from pathlib import Path
from typing import Any, get_args

import pytest
from pydantic import BaseModel
from typer.testing import CliRunner

from clearhead.models import ClearheadConfig
from clearhead.models.tasks import TASKS
from clearhead.models.tasks.base import FIXED
from clearhead.runs.recipe import RESERVED_MODEL_KEYS, Recipe, RecipeError, Sweep
from clearhead.runs.recipe_io import load_recipe, parse_recipe
from clearhead.train.comparison import check_models
from clearhead.train.model_table import ModelTable

TEXT = """
name = "twins"
[model]
hidden_size = 32
num_hidden_layers = 2
num_attention_heads = 2
[sweep]
learning_rate = [1e-3, 2e-3]
seeds = [9]
[[arms]]
name = "A"
attention = "differential"
"""
ODD = [
    "nan",
    "inf",
    "-inf",
    "-1",
    "0",
    "1",
    "2",
    "1e300",
    "1.5",
    "1e-320",
    str(2**63),
    str(2**70),
    "9" * 5000,
]
ODD += ['"x"', '""', "true", "[]", "[nan]", "{}", "1979-05-27", "[[1]]", '"\\u0000"']


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("recipe") / "twins.toml"
    file.write_text(TEXT)
    return file


def keys(model: type[BaseModel], prefix: str = "") -> list[str]:
    """The dotted name of every key of a table and of the tables in it."""
    found = []
    for name, field in model.model_fields.items():
        nested = [k for k in (field.annotation, *get_args(field.annotation)) if isinstance(k, type)]
        inner = [kind for kind in nested if issubclass(kind, BaseModel)]
        found += keys(inner[0], f"{prefix}{name}.") if inner else [f"{prefix}{name}"]
    return found


OPTIONS = ["lambda_init", "head_norm", "norm_eps", "lambda_std"]
EVERY = [key for key in keys(Recipe) if key not in ("arms", "model", "evaluate.suites")]
EVERY += [f"arms.0.{key}" for key in ("name", "attention", "attention_options", "model", "train")]
EVERY += [f"model.{key}" for key in ModelTable.model_fields]
EVERY += [f"model.rope_parameters.{key}" for key in ("rope_theta", "rope_type", "factor")]
EVERY += [f"arms.0.attention_options.{key}" for key in OPTIONS]
EVERY += ["evaluate.suites", "arms.0.train.learning_rate", "arms.0.train.betas"]


def accepted(path: Path, *overrides: str) -> bool:
    """Whether a recipe is taken; anything but a RecipeError in one line goes through."""
    try:
        check_models(load_recipe(path, overrides))
    except RecipeError as error:
        assert "\n" not in str(error)
        return False
    return True


@pytest.mark.parametrize("key", EVERY)
def test_any_value_of_any_key_is_taken_or_refused_in_a_sentence(path: Path, key: str) -> None:
    taken = {value for value in ODD if accepted(path, f"{key}={value}")}
    # No number of a recipe can be any of these; whole numbers have a smaller end.
    assert not taken & {"nan", "inf", "-inf", "[nan]", "9" * 5000, "[[1]]"} - TEXTUAL.get(key, set())
    assert str(2**70) not in taken or key.endswith(("learning_rate", "weight_decay", "grad_clip"))


# What is no value of TOML is text, which these take as it is.
TEXTUAL = {
    key: {"9" * 5000}
    for key in (
        "description",
        "corpus.source",
        "corpus.tokenized",
        "corpus.text_field",
        "tokenizer.source",
        "data.instructions",
    )
}


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("model.initializer_range=-1", "model.initializer_range: input should be greater than or equal to 0"),
        ("model.initializer_range=inf", "model.initializer_range: input should be a finite number"),
        ("model.embedding_initializer_range=-0.1", "model.embedding_initializer_range"),
        ("model.rms_norm_eps=inf", "model.rms_norm_eps"),
        (
            "model.tie_word_embeddings='no'",
            "model.tie_word_embeddings: input should be a valid boolean, got 'no'",
        ),
        ("model.num_hidden_layers=1000000000000", "model.num_hidden_layers"),
        ("model.hidden_size=true", "model.hidden_size"),
        (
            "model.rope_parameters={rope_theta=nan}",
            "model.rope_parameters.rope_theta must be a finite number",
        ),
        ("arms.0.attention_options={norm_eps=-1}", "attention_options.norm_eps must be in 0 to 1, got -1"),
        (
            "arms.0.attention_options={lambda_std=nan}",
            "attention_options.lambda_std must be a finite number, got nan",
        ),
        ("arms.0.attention_options={lambda_std=-1.0}", "attention_options.lambda_std"),
        (
            "arms.0.attention_options={head_norm='no'}",
            "attention_options.head_norm: input should be a valid boolean",
        ),
        ("train.learning_rate=inf", "train.learning_rate: input should be a finite number"),
        ("train.tokens=100", "train.tokens = 100 is less than one step (train.batch_tokens = 4096)"),
        ("sweep.tokens=100", "sweep.tokens = 100 is less than one step"),
        (f"train.tokens={2**63}", "train.tokens"),
        ("tokenizer.vocab_size=1000000000000", "tokenizer.vocab_size"),
        ("seeds=[-1]", "seeds.0"),
        (f"seeds=[{2**70}]", "seeds.0"),
        (f"seeds=[{2**32}]", "seeds.0"),
        ("sweep.seeds=[5, 5]", "names a seed twice"),
        ("sweep.learning_rate=[1e-3, 1.0000000001e-3]", "names a value twice"),
        ("corpus.source=''", "corpus.source: it is empty"),
        ("corpus.source=' '", "corpus.source: it is empty"),
        ('corpus.source="a\\u0000b"', "a character that cannot be seen"),
        ("corpus.text_field=''", "corpus.text_field: it is empty"),
        ("tokenizer.source=''", "tokenizer.source: it is empty"),
        ("data.needles.template='no placeholder'", "must name {key} once and then {value} once"),
        ("data.needles.template='{value} {key}'", "must name {key} once and then {value} once"),
        ("data.needles.template='{key} {key} {value}'", "must name {key} once and then {value} once"),
        ("data.needles.template='{key.__class__} {key} {value}'", "nothing else in braces"),
        ("data.needles.question='{key} {value}?'", "must end with {value}"),
        ("evaluate.suites=['needles', 'needles']", "evaluate.suites 'needles' occurs twice"),
        (f"arms.0.name={'x' * 300}", "arms.0.name: string should have at most 64 characters"),
        ('arms.0.name="a\\nb"', "arms.0.name"),
        ("name='..'", "name: string should match"),
        ("name='.hidden'", "name: string should match"),
        (f"name={'x' * 300}", "name"),
        (f"train.tokens={'9' * 5000}", "train.tokens: input should be a valid integer"),
    ],
)
def test_what_was_once_taken_though_wrong(path: Path, override: str, words: str) -> None:
    with pytest.raises(RecipeError) as caught:
        check_models(load_recipe(path, [override]))
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "override",
    [
        "data.needles.template='if x { {key} = {value} }'",
        "model.initializer_range=0.0",
        "seeds=[0, 4294967295]",
        "train.tokens=4096",
        "train.grad_clip=0",
        "arms.0.attention_options={lambda_init='depth', lambda_std=0}",
    ],
)
def test_what_has_a_meaning_is_taken(path: Path, override: str) -> None:
    assert accepted(path, override)


def test_every_key_of_a_model_has_its_range() -> None:
    assert set(ModelTable.model_fields) == {key for task in TASKS.values() for key in task.keys}
    own = {key for key in inspect.get_annotations(ClearheadConfig) if key not in RESERVED_MODEL_KEYS}
    assert set(TASKS["causal"].keys) == own - {*FIXED, "causal"}


@pytest.mark.parametrize("verb", [["explain"], ["compare"], ["train"]])
def test_every_verb_refuses_before_anything_is_written(
    path: Path, verb: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from clearhead.cli.main import app

    monkeypatch.chdir(tmp_path)
    done = CliRunner().invoke(app, [*verb, str(path), "arms.0.attention_options={head_norm='no'}"])
    assert isinstance(done.exception, RecipeError)
    assert "attention_options.head_norm" in str(done.exception)
    assert list(tmp_path.iterdir()) == []


def test_a_tokenizer_without_words_is_found_by_the_parent(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from clearhead.train.comparison import prepare_rows

    monkeypatch.setenv("CLEARHEAD_CACHE", str(tmp_path / "cache"))
    (tmp_path / "text").mkdir()
    for number in range(6):
        (tmp_path / "text" / f"{number}.txt").write_text(" ".join(str(number * j * j) for j in range(600)))
    raw: dict[str, Any] = {
        "name": "t",
        "corpus": {"source": str(tmp_path / "text"), "validation_fraction": 0.3},
        "tokenizer": {"vocab_size": 300},
        "data": {"length": 64, "needles": {"lengths": [32, 64]}},
        "evaluate": {"suites": []},
        "arms": [{"name": "A"}],
    }
    for number, changes in enumerate(
        (
            {"data": {**raw["data"], "needle_share": 0.5}},
            {"data": {**raw["data"], "pair_share": 0.5}},
            {"train": {"probe_every": 1}},
            {"evaluate": {"suites": ["needles"]}},
        )
    ):
        run = tmp_path / f"run-{number}"
        run.mkdir()
        with pytest.raises(ValueError, match=r"0 tokens that are words.*raise tokenizer\.vocab_size"):
            prepare_rows(parse_recipe({**raw, **changes}, source="test"), run, lambda text: None)
    run.rename(tmp_path / "fine")
    prepare_rows(parse_recipe(raw, source="test"), tmp_path / "fine", lambda text: None)


def test_sweep_keys_are_known() -> None:
    assert set(Sweep.model_fields) == {"learning_rate", "seeds", "tokens"}

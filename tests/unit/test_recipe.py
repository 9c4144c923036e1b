"""Recipes: what is accepted, what every kind of mistake is answered with, and what a job resolves to."""

import json
import tomllib
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from clearhead.runs.recipe import (
    FROM,
    Arm,
    ArmRetrofit,
    CorpusOptions,
    Data,
    Evaluate,
    Job,
    NeedleRows,
    Recipe,
    RecipeError,
    Scaling,
    Sweep,
    TokenizerOptions,
    Train,
)
from clearhead.runs.recipe_data import ExampleOptions, MaskOptions, SourceOptions
from clearhead.runs.recipe_io import differences, dump_toml, load_recipe, parse_recipe

TEXT = """
name = "twins"
seeds = [0, 1]

[data]
length = 64
needle_share = 0.4
pair_share = 0.2

[model]
hidden_size = 32

[train]
tokens = 10_000
batch_tokens = 512

[evaluate]
suites = ["language_modelling"]

[[arms]]
name = "Transformer"

[[arms]]
name = "DIFF V1"
attention = "differential"

[arms.train]
learning_rate = 2e-3
betas = [0.9, 0.99]

[arms.model]
num_hidden_layers = 3
"""


@pytest.fixture
def path(tmp_path: Path) -> Path:
    file = tmp_path / "twins.toml"
    file.write_text(TEXT)
    return file


def test_defaults_and_values(path: Path) -> None:
    recipe = load_recipe(path)
    assert recipe.train.learning_rate == 1e-3
    assert recipe.train.steps == 20
    assert recipe.data.needles.lengths == (32, 128)
    assert [arm.slug for arm in recipe.arms] == ["transformer", "diff-v1"]


def test_written_recipe_reads_back_equal(path: Path) -> None:
    recipe = load_recipe(path)
    assert parse_recipe(tomllib.loads(dump_toml(recipe)), source="again") == recipe


def test_job_is_resolved(path: Path) -> None:
    recipe = load_recipe(path)
    job = recipe.for_arm("DIFF V1", 1)
    assert job.model == {
        "hidden_size": 32,
        "num_hidden_layers": 3,
        "attention": "differential",
        "attention_options": {},
    }
    assert (job.train.learning_rate, job.train.betas, job.train.tokens) == (2e-3, (0.9, 0.99), 10_000)
    assert Job.model_validate_json(job.model_dump_json()) == job
    assert recipe.for_arm("diff-v1", 1, learning_rate=0.5, tokens=7).train.learning_rate == 0.5


def test_arms_differ_only_where_they_say_so(path: Path) -> None:
    recipe = load_recipe(path, ["arms.1.train={}", "arms.1.model={}"])
    one, two = (recipe.for_arm(arm.name, 0).model_dump(mode="json") for arm in recipe.arms)
    assert {text.partition(":")[0] for text in differences(one, two)} == {"arm", "slug", "model.attention"}


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("train.tokens=512", ("train", "tokens", 512)),
        ("corpus.source=my text/*.md", ("corpus", "source", "my text/*.md")),
        ("description=don't", ("description", None, "don't")),
        ("data.needles.lengths=[16, 32]", ("data", "needles", {"lengths": (16, 32)})),
        ("tokenizer.vocab_size = 512", ("tokenizer", "vocab_size", 512)),
    ],
)
def test_overrides(path: Path, override: str, expected: tuple[str, str | None, Any]) -> None:
    table, key, value = expected
    found = getattr(load_recipe(path, [override]), table)
    found = found if key is None else getattr(found, key)
    if isinstance(value, dict):
        found, value = found.lengths, value["lengths"]
    assert found == value


def test_override_of_an_arm_by_number_and_by_name(path: Path) -> None:
    by_number = load_recipe(path, ["arms.1.train.learning_rate=5e-3"])
    by_name = load_recipe(path, ["arms.DIFF V1.train.learning_rate=5e-3"])
    assert by_number == by_name
    assert by_number.for_arm("DIFF V1", 0).train.learning_rate == 5e-3


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("train.lerning_rate=1.0", ["'train.lerning_rate'", "did you mean 'learning_rate'?", "override"]),
        ("trian.tokens=1", ["'trian'", "did you mean 'train'?"]),
        ("data.needles.lenghts=[1, 2]", ["'data.needles.lenghts'", "'lengths'"]),
        ("arms.1.train.learning_rat=1.0", ["'arms.1.train.learning_rat'", "'learning_rate'"]),
        ("arms.0.atention=softmax", ["'arms.0.atention'", "'attention'"]),
        ("arms.0.attention=differentail", ["arms.0 (Transformer)", "did you mean 'differential'?"]),
        ("evaluate.suites=['language_modeling']", ["did you mean 'language_modelling'?"]),
        ("evaluate.needle.lengths=[8]", ["'evaluate.needle'", "'needles'"]),
        ("evaluate.needles.lenghts=[8]", ["evaluate.needles.lenghts", "'lengths'"]),
        ("train.tokens=lots", ["train.tokens", "integer", '"lots"']),
        ("train.tokens=1.5", ["train.tokens", "integer"]),
        ("train.tokens=0", ["train.tokens", "greater"]),
        ("train.learning_rate=nan", ["train.learning_rate"]),
        ("train.report_to=tensorboard", ["train.report_to", "array"]),
        ("train.schedule=cosin", ["train.schedule", "'cosine'"]),
        ("train.stop_at_mastery=true", ["stop_at_mastery needs probe_every"]),
        ("data.needle_share=0.9", ["needle_share + pair_share is 1.1"]),
        ("data.needles.lengths=[64, 32]", ["[smallest, largest]", "[64, 32]"]),
        ("data.needles.lengths=[100, 200]", ["longer than a row"]),
        ("train.batch_tokens=500", ["train.batch_tokens = 500", "data.length = 64", "512"]),
        ("model.vocab_size=9", ["model.vocab_size", "tokenizer"]),
        ("model.attention=softmax", ["model.attention", "[[arms]]"]),
        ("arms.1.train.tokens=5", ["arms.1 (DIFF V1)", "train.tokens", "same for all arms"]),
        ("arms.1.name=Transformer", ["'Transformer' occurs twice"]),
        ("arms.1.name=TRANSFORMER", ["'transformer' occurs twice"]),
        ("arms.1.name=§", ["letter or digit"]),
        ("arms.2.name=x", ["no '2'", "0 to 1"]),
        ("arms=[]", ["arms"]),
        ("seeds=[1, 1]", ["seeds 1 occurs twice"]),
        ("seeds=[]", ["seeds"]),
        ("name=a/b", ["name"]),
        ("name.x=1", ["'name' is not a table"]),
        ("sweep={learning_rate=[1e-3, 2e-3], seeds=[1]}", ["sweep.seeds", "[1]"]),
        ("sweep={learning_rate=[1e-3], seeds=[9]}", ["sweep.learning_rate"]),
        ("tokens", ["key=value"]),
        ("=3", ["key=value"]),
    ],
)
def test_mistakes_are_named(path: Path, override: str, words: list[str]) -> None:
    with pytest.raises(RecipeError) as caught:
        load_recipe(path, [override])
    message = str(caught.value)
    assert "\n" not in message
    for word in words:
        assert word in message
    assert str(path) in message or repr(override) in message


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("model.hiden_size=32", ["'model.hiden_size'", "'hidden_size'"]),
        ("model.output_attentions=true", ["'model.output_attentions'"]),
        ("arms.1.model.num_layers=3", ["arms.1 (DIFF V1)", "'model.num_layers'"]),
        ("model.hidden_size=30", ["arms.0 (Transformer)", "hidden_size", "30"]),
        ("model.hidden_size=wide", ["hidden_size", "'wide'"]),
        ("model.num_key_value_heads=3", ["(3)"]),
        ("model.num_key_value_heads=1", ["arms.1 (DIFF V1)", "must be even"]),
        ("model.position=ropes", ["did you mean 'rope'?"]),
        ("arms.1.attention_options={lambda_int=0.5}", ["arms.1 (DIFF V1)", "did you mean 'lambda_init'?"]),
        ("arms.1.attention_options={lambda_init=2.0}", ["arms.1 (DIFF V1)", "lambda_init"]),
    ],
)
def test_model_mistakes_are_named(path: Path, override: str, words: list[str]) -> None:
    from clearhead.train.comparison import check_models

    with pytest.raises(RecipeError) as caught:
        check_models(load_recipe(path, [override]))
    for word in words:
        assert word in str(caught.value)


def test_loggers_are_known_and_installed(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers.integrations import integration_utils

    from clearhead.train.comparison import check_loggers

    def fault(*loggers: str) -> str:
        with pytest.raises(RecipeError) as caught:
            check_loggers(load_recipe(path, [f"train.report_to={list(loggers)}"]))
        return str(caught.value)

    monkeypatch.setattr(integration_utils, "get_available_reporting_integrations", lambda: ["mlflow"])
    check_loggers(load_recipe(path, []))
    check_loggers(load_recipe(path, ["train.report_to=['mlflow', 'tensorboard']"]))
    assert "no logger 'wandbb'; did you mean 'wandb'?" in fault("wandbb")
    assert "'wandb' is not installed here" in fault("tensorboard", "wandb")


def test_file_mistakes(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"there is no recipe .*none\.toml"):
        load_recipe(tmp_path / "none.toml")
    with pytest.raises(RecipeError, match="cannot be read"):
        load_recipe(tmp_path)
    broken = tmp_path / "broken.toml"
    broken.write_text("name = [")
    with pytest.raises(RecipeError, match=r"broken\.toml: not valid TOML"):
        load_recipe(broken)
    broken.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(RecipeError, match="cannot be read"):
        load_recipe(broken)
    broken.write_text("")
    with pytest.raises(RecipeError, match="'name' is missing"):
        load_recipe(broken)


def test_unknown_arm(path: Path) -> None:
    with pytest.raises(RecipeError, match=r"no arm 'V3'; it has 'Transformer', 'DIFF V1'"):
        load_recipe(path).for_arm("V3", 0)


KEYS = ["name", "arms", "train", "tokens", "data", "length", "evaluate", "suites", "model", "seeds"]
TABLES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(KEYS), inner, max_size=4),
    max_leaves=12,
)


@given(TABLES)
def test_any_table_is_a_recipe_or_a_sentence(raw: Any) -> None:
    """No input gets past the check with another kind of error."""
    try:
        assert isinstance(parse_recipe(raw, source="any"), Recipe)
    except RecipeError as error:
        assert str(error).startswith("any")


RECIPES = Path(__file__).parents[2] / "recipes"


@pytest.mark.parametrize(
    "shipped",
    sorted([*RECIPES.glob("*.toml"), *RECIPES.glob("retrofit/*.toml")]),
    ids=lambda p: p.relative_to(RECIPES).with_suffix("").as_posix().replace("/", "-"),
)
def test_shipped_recipes_are_valid(shipped: Path, tmp_path: Path) -> None:
    from clearhead.train.comparison import check_models

    # Examples are the user's own.
    examples = tmp_path / "examples.jsonl"
    lines = ({"text": f"number {i}", "label": "odd" if i % 2 else "even"} for i in range(20))
    examples.write_text("\n".join(map(json.dumps, lines)))
    overrides = []
    if tomllib.loads(shipped.read_text()).get("task") == "classify":
        overrides = [f"data.examples.source={examples}"]
    recipe = load_recipe(shipped, overrides)
    assert recipe.name == "-".join(shipped.relative_to(RECIPES).with_suffix("").parts)
    assert recipe.description
    if FROM in recipe.model:
        recipe = load_recipe(shipped, [*overrides, *untrained(recipe, tmp_path)])
    assert all(count > 0 for count in check_models(recipe).values())


BASES = {"retrofit-base": RECIPES / "retrofit" / "base.toml", "encoder": RECIPES / "encoder.toml"}


def untrained(recipe: Recipe, folder: Path) -> list[str]:
    """What another recipe makes, untrained, as overrides of a recipe that begins with it; its names are checked."""
    from clearhead.data.tokenizer import train_bpe, wrap
    from clearhead.models import ClearheadConfig, ClearheadForCausalLM
    from clearhead.models.tasks import task_of

    named = Path(str(recipe.model[FROM]))
    if named == Path("runs/smollm2-base"):
        # A converted model: one of its family, of other sizes.
        assert recipe.tokenizer.source == str(named) == recipe.evaluate.options("kept")["original"]
        sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
        tiny = ClearheadConfig(vocab_size=300, num_key_value_heads=2, max_position_embeddings=512, **sizes)
        ClearheadForCausalLM(tiny).save_pretrained(folder / "base")
        return [f"model.from={folder / 'base'}"]
    base = load_recipe(BASES[named.parts[1]])
    arms = {arm.slug: arm for arm in base.arms}
    wanted = {arm.slug for arm in recipe.arms} if "{arm}" in str(named) else {named.parts[3]}
    assert named.parts == ("runs", base.name, "arms", named.parts[3], "seed-{seed}", "model")
    assert wanted <= set(arms)
    assert {*recipe.seeds, *(recipe.sweep.seeds if recipe.sweep else [])} <= {*base.seeds}
    assert recipe.tokenizer.source == f"runs/{base.name}/arms/{base.arms[0].slug}/seed-0/model"
    for slug in wanted:
        config = task_of(base.task).planned(base, base.model_of(arms[slug]))
        task_of(base.task).model_class(config).save_pretrained(folder / slug)
    wrap(train_bpe(["one text"], 300, mask=True), mask=True).save_pretrained(folder / "tokenizer")
    begin = folder / ("{arm}" if "{arm}" in str(named) else named.parts[3])
    return [f"model.from={begin}", f"tokenizer.source={folder / 'tokenizer'}"]


def test_the_documented_recipe_is_complete_and_true() -> None:
    """docs/recipes.md shows every key there is, and the defaults it shows are the defaults."""
    text = (Path(__file__).parents[2] / "docs" / "recipes.md").read_text(encoding="utf-8")
    raw = tomllib.loads(text.partition("```toml")[2].partition("```")[0])
    shown = parse_recipe(raw, source="docs/recipes.md")
    for table, model in (
        ("corpus", CorpusOptions),
        ("tokenizer", TokenizerOptions),
        ("data", Data),
        ("train", Train),
    ):
        assert set(raw[table]) == set(model.model_fields) - {"instructions", "sources", "tokenized"}
        expected = model().model_copy(update={"max_bytes": 4_000_000}) if model is CorpusOptions else model()
        assert getattr(shown, table) == expected
    assert set(raw["data"]["needles"]) == set(NeedleRows.model_fields)
    assert set(raw["data"]["masks"]) == set(MaskOptions.model_fields)
    assert set(raw["data"]["examples"]) == set(ExampleOptions.model_fields) - {"source"}
    assert raw["task"] == "causal"
    assert set(raw["sweep"]) == set(Sweep.model_fields)
    assert set(raw["scaling"]) == set(Scaling.model_fields)
    assert set(raw["arms"][0]) == set(Arm.model_fields) - {"retrofit"}
    assert set(raw) == set(Recipe.model_fields)
    assert shown.evaluate.suites == Evaluate().suites


def test_the_documented_mixture_is_complete() -> None:
    """What the page of recipes leaves out of the corpus, the page of text at scale shows."""
    text = (Path(__file__).parents[2] / "docs" / "data.md").read_text(encoding="utf-8")
    raw = tomllib.loads(text.partition("```toml")[2].partition("```")[0])
    shown = parse_recipe(raw, source="docs/data.md")
    assert set(raw["corpus"]["sources"][0]) == set(SourceOptions.model_fields)
    assert shown.corpus.named == "data/web (70.0%), data/books.jsonl.gz (30.0%)"
    assert parse_recipe(tomllib.loads(dump_toml(shown)), source="again") == shown


@pytest.mark.parametrize(
    ("corpus", "said"),
    [
        ({"source": "a", "sources": [{"source": "b"}]}, "source and sources both name the text"),
        ({"sources": [{"source": "b"}], "max_bytes": 10}, "max_bytes beside sources"),
        ({"sources": [{"source": "b"}, {"source": "b"}]}, "sources names 'b' twice"),
        ({"sources": []}, "corpus.sources"),
        ({"sources": [{"source": "b", "weight": 0}]}, r"corpus\.sources\.0\.weight"),
        ({"sources": [{"source": "b", "wieght": 1}]}, "did you mean 'weight'"),
        (
            {"sources": [{"source": "b", "weight": 1e-5}, {"source": "c"}]},
            r"weight 1e-05 of 'b' is less than 1/10,000",
        ),
    ],
)
def test_mixtures_that_cannot_be_are_refused(corpus: dict[str, Any], said: str) -> None:
    with pytest.raises(RecipeError, match=said):
        parse_recipe({"name": "t", "corpus": corpus, "arms": [{"name": "A"}]}, source="test")


def test_the_documented_retrofit_is_complete() -> None:
    """What the page of recipes leaves out, because it needs a checkpoint, the page of retrofits shows."""
    text = (Path(__file__).parents[2] / "docs" / "retrofit.md").read_text(encoding="utf-8")
    raw = tomllib.loads(text.partition("```toml")[2].partition("```")[0])
    shown = parse_recipe(raw, source="docs/retrofit.md")
    assert set(raw["arms"][1]["retrofit"]) == set(ArmRetrofit.model_fields)
    assert shown.data.instructions is not None and shown.start_of(shown.arms[0], 0) == raw["model"]["from"]


def test_differences_name_the_key() -> None:
    old = {"a": {"b": 1, "c": [1]}, "d": 1}
    assert differences(old, json.loads(json.dumps(old))) == []
    assert differences(old, {"a": {"b": 2, "c": [1]}}) == ["a.b: 1 -> 2", "d: 1 -> not set"]

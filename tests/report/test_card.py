"""Model cards: what the files say, a header that Hugging Face reads, and no card of a person's own overwritten."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from huggingface_hub import ModelCard

from clearhead.models import ClearheadConfig, ClearheadForSequenceClassification
from clearhead.report.card import write_card
from clearhead.runs.recipe_io import parse_recipe
from tests.convert.support import SIZES, ours
from tests.report.example_run import make_run


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = make_run(tmp_path_factory.mktemp("runs") / "demo")
    job = root / "arms/diff-v1/seed-1"
    recipe = parse_recipe(
        {
            "name": "demo",
            "corpus": {"source": "hf:owner/books"},
            "data": {"needle_share": 0.25},
            "arms": [{"name": "DIFF V1", "attention": "differential"}],
        },
        source="recipe",
    )
    (job / "job.json").write_text(recipe.for_arm("DIFF V1", 1).model_dump_json())
    return ours(job / "model", attention="differential", num_key_value_heads=4)


def test_a_model_of_a_run(model: Path) -> None:
    found = ModelCard.load(write_card(model.parent, licence="apache-2.0"))
    assert found.data.license == "apache-2.0" and found.data.datasets == ["owner/books"]
    assert found.data.library_name == "clearhead" and found.data.pipeline_tag == "text-generation"
    assert found.data.tags is not None and "differential" in found.data.tags
    for words in (
        "# demo: DIFF V1",
        "| tokens of a row in training | 256 |",
        "differential attention V1 (arXiv 2410.05258)",
        "in rows of 256 tokens: 75% text, 25% texts with facts to look up",
        "5,000,000 tokens in batches of 4,096; AdamW, learning rate 0.001 (cosine",
        "seed 1.",
        "trust_remote_code=True",
        "apache-2.0.",
    ):
        assert words in found.text, words
    # The report's own numbers: value, interval, n, seeds.
    (line,) = [row for row in found.text.splitlines() if row.startswith("| bits per byte")]
    value, n, seeds = (part.strip() for part in line.split("|")[2:5])
    assert value.endswith(")") and " to " in value and int(n) > 0 and seeds == "3"


def test_a_bare_directory_and_a_conversion(tmp_path: Path) -> None:
    from clearhead.convert.run import convert

    source = ours(tmp_path / "v1", attention="differential")
    (source / "LICENSE").write_text("MIT License\n\nCopyright ...")
    convert(str(source), tmp_path / "theirs", to="diff_llama")
    found = ModelCard.load(write_card(tmp_path / "theirs"))
    assert found.data.library_name == "transformers" and found.data.license == "mit"
    assert "Converted from `v1` (clearhead)" in found.text and "It is the same function" in found.text
    assert "With transformers alone" in found.text and "None are recorded here" in found.text
    assert str(tmp_path) not in found.content, "no paths of this machine"


def test_positions_windows_and_options_of_an_encoder_decoder_are_its_decoder_s(tmp_path: Path) -> None:
    from clearhead.models import ClearheadSeq2SeqConfig

    ClearheadSeq2SeqConfig(
        position="alibi",
        decoder={"sliding_window": 5},
        attention="differential",
        attention_options={"head_norm": False},
        num_hidden_layers=2,
    ).save_pretrained(tmp_path)
    write_card(tmp_path)
    text = (tmp_path / "README.md").read_text()
    assert "| positions | alibi |" in text and "| tokens that a layer sees | 5 |" in text
    assert "head_norm False" in text


def test_a_card_of_a_person_s_own_stays(tmp_path: Path) -> None:
    source = ours(tmp_path / "m")
    (source / "README.md").write_text("mine")
    with pytest.raises(ValueError, match="was not written by clearhead card"):
        write_card(source)
    write_card(source, replace=True)
    write_card(source, name="again")
    assert (
        "# again" in (source / "README.md").read_text()
        and "None was stated" in (source / "README.md").read_text()
    )
    with pytest.raises(ValueError, match="holds no model"):
        write_card(tmp_path)
    assert json.loads((source / "config.json").read_text())["model_type"] == "clearhead"


def test_a_decoder_with_a_head_for_texts_is_not_called_an_encoder(tmp_path: Path) -> None:
    model = ClearheadForSequenceClassification(ClearheadConfig(**SIZES, attention="differential"))
    model.save_pretrained(tmp_path / "model")
    text = write_card(tmp_path / "model").read_text()
    assert "A model that gives texts their labels with differential attention V1" in text
    assert "pipeline_tag: text-classification" in text and "encoder" not in text

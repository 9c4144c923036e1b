"""`clearhead tokenize` as a person types it."""

import json
from pathlib import Path

import pytest
from tests.unit.stream_text import sentences, small_shards
from typer.testing import CliRunner

from clearhead.cli.main import app

RECIPE = """
name = "streamed"
[corpus]
sources = [{source = "web.jsonl", weight = 3}, {source = "books"}]
tokenized = "tokens"
validation_fraction = 0.1
[tokenizer]
vocab_size = 300
[data]
length = 32
[[arms]]
name = "A"
"""


@pytest.fixture(autouse=True)
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("CLEARHEAD_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    small_shards(monkeypatch)
    (tmp_path / "books").mkdir()
    (tmp_path / "web.jsonl").write_text(
        "".join(json.dumps({"text": one}) + "\n" for one in sentences(80, "page"))
    )
    for number, text in enumerate(sentences(30, "book")):
        (tmp_path / "books" / f"{number}.txt").write_text(text)
    (tmp_path / "large.toml").write_text(RECIPE)
    return tmp_path


def test_texts_become_shards_and_what_is_there_is_told(project: Path) -> None:
    done = CliRunner().invoke(app, ["tokenize", "large.toml"], catch_exceptions=False)
    assert done.exit_code == 0
    lines = done.stdout.splitlines()
    assert lines[0].startswith("web.jsonl: ") and ", 75.0% of the rows: tokens/sources/web.jsonl-" in lines[0]
    assert lines[1].startswith("books: ") and lines[2].startswith("held out: ")
    told = json.loads(
        CliRunner().invoke(app, ["tokenize", "large.toml", "--json"], catch_exceptions=False).stdout
    )
    web = told["sources"]["web.jsonl"]
    assert web["share"] == 0.75 and web["shards"] == len(list(Path(web["folder"]).glob("?????.json"))) > 3
    assert web["documents"] + told["sources"]["books"]["documents"] + told["validation"]["documents"] == 110


def test_a_text_that_is_one_store_is_prepared_too(project: Path) -> None:
    (project / "small.toml").write_text(RECIPE.replace('tokenized = "tokens"\n', ""))
    arguments = ["tokenize", "small.toml", "corpus.sources=[]", "--json"]
    with pytest.raises(ValueError, match=r"corpus\.sources"):
        CliRunner().invoke(app, arguments, catch_exceptions=False)
    text = RECIPE.replace(
        'sources = [{source = "web.jsonl", weight = 3}, {source = "books"}]\ntokenized = "tokens"',
        'source = "books"',
    )
    (project / "small.toml").write_text(text)
    told = json.loads(
        CliRunner().invoke(app, ["tokenize", "small.toml", "--json"], catch_exceptions=False).stdout
    )
    assert told["sources"]["books"]["documents"] + told["validation"]["documents"] == 30

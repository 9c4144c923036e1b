"""`clearhead retrofit` as a person types it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from tests.convert.support import ours
from typer.testing import CliRunner

from clearhead.cli.main import app
from clearhead.models import ClearheadForCausalLM


def run(*arguments: str) -> str:
    result = CliRunner().invoke(app, ["retrofit", *arguments], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return " ".join(result.output.split())


def test_options_reach_the_attention(tmp_path: Path) -> None:
    source = ours(tmp_path / "plain")
    out = tmp_path / "out"
    said = run(
        *(str(source), "--attention", "differential", "--init", "random", "--layers", "1"),
        *("--option", "lambda_warmup=7", "--option", "lambda_init=0.3", "--seed", "2", "--out", str(out)),
    )
    assert "the same function" in said and "in the layers 1" in said and "new parameters" in said
    kinds = ClearheadForCausalLM.from_pretrained(out).config.layer_kinds
    assert [kind.attention for kind in kinds] == ["softmax", "differential"]
    assert kinds[1].options == {
        "values": "own",
        "head_norm": False,
        "lambda_warmup": 7,
        "lambda_init": 0.3,
    }
    record = json.loads((out / "conversion.json").read_text())
    assert record["same_function"] and record["retrofit"]["seed"] == 2
    assert (record["retrofit"]["attention"], record["retrofit"]["init"]) == ("differential", "random")


@pytest.mark.parametrize(
    ("option", "words"),
    [("lambda_warmup", "is not of the form key=value"), ("a.b=3", "is not of the form name=value")],
)
def test_an_option_that_is_none(option: str, words: str, tmp_path: Path) -> None:
    source = ours(tmp_path / "plain")
    arguments = [str(source), "--attention", "differential", "--option", option, "--out", str(tmp_path / "o")]
    with pytest.raises(ValueError, match=words):
        CliRunner().invoke(app, ["retrofit", *arguments], catch_exceptions=False)
    assert not (tmp_path / "o").exists()

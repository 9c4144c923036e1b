"""The command line as a person meets it: one sentence for what went wrong, exit codes, no traceback."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from clearhead.cli.main import main

ROOT = Path(__file__).parents[2]
RECIPE = 'name = "t"\n[[arms]]\nname = "A"\n'


def clearhead(*arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    """Run the command in a fresh process, with no terminal."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "src"), "COLUMNS": "100"}
    return subprocess.run(
        [sys.executable, "-m", "clearhead", *arguments],
        capture_output=True,
        text=True,
        cwd=cwd,
        env=environment,
    )


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    path = tmp_path / "t.toml"
    path.write_text(RECIPE)
    return path


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["compare", "nowhere.toml"], "there is no recipe 'nowhere.toml'"),
        (["compare", "t.toml", "trian.tokens=3"], "did you mean 'train'?"),
        (["compare", "t.toml", "--out", "t.toml"], "cannot write to 't.toml'"),
        (["compare", "t.toml", "model.hiden_size=3"], "did you mean 'hidden_size'?"),
        (["train", "t.toml", "--arm", "B"], "no arm 'B'; it has 'A'"),
        (["evaluate", "."], "neither a run directory nor a trained model"),
        (["report", "."], "not a run directory"),
        (["generate", "nowhere", "text"], "there is no model at 'nowhere'"),
        (["generate", ".", "text"], "holds no model"),
        (["explain", "t.toml", "--dtype", "int4"], "'int4' is none of"),
    ],
)
def test_mistakes_end_in_one_sentence(
    recipe: Path,
    arguments: list[str],
    words: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(recipe.parent)
    monkeypatch.setattr(sys, "argv", ["clearhead", *arguments])
    with pytest.raises(SystemExit) as end:
        main()
    assert end.value.code == 2
    out, errors = capsys.readouterr()
    assert words in errors
    assert len(errors.strip().splitlines()) == 1
    assert out == ""


def test_unknown_verb_and_missing_argument(tmp_path: Path) -> None:
    for arguments in (["compair"], ["compare"], ["compare", "t.toml", "--no-such-option"]):
        done = clearhead(*arguments, cwd=tmp_path)
        assert done.returncode == 2
        assert "Traceback" not in done.stderr


def test_debug_shows_the_traceback(recipe: Path) -> None:
    done = clearhead("compare", "nowhere.toml", "--debug", cwd=recipe.parent)
    assert "Traceback" in done.stderr
    assert "RecipeError" in done.stderr


def test_explain(recipe: Path) -> None:
    recipe.write_text(RECIPE + '[[arms]]\nname = "B"\nattention = "differential"\n')
    done = clearhead(
        "explain", "t.toml", "model.hidden_size=64", "model.num_hidden_layers=2", cwd=recipe.parent
    )
    assert done.returncode == 0, done.stderr
    for word in (
        "FlashDiffAttn_1",
        "refused: it does not return attention maps",
        "<- auto",
        'attn_implementation="clearhead", the default',
        "flash_attention_2",
    ):
        assert word in done.stdout

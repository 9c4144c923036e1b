"""Run directories: who may write, which recipe they belong to, whether there is room."""

import json
import os
import shutil
import subprocess
import sys
from collections import namedtuple
from pathlib import Path
from typing import Any

import pytest

from clearhead.runs.directory import check_space, check_writable, keep_data, open_run, set_aside
from clearhead.runs.environment import environment
from clearhead.runs.lock import RunError, exclusive
from clearhead.runs.recipe import Recipe
from clearhead.runs.recipe_io import load_recipe, parse_recipe


def recipe(**changes: Any) -> Recipe:
    return parse_recipe({"name": "t", "arms": [{"name": "A"}], **changes}, source="test")


def test_open_writes_recipe_and_environment(tmp_path: Path) -> None:
    open_run(tmp_path, recipe())
    assert load_recipe(tmp_path / "recipe.toml") == recipe()
    env = json.loads((tmp_path / "env.json").read_text())
    assert env["versions"]["torch"]
    assert set(env) == set(environment())


def test_another_recipe_is_refused_and_the_key_named(tmp_path: Path) -> None:
    open_run(tmp_path, recipe())
    with pytest.raises(RunError, match=r"train\.tokens: 5000000 -> 9000.*--out.*--fresh"):
        open_run(tmp_path, recipe(train={"tokens": 9000}))
    with pytest.raises(RunError, match=r"arms\.A\.attention: \"softmax\" -> \"collinear\""):
        open_run(tmp_path, recipe(arms=[{"name": "A", "attention": "collinear"}]))


def test_a_run_may_grow(tmp_path: Path) -> None:
    open_run(tmp_path, recipe())
    grown = recipe(
        seeds=[0, 1],
        arms=[{"name": "A"}, {"name": "B"}],
        description="more",
        evaluate={"suites": []},
        train={"workers": 7},
    )
    open_run(tmp_path, grown)
    assert load_recipe(tmp_path / "recipe.toml") == grown


def test_a_directory_of_something_else_is_refused(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").touch()
    with pytest.raises(RunError, match="not empty and not a run directory"):
        open_run(tmp_path, recipe())
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


def test_a_broken_recipe_of_the_run_is_refused(tmp_path: Path) -> None:
    (tmp_path / "recipe.toml").write_text("name = ")
    with pytest.raises(RunError, match="not one of this version"):
        open_run(tmp_path, recipe())


def test_set_aside_keeps_everything(tmp_path: Path) -> None:
    run = tmp_path / "run"
    said: list[str] = []
    set_aside(run, said.append)
    assert said == []
    for number in (1, 2):
        run.mkdir()
        (run / "recipe.toml").touch()
        (run / "file").write_text(str(number))
        set_aside(run, said.append)
        assert said[-1].endswith(f"run.old-{number}")
        assert not run.exists()
    assert (tmp_path / "run.old-1" / "file").read_text() == "1"


def test_a_run_in_use_is_not_set_aside(tmp_path: Path) -> None:
    with exclusive(tmp_path / "run", "the run"), pytest.raises(RunError, match="in use"):
        set_aside(tmp_path / "run", print)
    assert (tmp_path / "run").exists()


def test_changed_text_is_refused(tmp_path: Path) -> None:
    identity = {"corpus": {"source": "text", "sha256": "a"}, "tokenizer_files": None, "vocab_size": 512}
    keep_data(tmp_path, identity)
    keep_data(tmp_path, {**identity, "vocab_size": 513})
    with pytest.raises(RunError, match=r'corpus\.sha256: "a" -> "b"'):
        keep_data(tmp_path, {**identity, "corpus": {"source": "text", "sha256": "b"}})


def test_lock(tmp_path: Path) -> None:
    with (
        exclusive(tmp_path, "the run"),
        pytest.raises(RunError, match=rf"the run is in use .*pid {os.getpid()}"),
        exclusive(tmp_path, "the run"),
    ):
        pass
    with exclusive(tmp_path, "the run"):
        pass


def test_a_lock_ends_with_its_holder(tmp_path: Path) -> None:
    code = (
        "import os, sys, pathlib\nfrom clearhead.runs.lock import exclusive\n"
        "with exclusive(pathlib.Path(sys.argv[1]), 'x'): os.kill(os.getpid(), 9)"
    )
    source = str(Path(__file__).parents[2] / "src")
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)], env={**os.environ, "PYTHONPATH": source}
    )
    assert done.returncode == -9
    with exclusive(tmp_path, "the run"):
        pass


def test_unwritable(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(RunError, match=r"cannot write to .*--out"):
        check_writable(tmp_path / "file" / "run")
    check_writable(tmp_path / "new" / "run")
    assert list((tmp_path / "new" / "run").iterdir()) == []


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_read_only(tmp_path: Path) -> None:
    tmp_path.chmod(0o555)
    with pytest.raises(RunError, match="cannot write"):
        check_writable(tmp_path)


def test_space(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    check_space(tmp_path, 1)
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(10, 9, 1_500_000))
    with pytest.raises(RunError, match=r"needs about 2\.0 GB of disk but only 2 MB are free"):
        check_space(tmp_path, 2_000_000_000)

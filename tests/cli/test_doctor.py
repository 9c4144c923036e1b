"""`clearhead doctor` says what is there, and what to type about what is not."""

import json

import pytest
from typer.testing import CliRunner

from clearhead.cli.main import app
from clearhead.kernels.cpu import library


def test_it_tells_of_this_machine() -> None:
    done = CliRunner().invoke(app, ["doctor", "--json"])
    told = json.loads(done.stdout)
    assert told["cores"] >= 1 and told["versions"]["torch"] and told["python"]
    assert told["cpu_kernel"] == (None if library.missing() else library.load().isa())
    assert (done.exit_code == 1) == bool(told["wrong"])
    lines = CliRunner().invoke(app, ["doctor"]).output
    assert told["processor"] in lines and "CPU kernel" in lines


def test_what_is_wrong_is_a_sentence_and_an_exit_code(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(library, "missing", lambda: "no compiler was found; install g++ and run make install")
    done = CliRunner().invoke(app, ["doctor"])
    assert (
        done.exit_code == 1
        and "WRONG        the CPU kernel cannot be used: no compiler was found" in done.output
    )


def test_the_version_is_told() -> None:
    done = CliRunner().invoke(app, ["--version"])
    assert done.exit_code == 0 and done.output.startswith("clearhead 0.")

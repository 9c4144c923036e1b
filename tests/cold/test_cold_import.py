"""`import clearhead` and `clearhead --help` stay light: what a process has loaded is asked of the process itself."""

import subprocess
import sys

import pytest

HEAVY = ("transformers", "matplotlib", "triton", "datasets", "typer", "scipy", "accelerate", "tensorboard")


def loaded_after(statement: str, *arguments: str) -> set[str]:
    """Top-level modules that a fresh interpreter has loaded after `statement`, run with `arguments`."""
    code = f"{statement}\nimport sys\nprint('loaded:', *{{name.partition('.')[0] for name in sys.modules}})"
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=True
    )
    return set(done.stdout.rpartition("loaded:")[2].split())


def test_import_is_light() -> None:
    for statement in ("import clearhead", "import clearhead.kernels.cpu.library"):
        assert loaded_after(statement) & {*HEAVY, "torch"} == set()


@pytest.mark.parametrize("module", ["clearhead.functional", "clearhead.nn"])
def test_ops_and_layers_need_torch_only(module: str) -> None:
    assert loaded_after(f"import {module}") & set(HEAVY) == set()


HELP = """
import sys
from clearhead.cli.main import app
try:
    app(sys.argv[1:], prog_name="clearhead")
except SystemExit as end:
    assert end.code == 0
"""


@pytest.mark.parametrize(
    "verb",
    [
        "",
        "compare",
        "tokenize",
        "train",
        "evaluate",
        "report",
        "generate",
        "explain",
        "bench",
        "convert",
        "retrofit",
        "card",
    ],
)
def test_help_is_light(verb: str) -> None:
    heavy = {*HEAVY, "torch", "numpy", "tokenizers"} - {"typer"}
    assert loaded_after(HELP, *verb.split(), "--help") & heavy == set()

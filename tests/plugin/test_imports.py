"""Imports point one way: a layer knows only the layers below it."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

SOURCE = Path(__file__).parents[2] / "src" / "clearhead"
LAYERS = (
    {"registry"},
    {"core"},
    {"variants", "positions", "engines", "kernels"},
    {"nn", "functional", "models"},
    {"data", "train", "evals"},
    {"convert"},
    {"report", "bench", "lm_eval_tasks"},
    {"cli"},
)
LEVEL = {name: level for level, names in enumerate(LAYERS) for name in names}
# Entry points: they belong to no layer and are imported by none.
ENTRIES = {"__init__", "__main__"}
FILES = sorted(SOURCE.rglob("*.py"))


def imported(tree: ast.AST, package: list[str]) -> Iterator[str]:
    """Dotted names of all modules imported anywhere in a file, inside functions too."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            name = ".".join([*base, *([node.module] if node.module else [])])
            yield from (f"{name}.{alias.name}" for alias in node.names)


def part(path: Path) -> str:
    """The unit of the layout that a file belongs to."""
    return path.relative_to(SOURCE).with_suffix("").parts[0]


def test_every_file_has_a_layer() -> None:
    assert FILES
    assert {part(path) for path in FILES} <= {*LEVEL, *ENTRIES}


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.relative_to(SOURCE).as_posix())
def test_imports_point_down(path: Path) -> None:
    own = part(path)
    package = ["clearhead", *path.relative_to(SOURCE).parent.parts]
    for name in imported(ast.parse(path.read_text(encoding="utf-8")), package):
        top, _, rest = name.partition(".")
        target = rest.partition(".")[0]
        if own in ENTRIES or top != "clearhead" or target in ("", "__version__"):
            continue
        assert target in LEVEL, f"{path}: {name} is in no layer"
        assert LEVEL[target] <= LEVEL[own], f"{own} imports {name}, which is above it"


@pytest.mark.parametrize(
    "path",
    [
        path
        for path in FILES
        if part(path) in ("registry", "core", "variants", "positions", "nn", "functional")
    ],
    ids=lambda path: path.relative_to(SOURCE).as_posix(),
)
def test_the_mechanisms_need_torch_only(path: Path) -> None:
    import sys

    allowed = {*sys.stdlib_module_names, "torch", "clearhead"}
    package = ["clearhead", *path.relative_to(SOURCE).parent.parts]
    names = {
        name.partition(".")[0] for name in imported(ast.parse(path.read_text(encoding="utf-8")), package)
    }
    if part(path) == "registry":
        allowed -= {"torch", "clearhead"}
    assert names <= allowed


def test_an_import_upwards_is_found() -> None:
    tree = ast.parse(
        "def f():\n    from clearhead.models import ClearheadConfig\n    from . import heads\n    import os.path"
    )
    assert list(imported(tree, ["clearhead", "core"])) == [
        "clearhead.models.ClearheadConfig",
        "clearhead.core.heads",
        "os.path",
    ]

"""What keeps the package readable and its scripts alive: short functions and files, imports that are there."""

import ast
import importlib
import importlib.util
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SOURCE = ROOT / "src" / "clearhead"
# Lines of a function's body, its signature and docstring left out, and of a file.
LONGEST_BODY, LONGEST_FILE = 60, 399

SCRIPTS = sorted(
    path for folder in ("benchmarks", "examples", "hub") for path in (ROOT / folder).rglob("*.py")
)


def body_lines(function: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    body = function.body
    if ast.get_docstring(function) is not None and len(body) > 1:
        body = body[1:]
    assert body[-1].end_lineno is not None
    return body[-1].end_lineno - body[0].lineno + 1


def test_functions_and_files_are_short() -> None:
    files = {path.relative_to(SOURCE).as_posix(): path for path in SOURCE.rglob("*.py")}
    assert len(files) > 200
    for name, path in files.items():
        text = path.read_text(encoding="utf-8")
        assert text.count("\n") <= LONGEST_FILE, f"{name} has {text.count(chr(10))} lines"
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                assert body_lines(node) <= LONGEST_BODY, f"{name}: {node.name} has {body_lines(node)} lines"


def test_a_body_is_counted_without_its_docstring() -> None:
    (function,) = ast.parse(
        'def f(\n    a,\n):\n    """One\n\n    two.\n    """\n    a += 1\n    return a\n'
    ).body
    assert isinstance(function, ast.FunctionDef) and body_lines(function) == 2


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_what_scripts_import_is_there(path: Path) -> None:
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("clearhead"):
            module = importlib.import_module(str(node.module))
            for alias in node.names:
                known = hasattr(module, alias.name) or importlib.util.find_spec(f"{node.module}.{alias.name}")
                assert known, f"{node.module} has no {alias.name}"

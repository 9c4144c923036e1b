"""What keeps `evals` livable: short functions and files, one place that asks whose model it is, one form of skipped."""

from __future__ import annotations

import ast
from pathlib import Path

EVALS = Path(__file__).parents[2] / "src" / "clearhead" / "evals"
TEXTS = {path.relative_to(EVALS).as_posix(): path.read_text(encoding="utf-8") for path in EVALS.rglob("*.py")}


def test_functions_and_files_are_short() -> None:
    assert len(TEXTS) > 60
    long = {name: count for name, text in TEXTS.items() if (count := len(text.splitlines())) > 400}
    for name, text in TEXTS.items():
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                assert node.end_lineno is not None
                if (count := node.end_lineno - node.lineno + 1) > 60:
                    long[f"{name}: {node.name}"] = count
    assert not long


def test_one_place_asks_whether_a_model_is_one_of_this_library() -> None:
    assert [name for name, text in TEXTS.items() if "FAMILIES" in text] == ["probing/adapter/__init__.py"]


def test_what_is_skipped_is_a_type() -> None:
    assert not [name for name, text in TEXTS.items() if '"skipped"' in text]

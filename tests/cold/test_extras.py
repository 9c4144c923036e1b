"""Which package needs which extra: the tables in `clearhead.extras`, pyproject.toml and the imports say the same."""

import ast
import importlib.util
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from clearhead.cli.start import main
from clearhead.extras import EXTRAS, INCLUDES, VERBS, MissingExtra, modules, need

ROOT = Path(__file__).parents[2]
SOURCE = ROOT / "src" / "clearhead"
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
OPTIONAL = PROJECT["optional-dependencies"]
# What comes with a package that is asked for: with torch, with transformers, with matplotlib, ...
BRINGS = {
    "": {"torch", "numpy", "filelock"},
    "hf": {"huggingface_hub", "pydantic_core"},
    "report": {"markupsafe", "cycler"},
    "train": {"pyarrow"},
}
# Unit of the package -> the extra whose packages it may import, anywhere in its files; "" is what all have.
NEEDS = {
    **dict.fromkeys(("__init__", "__main__", "registry", "extras", "functional", "testing"), ""),
    **dict.fromkeys(("core", "positions", "variants", "nn"), ""),
    **dict.fromkeys(("engines", "models", "integrations", "convert", "runs"), "hf"),
    **dict.fromkeys(("analysis", "report", "bench"), "report"),
    **dict.fromkeys(("data", "train", "cli", "lm_eval_tasks"), "train"),
    "kernels": "triton",
}
# Files of `evals` and `train` that need more than the rest of it.
SPECIAL = {
    "judges/transport": "judges",
    "subjects/gguf": "gguf",
    "external": "lm-eval",
    "subjects/adapters": "adapters",
    "train/lora": "adapters",
}


def imported(path: Path) -> set[str]:
    """The packages of others that a file imports, inside functions too, but not for types alone."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            found.add(node.module.partition(".")[0])
    return found - sys.stdlib_module_names - {"clearhead"}


def allowed(path: Path) -> set[str]:
    inside = path.relative_to(SOURCE).with_suffix("")
    extra = NEEDS.get(inside.parts[0], "train")
    if inside.parts[0] in ("evals", "train"):
        extra = next((own for room, own in SPECIAL.items() if room in inside.as_posix()), "train")
    names, more = set(BRINGS[""]), [extra] if extra else []
    while more:
        extra = more.pop()
        names |= {*EXTRAS[extra], *BRINGS.get(extra, ())}
        more += INCLUDES.get(extra, ())
    return names


def test_no_file_imports_more_than_its_extra_brings() -> None:
    for path in SOURCE.rglob("*.py"):
        assert imported(path) <= allowed(path), path.relative_to(SOURCE)
    assert "transformers" not in allowed(SOURCE / "nn" / "attention.py")


def test_the_tables_agree_with_pyproject() -> None:
    assert {re.split("[<>=]", name)[0] for name in PROJECT["dependencies"]} == {"torch", "numpy"}
    for extra, names in EXTRAS.items():
        listed = [re.match(r"([\w.-]+)(?:\[([\w,-]+)\])?", line) for line in OPTIONAL[extra]]
        own = {found[1].replace("-", "_") for found in listed if found and found[1] != "clearhead"}
        included = [part for found in listed if found and found[2] for part in found[2].split(",")]
        assert own == set(names), extra
        assert tuple(included) == INCLUDES.get(extra, ()), extra
    everything = " ".join(OPTIONAL["all"])
    assert all(extra in everything or extra in ("hf", "report") for extra in EXTRAS)
    assert "clearhead[all]" in OPTIONAL["dev"]
    from clearhead.cli.main import app

    assert {command.name for command in app.registered_commands} == set(VERBS)


@pytest.mark.parametrize(("verb", "extra"), [("compare", "train"), ("convert", "hf"), ("report", "report")])
def test_a_missing_extra_is_one_sentence(
    verb: str, extra: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    gone = EXTRAS[extra][0]
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == gone else found(name))
    monkeypatch.setattr(sys, "argv", ["clearhead", "--debug", verb, "anything"])
    with pytest.raises(SystemExit) as end:
        main()
    assert end.value.code == 2
    assert capsys.readouterr().err == f"clearhead {verb} needs {gone}: pip install 'clearhead[{extra}]'\n"
    with pytest.raises(MissingExtra, match=f"clearhead.data needs {gone}"):
        need("clearhead.data", extra)
    assert modules(extra)[-1] == EXTRAS[extra][-1]


WITHOUT = """
import sys
from importlib.machinery import PathFinder
class Installed:
    def find_spec(self, name, path=None, target=None):
        gone = name.partition(".")[0] in sys.argv[1].split(",")
        return None if gone else PathFinder.find_spec(name, path, target)
sys.meta_path = [Installed() if finder is PathFinder else finder for finder in sys.meta_path]
import torch, clearhead.nn
layer = clearhead.nn.DifferentialAttention(32, 4)
layer(torch.randn(1, 5, 32), is_causal=True).sum().backward()
assert all(p.grad is not None for p in layer.parameters())
"""


def test_layers_run_where_no_extra_is_installed() -> None:
    blocked = ",".join(name for names in EXTRAS.values() for name in names)
    subprocess.run([sys.executable, "-c", WITHOUT, blocked], check=True)

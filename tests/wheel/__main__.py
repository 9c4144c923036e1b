"""`make test-wheel`: the wheel, installed where only torch and NumPy are, works; a verb says what it misses.

The new environment has symbolic links to this one's torch, NumPy and what they require, so nothing is downloaded.
`python -m tests.wheel --with PYTHON` asks an environment that exists already, into which the wheel was installed.
"""

import argparse
import os
import re
import subprocess
import sys
import tempfile
import venv
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

ROOT = Path(__file__).parents[2]
BASE = ("torch", "numpy")

INSIDE = """
import importlib.util, sys
assert importlib.util.find_spec("transformers") is None, "this environment is not bare"
import torch, clearhead, clearhead.nn, clearhead.functional, clearhead.testing
assert "site-packages" in clearhead.__file__, clearhead.__file__
for name in ("Attention", "DifferentialAttention", "DifferentialAttentionV2", "CollinearAttention"):
    layer = getattr(clearhead.nn, name)(32, 4, num_kv_heads=2)
    x = torch.randn(2, 9, 32, requires_grad=True)
    y = layer(x, is_causal=True)
    y.square().sum().backward()
    assert y.shape == x.shape and x.grad.isfinite().all()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in layer.parameters()), name
from clearhead.kernels.cpu import library
print("layers run; the CPU kernel:", library.missing() or library.load().isa())
for module in ("clearhead.models", "clearhead.train", "clearhead.report"):
    try:
        importlib.import_module(module)
    except ImportError as error:
        assert str(error).startswith(module + " needs ") and "pip install 'clearhead[" in str(error), error
    else:
        raise AssertionError(module + " was imported without its extra")
"""


def requirements(names: tuple[str, ...]) -> set[str]:
    """Distributions that are installed here and that `names` need, themselves included."""
    found: set[str] = set()
    todo = list(names)
    while todo:
        name = re.sub(r"[-_.]+", "-", todo.pop()).lower()
        if name in found:
            continue
        try:
            lines = distribution(name).requires or []
        except PackageNotFoundError:  # it is for another platform or Python
            continue
        found.add(name)
        todo += [re.split(r"[^\w.-]", line)[0] for line in lines if "extra ==" not in line]
    return found


def bare_environment(folder: Path) -> Path:
    """The Python of a new environment that has `BASE` and what it requires, linked."""
    venv.create(folder, with_pip=False, symlinks=True)
    version = f"python{sys.version_info.major}.{sys.version_info.minor}"
    packages = folder / "lib" / version / "site-packages"
    for name in requirements(BASE):
        files = distribution(name).files or []
        here = Path(str(distribution(name).locate_file("")))
        for top in {file.parts[0] for file in files if file.parts[0] not in ("..", "__pycache__")}:
            os.symlink(here / top, packages / top)
    return folder / "bin" / "python"


def check(python: Path, elsewhere: Path) -> None:
    """Run `INSIDE`, then a verb that needs more than is there."""
    clean = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    subprocess.run([python, "-c", INSIDE], check=True, cwd=elsewhere, env=clean)
    command = python.parent / "clearhead"
    done = subprocess.run([command, "compare", "recipe.toml"], capture_output=True, text=True, env=clean)
    expected = "clearhead compare needs transformers: pip install 'clearhead[train]'\n"
    assert (done.returncode, done.stderr) == (2, expected), (done.returncode, done.stderr)
    print(done.stderr, end="")


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.wheel", description=__doc__)
    parser.add_argument("--with", dest="python", type=Path, help="Python of an environment with the wheel")
    chosen = parser.parse_args().python
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        if chosen is not None:
            check(chosen.absolute(), root)
            return
        pip = [sys.executable, "-m", "pip", "--disable-pip-version-check"]
        build = [
            *pip,
            "wheel",
            "--no-build-isolation",
            "--no-deps",
            "--no-index",
            "--quiet",
            "-w",
            root,
            ROOT,
        ]
        subprocess.run(build, check=True)
        (wheel,) = root.glob("*.whl")
        print("built", wheel.name)
        python = bare_environment(root / "bare")
        install = [*pip, "--python", python, "install", "--no-deps", "--no-index", "--quiet", wheel]
        subprocess.run(install, check=True)
        check(python, root)


if __name__ == "__main__":
    main()

"""The repository for the `kernels` hub: written from the sources, imported alone, and equal to the package."""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from clearhead.functional import attention, differential_attention

HUB = Path(__file__).parents[3] / "hub"


def load(path: Path, name: str) -> ModuleType:
    """A package or a module from a file, under a name of its own, as `kernels` does."""
    inner = [str(path.parent)] if path.name == "__init__.py" else None
    spec = importlib.util.spec_from_file_location(name, path, submodule_search_locations=inner)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


write = load(HUB / "write.py", "hub_write")


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder: Path = tmp_path_factory.mktemp("hub") / "repository"
    write.write(folder, "someone/clearhead-attention")
    return folder


# Once: its operators are registered in a namespace of its own.
@pytest.fixture(scope="module")
def package(written: Path) -> ModuleType:
    told = json.loads((written / "build/torch-universal/metadata.json").read_text())
    return load(written / "build/torch-universal/__init__.py", told["id"])


def results(function: Any, tensors: list[Tensor], **options: Any) -> list[Tensor]:
    leaves = [x.clone().requires_grad_() for x in tensors]
    out = function(*leaves, **options)
    return [out, *torch.autograd.grad(out.square().sum(), leaves)]


FORMS = {"V1": (4, 2, 32), "V2": (4, 1, 16), "softmax": (2, 1, 16)}
OPTIONS: dict[str, dict[str, Any]] = {
    "open": {},
    "packed and padded": {
        "is_causal": True,
        "documents": (torch.arange(20) // 8)[None],
        "key_padding_mask": torch.arange(20)[None] > 2,
    },
    "window, slopes": {
        "is_causal": True,
        "window": 7,
        "scale": 0.3,
        "alibi_slopes": torch.tensor([0.5, 0.25]),
    },
}


@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize("form", FORMS)
def test_it_equals_the_package(form: str, name: str, package: ModuleType) -> None:
    heads, key_heads, value_width = FORMS[form]
    groups = 1
    rng = torch.Generator().manual_seed(0)

    def made(*shape: int) -> Tensor:
        return torch.randn(shape, generator=rng)

    tensors = [made(1, heads, 18, 16), made(1, key_heads, 20, 16), made(1, groups, 20, value_width)]
    if form != "softmax":
        tensors.append(made(1, 2, 18, 1))
    own, theirs = (
        ("attention", attention) if form == "softmax" else ("differential_attention", differential_attention)
    )
    found = results(getattr(package, own), tensors, **OPTIONS[name])
    expected = results(theirs, tensors, backend="triton", **OPTIONS[name])
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_it_needs_nothing_of_the_package(written: Path) -> None:
    """In a process that cannot import clearhead, from what the builder takes and the `_ops` that it makes."""
    code = (
        "import sys, torch; sys.modules['clearhead'] = None; sys.path.insert(0, sys.argv[1])\n"
        "import clearhead_attention as a\n"
        "q, v = torch.randn(1, 2, 3, 16), torch.randn(1, 1, 3, 32)\n"
        "print(tuple(a.differential_attention(q, q, v, 0.5, is_causal=True).shape))\n"
        "import triton; assert not [m for m in sys.modules if m.startswith('clearhead.')]\n"
    )
    sources = written / "torch-ext"
    ops = written / "build/torch-cuda/_ops.py"
    (sources / "clearhead_attention/_ops.py").write_text(ops.read_text())
    command = [sys.executable, "-c", code, str(sources)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=written)
    assert done.stdout.strip() == "(1, 1, 3, 32)", done.stderr


def test_the_layout(written: Path) -> None:
    for backend in ("cuda", "rocm", "universal"):
        variant = written / "build" / f"torch-{backend}"
        told = json.loads((variant / "metadata.json").read_text())
        assert told.keys() == {"name", "id", "version", "license", "python-depends", "backend", "digest"}
        assert told["id"].isidentifier() and told["backend"]["type"] in ("cuda", "rocm")
        files = {path.relative_to(variant).as_posix() for path in variant.rglob("*.*")}
        assert files == {*told["digest"]["files"], "metadata.json"}
        assert "clearhead_attention/__init__.py" in files
        for path in variant.rglob("*.py"):
            assert "clearhead.kernels" not in path.read_text() and "ops.clearhead." not in path.read_text()
    toml = (written / "build.toml").read_text()
    assert 'repo-id = "someone/clearhead-attention"' in toml and "[torch-noarch]" in toml
    assert "torch-ext/clearhead_attention/__init__.py" in {
        path.relative_to(written).as_posix() for path in written.rglob("*.py")
    }


def test_writing_twice_and_beside_other_files(written: Path, tmp_path: Path) -> None:
    before = (written / "build/torch-cuda/metadata.json").read_text()
    write.write(written, "someone/clearhead-attention")
    assert (written / "build/torch-cuda/metadata.json").read_text() == before
    (tmp_path / "mine").write_text("")
    with pytest.raises(ValueError, match="has other files in it"):
        write.write(tmp_path, "x/y")


def test_what_cannot_be_carried_over_is_refused() -> None:
    with pytest.raises(ValueError, match=r"from clearhead\.core\.masks import MaskSpec"):
        write.portable("from clearhead.core.masks import MaskSpec\n", "_x")


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"k": (1, 2, 20, 8)}, "k: "),
        ({"k": (1, 3, 20, 16)}, "k: "),
        ({"k": (2, 20, 16)}, "k has shape"),
        ({"lam": torch.ones(3, 3)}, r"lam has shape \(3, 3\)"),
        ({"v": (1, 1, 19, 16)}, "k: "),
        ({"q": (1, 3, 18, 16)}, "q has shape"),
        ({"v": (1, 20, 16)}, "v has shape"),
        ({"documents": torch.zeros(1, 3)}, r"documents has shape \(1, 3\)"),
        ({"documents": torch.zeros(1, 20)}, "documents must hold integers"),
        ({"key_padding_mask": torch.ones(1, 20, dtype=torch.long)}, "key_padding_mask must be bool"),
        ({"window": 0}, "window must be at least 1, not 0"),
        ({"window": -3}, "window must be at least 1, not -3"),
        ({"alibi_slopes": torch.ones(1)}, r"alibi_slopes has shape \(1,\); expected \(2,\)"),
    ],
)
def test_mistakes(change: dict[str, Any], said: str, package: ModuleType) -> None:
    shapes = {"q": (1, 4, 18, 16), "k": (1, 2, 20, 16), "v": (1, 1, 20, 16)}
    options = {name: value for name, value in change.items() if name not in shapes}
    q, k, v = (torch.zeros(change.get(name, shape)) for name, shape in shapes.items())
    lam = options.pop("lam", 0.5)
    with pytest.raises(ValueError, match=said):
        package.differential_attention(q, k, v, lam, **options)

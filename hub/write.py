"""Write the Triton kernels as a repository for Hugging Face's `kernels` hub, from the sources of the package.

    python hub/write.py OUT [--repo OWNER/clearhead-attention]

OUT becomes what `kernel-builder` takes (build.toml, torch-ext/) and what it makes of a kernel without compiled code
(build/torch-cuda, torch-rocm, and torch-universal for older versions of `kernels`), so that it can be loaded as it is:
`kernels.get_local_kernel(OUT)`. Nothing is uploaded. The operators' namespace has a digest of the sources in its name,
as several versions may be loaded in one process. Rules: https://huggingface.co/docs/kernels, "Kernel requirements".
"""

import argparse
import base64
import hashlib
import json
import re
import shutil
import sys
import tomllib
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
SOURCE = ROOT / "src" / "clearhead" / "kernels" / "triton"
NAME = "clearhead-attention"
PACKAGE = NAME.replace("-", "_")
MODULES = ("backward", "configs", "endings", "forward", "launch", "ops", "ranges", "tiles")
# Backends of `kernels` by build variant. A universal one has to name one too.
ARCHITECTURES = {"cuda": ["8.0", "9.0", "10.0"], "rocm": ["gfx942"]}
# 0 by the hub's convention: its interface may change.
VERSION = 0
OWN_IMPORT = re.compile(r"^(\s*from )clearhead\.kernels\.triton(\.\w+)?( import )", re.MULTILINE)


def sources() -> dict[str, str]:
    """The files of the package by name, with relative imports and operators in a namespace of their own."""
    texts = {f"{name}.py": (SOURCE / f"{name}.py").read_text(encoding="utf-8") for name in MODULES}
    interface = (Path(__file__).parent / "interface.py").read_text(encoding="utf-8")
    version = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["version"]
    texts["__init__.py"] = interface.replace("@VERSION@", version)
    table = (SOURCE / "configs.json").read_text(encoding="utf-8")
    namespace = f"_{PACKAGE}_{_digest(texts | {'configs.json': table})}"
    found = {name: portable(text, namespace) for name, text in texts.items()}
    found["_ops.py"] = _ops(namespace)
    return {**found, "configs.json": table}


def portable(text: str, namespace: str) -> str:
    """A module's text as the hub wants it; ValueError if something of the package is still in it."""
    text = OWN_IMPORT.sub(lambda m: f"{m[1]}{m[2] or '.'}{m[3]}", text)
    text = text.replace('"clearhead::', f'"{namespace}::').replace(
        "torch.ops.clearhead.", f"torch.ops.{namespace}."
    )
    text = text.replace(
        'files(__package__).joinpath("configs.json").read_text()',
        'Path(__file__).with_name("configs.json").read_text(encoding="utf-8")',
    ).replace("from importlib.resources import files\n", "from pathlib import Path\n")
    left = re.search(
        r"^\s*(?:from|import) clearhead.*|torch\.ops\.clearhead\b.*|\"clearhead::.*", text, re.MULTILINE
    )
    if left is not None:
        raise ValueError(f"the kernels' sources have something that the hub cannot: {left[0].strip()}")
    return text


def _ops(namespace: str) -> str:
    """What `kernel-builder` makes beside the sources: the operators, and their names."""
    return (
        "import torch\n\n"
        f"ops = torch.ops.{namespace}\n\n\n"
        "def add_op_namespace_prefix(op_name: str) -> str:\n"
        f'    return f"{namespace}::{{op_name}}"\n'
    )


def _digest(texts: dict[str, str]) -> str:
    joined = "\0".join(f"{name}\0{text}" for name, text in sorted(texts.items()))
    return hashlib.sha256(joined.encode()).hexdigest()[:8]


def metadata(files: dict[str, str], backend: str) -> str:
    namespace = re.search(r"torch\.ops\.(\w+)", files["_ops.py"])
    assert namespace is not None
    digests = {
        name: base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
        for name, text in sorted(files.items())
    }
    kind = backend if backend in ARCHITECTURES else "cuda"
    told: dict[str, Any] = {
        "name": NAME,
        "id": namespace[1],
        "version": VERSION,
        "license": "Apache-2.0",
        "python-depends": [],
        "backend": {"type": kind, "archs": ARCHITECTURES[kind]},
        "digest": {"algorithm": "sha256", "files": digests},
    }
    return json.dumps(told, indent=2) + "\n"


def write(out: Path, repo: str) -> None:
    """Write the repository to `out`, which must not exist or be one that was written before."""
    if out.exists() and any(out.iterdir()) and not (out / "build.toml").exists():
        raise ValueError(f"{str(out)!r} has other files in it; name an empty folder or a new one")
    files = sources()
    for old in ("build", "torch-ext"):
        shutil.rmtree(out / old, ignore_errors=True)
    backends = ", ".join(f'"{name}"' for name in ARCHITECTURES)
    top = {
        "build.toml": (
            f'[general]\nname = "{NAME}"\nversion = {VERSION}\nedition = 6\nlicense = "Apache-2.0"\n'
            f'backends = [{backends}]\n\n[general.hub]\nrepo-id = "{repo}"\n\n[torch-noarch]\n'
        ),
        "README.md": _readme(files["__init__.py"], repo),
        "LICENSE": (ROOT / "LICENSE").read_text(encoding="utf-8"),
    }
    _put(out, top)
    # `_ops` is made by the builder.
    _put(out / "torch-ext" / PACKAGE, {name: text for name, text in files.items() if name != "_ops.py"})
    for backend in (*ARCHITECTURES, "universal"):
        variant = out / "build" / f"torch-{backend}"
        # Where older versions of `kernels` look for the same names.
        inner = "from .. import *  # noqa: F403\nfrom .. import __version__  # noqa: F401\n"
        every = {**files, f"{PACKAGE}/__init__.py": inner}
        _put(variant, {**every, "metadata.json": metadata(every, backend)})


def _put(folder: Path, files: dict[str, str]) -> None:
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text, encoding="utf-8")


def _readme(interface: str, repo: str) -> str:
    head = interface.split('"""')[1].strip().replace("OWNER/clearhead-attention", repo)
    return f"---\nlicense: apache-2.0\ntags:\n- kernels\n---\n\n# {NAME}\n\n{head}\n"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("out", type=Path)
    parser.add_argument("--repo", default=f"OWNER/{NAME}", help="where it will be uploaded")
    asked = parser.parse_args()
    try:
        write(asked.out, asked.repo)
    except (OSError, ValueError) as error:
        raise SystemExit(f"hub/write.py: {error}") from None
    print(f"written: {asked.out}", file=sys.stderr)


if __name__ == "__main__":
    main()

"""The CPU kernel's library: how it is built and left out, what wheels hold, and why it cannot be used."""

import ctypes
import json
import os
import shlex
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import hatch_build
import pytest
import torch

from clearhead.kernels.cpu import library

ROOT = Path(__file__).parents[2]


def compiler() -> list[str]:
    """Its command, as hatch_build finds it; none if there is none."""
    try:
        return hatch_build.find_compiler()[0]
    except hatch_build.CannotBuild:
        return []


COMPILER = compiler()
needs_compiler = pytest.mark.skipif(not COMPILER, reason="there is no C++ compiler")


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A clean copy of what is in version control and matters here."""
    copy = tmp_path / "checkout"
    ignored = shutil.ignore_patterns("__pycache__", hatch_build.LIBRARY, "build.json", ".build-*")
    shutil.copytree(ROOT / "src", copy / "src", ignore=ignored)
    for name in ("pyproject.toml", "hatch_build.py", "README.md", "LICENSE", ".gitignore"):
        shutil.copy(ROOT / name, copy / name)
    return copy


def script(path: Path, text: str) -> str:
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)
    return str(path)


def failing(folder: Path) -> str:
    return script(
        folder / "failing",
        'echo "fatal error: the moon is in the wrong phase" >&2; echo "stopped." >&2; exit 1',
    )


def hasty(folder: Path) -> str:
    """The compiler with less optimisation, which takes a third of the time."""
    return script(folder / "hasty", f'exec {shlex.join(COMPILER)} "$@" -O1')


def pretending(folder: Path, refused: str) -> str:
    """A compiler that notes its arguments and writes empty files, except with `refused` among the arguments."""
    return script(
        folder / "pretending",
        f"""echo "$@" >> "{folder}/calls"
for argument in "$@"; do
  if [ "$argument" = "{refused}" ]; then echo "error: unknown option $argument" >&2; exit 1; fi
done
while [ $# -gt 1 ]; do if [ "$1" = -o ]; then : > "$2"; fi; shift; done""",
    )


def build(checkout: Path) -> dict[str, object]:
    """The result, which is also what build.json holds."""
    result = hatch_build.build(checkout, print)
    folder = checkout / hatch_build.FOLDER
    assert json.loads((folder / "build.json").read_text()) == result
    assert (folder / hatch_build.LIBRARY).exists() == result["built"]
    assert not list(folder.glob(".build-*"))
    return result


def run(source: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Python with the package from `source`."""
    return subprocess.run(
        [sys.executable, *arguments],
        capture_output=True,
        text=True,
        cwd=source.parent,
        env={**os.environ, "PYTHONPATH": str(source)},
    )


def without_compiler(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setenv("PATH", str(folder))


def test_a_failing_compiler_leaves_the_reason(
    checkout: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CXX", failing(tmp_path))
    (checkout / hatch_build.FOLDER / hatch_build.LIBRARY).write_text("of an earlier build")
    result = build(checkout)
    assert not result["built"]
    assert "could not compile attention.cpp for portable: fatal error: the moon" in str(result["reason"])

    (tmp_path / "t.toml").write_text('name = "t"\n[[arms]]\nname = "A"\n')
    small = ("model.hidden_size=16", "model.num_hidden_layers=1", "model.num_attention_heads=2")
    done = run(checkout / "src", "-m", "clearhead", "explain", str(tmp_path / "t.toml"), *small)
    assert done.returncode == 0, done.stderr
    assert "The CPU kernel: it was not built" in done.stdout
    assert "the moon is in the wrong phase" in done.stdout
    done = run(checkout / "src", "-c", "from clearhead.kernels.cpu.library import load; load()")
    assert (
        done.stderr.strip()
        .splitlines()[-1]
        .startswith("RuntimeError: the CPU kernel cannot be used: it was not built")
    )


def test_no_compiler_leaves_the_reason(
    checkout: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    without_compiler(tmp_path, monkeypatch)
    assert "there is no C++ compiler" in str(build(checkout)["reason"])
    monkeypatch.setenv("CXX", "no-such-compiler -v")
    assert "'no-such-compiler -v' cannot be run" in str(build(checkout)["reason"])


def test_a_set_that_the_compiler_does_not_know_is_left_out(
    checkout: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CXX", pretending(tmp_path, "-mavx512bf16"))
    monkeypatch.setattr("platform.machine", lambda: "x86_64")
    result = build(checkout)
    assert result["sets"] == ["portable", "avx2", "avx512"]
    assert "unknown option -mavx512bf16" in result["left_out"]["avx512_bf16"]  # type: ignore[index]
    calls = (tmp_path / "calls").read_text().splitlines()
    (dispatch,) = (call for call in calls if "dispatch.cpp" in call)
    (link,) = (call for call in calls if "-shared" in call)
    assert "-DCLEARHEAD_X86=1 -DCLEARHEAD_HAS_AVX2=1 -DCLEARHEAD_HAS_AVX512=1 -c" in dispatch
    assert "-march" not in dispatch and "BF16" not in dispatch
    # The linker takes the first of equal inline functions, which must run everywhere.
    order = [link.index(f"/{name}.o") for name in ("dispatch", "portable", "avx2", "avx512")]
    assert order == sorted(order) and "bf16" not in link


def test_other_machines_have_the_portable_set(
    checkout: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CXX", pretending(tmp_path, "-march=x86-64-v3"))
    monkeypatch.setattr("platform.machine", lambda: "aarch64")
    assert build(checkout)["sets"] == ["portable"]
    assert "X86" not in (tmp_path / "calls").read_text()


def wheel_of(source: Path, target: Path) -> Path:
    """The wheel that pip makes of `source`, with nothing but what is installed here."""
    command = [sys.executable, "-m", "pip", "wheel", "--no-build-isolation", "--no-deps", "--no-index", "-q"]
    subprocess.run([*command, "-w", str(target), str(source)], check=True, capture_output=True)
    (wheel,) = target.glob("*.whl")
    return wheel


def test_a_wheel_without_a_compiler_is_a_python_one(
    checkout: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CXX", failing(tmp_path))
    wheel = wheel_of(checkout, tmp_path / "dist")
    assert wheel.name.endswith("-py3-none-any.whl")
    with zipfile.ZipFile(wheel) as archive:
        held = json.loads(archive.read("clearhead/kernels/cpu/build.json"))
        assert not held["built"] and "the moon" in held["reason"]
        assert not [name for name in archive.namelist() if hatch_build.LIBRARY in name]


def test_an_editable_installation_builds_in_place(
    checkout: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CXX", pretending(tmp_path, "nothing"))
    program = "from hatchling.build import build_editable; print(build_editable('.'))"
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=checkout, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip().endswith("-py3-none-any.whl")
    folder = checkout / hatch_build.FOLDER
    assert (folder / hatch_build.LIBRARY).exists()
    assert json.loads((folder / "build.json").read_text())["built"]


@needs_compiler
def test_a_wheel_from_the_source_distribution_holds_the_library(
    checkout: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CXX", hasty(tmp_path))
    subprocess.run([sys.executable, "-m", "hatchling", "build", "-t", "sdist"], cwd=checkout, check=True)
    (packed,) = (checkout / "dist").glob("*.tar.gz")
    with tarfile.open(packed) as archive:
        archive.extractall(tmp_path / "unpacked", filter="data")
    (source,) = (tmp_path / "unpacked").iterdir()
    assert not list(source.rglob(hatch_build.LIBRARY)) and not list(source.rglob("build.json"))

    wheel = wheel_of(source, tmp_path / "dist")
    assert wheel.name.endswith(f"-py3-none-{hatch_build.platform_tag()}.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path / "site")
        assert not [name for name in archive.namelist() if name.endswith((".cpp", ".h"))]
        metadata = archive.read(next(name for name in archive.namelist() if name.endswith("/WHEEL"))).decode()
    assert "Root-Is-Purelib: false" in metadata
    done = run(
        tmp_path / "site",
        "-c",
        "from clearhead.kernels.cpu.library import load, __file__; print(load().isa(), __file__)",
    )
    assert done.returncode == 0, done.stderr
    assert str(tmp_path / "site") in done.stdout
    assert (
        done.stdout.split()[0]
        in json.loads((tmp_path / "site/clearhead/kernels/cpu/build.json").read_text())["sets"]
    )


@needs_compiler
def test_the_checkout_s_own_library_is_built_and_loads() -> None:
    note = json.loads((library.FOLDER / "build.json").read_text())
    assert library.missing() is None, "run hatch_build.py"
    loaded = library.load()
    assert loaded is library.load()
    best = loaded.isa()
    assert best in note["sets"]
    try:
        loaded.set_isa("portable")
        assert loaded.isa() == "portable"
        with pytest.raises(ValueError, match="no instruction set 'sse9'"):
            loaded.set_isa("sse9")
        assert loaded.isa() == "portable"
    finally:
        loaded.set_isa(best)
    with pytest.raises(RuntimeError, match="makes no sense"):
        loaded.forward(library.CProblem())
    with pytest.raises(RuntimeError, match="makes no sense"):
        loaded.backward(library.CProblem())


@needs_compiler
def test_the_structs_are_those_of_the_header(tmp_path: Path) -> None:
    structs = {"clearhead_tensor": library.CTensor, "clearhead_problem": library.CProblem}
    expected = [("abi", library.ABI)]
    lines = ['printf("abi %d\\n", CLEARHEAD_ABI);']
    for name, mirror in structs.items():
        expected.append((name, ctypes.sizeof(mirror)))
        lines.append(f'printf("{name} %zu\\n", sizeof({name}));')
        for field, _ in mirror._fields_:
            expected.append((field, getattr(mirror, field).offset))
            lines.append(f'printf("{field} %zu\\n", offsetof({name}, {field}));')
    header = ROOT / hatch_build.FOLDER / "src" / "problem.h"
    text = (
        f'#include <cstdio>\n#include <cstddef>\n#include "{header}"\nint main() {{\n'
        + "\n".join(lines)
        + "\n}\n"
    )
    (tmp_path / "layout.cpp").write_text(text)
    subprocess.run([*COMPILER, "layout.cpp", "-o", "layout"], cwd=tmp_path, check=True)
    told = subprocess.run([tmp_path / "layout"], capture_output=True, text=True, check=True).stdout
    assert [tuple(line.split()) for line in told.splitlines()] == [(name, str(at)) for name, at in expected]


def small_library(folder: Path, abi: int) -> Path:
    """A library with an interface number and nothing else."""
    (folder / "small.cpp").write_text(f'extern "C" int clearhead_abi() {{ return {abi}; }}\n')
    made = folder / library.FILE
    subprocess.run([*COMPILER, "-shared", "-fPIC", "small.cpp", "-o", str(made)], cwd=folder, check=True)
    return made


@needs_compiler
def test_why_it_cannot_be_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert "not built with this installation" in str(library._open(tmp_path))
    (tmp_path / "build.json").write_text('{"built": true, "compiler": "c++", "sets": ["portable"]}')
    assert "cannot be loaded" in str(library._open(tmp_path))
    (tmp_path / library.FILE).write_text("no library")
    assert "cannot be loaded" in str(library._open(tmp_path))
    small = small_library(tmp_path, library.ABI + 1)
    assert f"interface {library.ABI + 1}, this version needs {library.ABI}" in str(library._open(tmp_path))

    monkeypatch.setattr(torch._C, "__file__", str(small))
    assert "has no torch_parallel_for" in str(library._open(library.FOLDER))
    monkeypatch.setattr(library, "_found", ["of a test"])
    assert library.missing() == "of a test"
    with pytest.raises(RuntimeError, match="the CPU kernel cannot be used: of a test"):
        library.load()

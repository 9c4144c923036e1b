"""Builds the CPU kernel: hatchling's build hook, and `python hatch_build.py` to build it again in a checkout.

One plain C interface, loaded with ctypes, so neither Python's nor PyTorch's headers are needed. `attention.cpp` is
compiled once for every instruction set; `dispatch.cpp` picks among those that were built. What came of it is written
to `build.json` beside the library: an installation without a compiler works, without the kernel, and can say why.
"""

import json
import os
import platform
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface

FOLDER = Path("src", "clearhead", "kernels", "cpu")
LIBRARY = "libclearhead_cpu.dylib" if sys.platform == "darwin" else "libclearhead_cpu.so"
COMPILERS = ("c++", "g++", "clang++")
FLAGS = [
    *("-std=c++17", "-O3", "-fPIC", "-fvisibility=hidden", "-fno-exceptions", "-fno-rtti"),
    *("-fno-math-errno", "-fno-trapping-math", "-ffp-contract=fast"),
    # GCC 12 takes the undefined registers in its own AVX-512 headers for a mistake; Clang does not know that warning.
    *("-Wall", "-Wextra", "-Wno-unknown-warning-option", "-Wno-uninitialized"),
]
# Weakest first, which is also the order of linking: where two objects hold the same inline function, the linker keeps
# the first, and code that runs on any processor must not get the one compiled for the newest.
SETS = {
    "portable": [],
    "avx2": ["-march=x86-64-v3"],
    "avx512": ["-march=x86-64-v4"],
    "avx512_bf16": ["-march=x86-64-v4", "-mavx512bf16", "-mavx512vnni"],
}


class CannotBuild(Exception):
    """The kernel is left out, for the reason given."""


class KernelHook(BuildHookInterface):
    """Puts the library into wheels and editable installations; never fails them."""

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        if self.target_name != "wheel":
            return
        result = build(Path(self.root), self.app.display_info)
        if not result["built"]:
            self.app.display_warning(f"clearhead is installed without its CPU kernel: {result['reason']}")
        elif version != "editable":
            build_data["pure_python"] = False
            build_data["tag"] = f"py3-none-{platform_tag()}"


def build(root: Path, say: Callable[[str], None]) -> dict[str, Any]:
    """Build the library in place, `say` what the compiler says, and return what `build.json` then holds.

    {"built": true, "compiler": ..., "sets": [...]} with "left_out": {set: reason} if there are such, or
    {"built": false, "reason": ...}; a library of an earlier build is then removed.
    """
    folder = root / FOLDER
    result: dict[str, Any]
    try:
        compiler, version = find_compiler()
        with tempfile.TemporaryDirectory(dir=folder, prefix=".build-") as scratch:
            sets, left_out = compile_all(compiler, folder / "src", Path(scratch), say)
            # A process that has the old one open keeps it.
            os.replace(Path(scratch, LIBRARY), folder / LIBRARY)
        result = {"built": True, "compiler": version, "sets": sets}
        if left_out:
            result["left_out"] = left_out
    except CannotBuild as reason:
        (folder / LIBRARY).unlink(missing_ok=True)
        result = {"built": False, "reason": str(reason)}
    (folder / "build.json").write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    return result


def find_compiler() -> tuple[list[str], str]:
    """The command of the C++ compiler, from CXX or the usual names, and the line in which it names itself."""
    if sys.platform == "win32":
        raise CannotBuild("the CPU kernel is built on Linux and macOS only.")
    command = shlex.split(os.environ.get("CXX", ""))
    if not command:
        found = next((name for name in COMPILERS if shutil.which(name)), None)
        if found is None:
            raise CannotBuild(
                f"there is no C++ compiler: none of {', '.join(COMPILERS)} was found, and CXX is not set."
            )
        command = [found]
    try:
        told = subprocess.run([*command, "--version"], capture_output=True, text=True)
    except OSError as error:
        raise CannotBuild(
            f"the C++ compiler {shlex.join(command)!r} cannot be run: {error.strerror}."
        ) from None
    return command, (told.stdout.strip().splitlines() or [shlex.join(command)])[0]


def compile_all(
    compiler: list[str], source: Path, scratch: Path, say: Callable[[str], None]
) -> tuple[list[str], dict[str, str]]:
    """Compile and link into `scratch`; the instruction sets built, and why others were left out."""
    x86 = platform.machine().lower() in ("x86_64", "amd64")

    def run(what: str, *arguments: str) -> None:
        done = subprocess.run([*compiler, *arguments], capture_output=True, text=True)
        if done.returncode:
            raise CannotBuild(f"{shlex.join(compiler)} could not {what}: {last_line(done.stderr)}")
        if done.stderr:
            say(done.stderr)

    def compile_set(name: str) -> CannotBuild | None:
        arguments = [*FLAGS, *SETS[name], f"-DCLEARHEAD_ISA={name}", "-c", str(source / "attention.cpp")]
        try:
            run(f"compile attention.cpp for {name}", *arguments, "-o", str(scratch / f"{name}.o"))
        except CannotBuild as reason:
            return reason
        return None

    wanted = list(SETS) if x86 else ["portable"]
    with ThreadPoolExecutor(2) as pool:
        reasons = dict(zip(wanted, pool.map(compile_set, wanted), strict=True))
    if reasons["portable"]:
        raise reasons["portable"]
    sets = [name for name in wanted if not reasons[name]]
    has = [f"-DCLEARHEAD_HAS_{name.upper()}=1" for name in sets if name != "portable"]
    defines = ["-DCLEARHEAD_X86=1"] * x86 + has
    arguments = [*FLAGS, *defines, "-c", str(source / "dispatch.cpp"), "-o", str(scratch / "dispatch.o")]
    run("compile dispatch.cpp", *arguments)
    objects = [str(scratch / f"{name}.o") for name in ("dispatch", *sets)]
    run("link the library", "-shared", *objects, "-o", str(scratch / LIBRARY))
    return sets, {name: str(reason) for name, reason in reasons.items() if reason}


def last_line(told: str) -> str:
    """The compiler's last line that names an error, else its last line."""
    lines = [line.strip() for line in told.splitlines() if line.strip()]
    errors = [line for line in lines if "error" in line.lower()]
    return (errors or lines or ["it did not say why"])[-1]


def platform_tag() -> str:
    """This machine's wheel tag, without a promise about how old a C library may be."""
    from packaging.tags import platform_tags

    return next(tag for tag in platform_tags() if "manylinux" not in tag and "musllinux" not in tag)


if __name__ == "__main__":
    start = time.monotonic()
    built = build(Path(__file__).parent, print)
    if built["built"]:
        names = ", ".join(built["sets"])
        print(f"CPU kernel built for {names} in {time.monotonic() - start:.0f} s")
        for name, reason in built.get("left_out", {}).items():
            print(f"  without {name}: {reason}")
    else:
        print(f"CPU kernel not built: {built['reason']}")

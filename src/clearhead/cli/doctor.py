"""`clearhead doctor`: what this machine offers, what is missing, and what to type about it."""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import typer

# What is not needed by all, what for, and how it is installed.
OPTIONAL = {
    "peft": ("adapters (LoRA) in evaluations", "peft"),
    "lm_eval": ("tasks of lm-evaluation-harness", "'clearhead[lm-eval]'"),
    "triton": ("the GPU kernels", "'clearhead[triton]'"),
}


def command(
    as_json: Annotated[bool, typer.Option("--json", help="As JSON, on standard output.")] = False,
) -> None:
    """Print processor, CPU kernel, threads, memory, GPU, versions and caches; exit code 1 if something is wrong."""
    found = examine()
    if as_json:
        import json

        typer.echo(json.dumps(found, indent=2))
    else:
        for line in _lines(found):
            typer.echo(line)
    if found["wrong"]:
        raise typer.Exit(1)


def examine() -> dict[str, Any]:
    """Everything that `clearhead doctor` prints. `wrong` are sentences, each with what to do."""
    import importlib.util

    import torch

    from clearhead.data.cache import cache_dir
    from clearhead.kernels.cpu import library
    from clearhead.runs.environment import environment

    env = environment()
    reason = library.missing()
    cache = cache_dir()
    free = _free(cache)
    wrong = []
    if reason is not None:
        wrong.append(
            f"the CPU kernel cannot be used: {reason}; attention takes PyTorch's own, which is slower"
        )
    if free is not None and free < 2 * 10**9:
        wrong.append(f"{cache} has {free / 1e9:.1f} GB left; name another place with CLEARHEAD_CACHE")
    threads = torch.get_num_threads()
    if threads > env["cores"]:
        wrong.append(
            f"PyTorch uses {threads} threads on {env['cores']} cores; set OMP_NUM_THREADS={env['cores']}"
        )
    return {
        "processor": env["processor"],
        "cores": env["cores"],
        "threads": threads,
        "memory_gb": _memory(),
        "cpu_kernel": None if reason else library.load().isa(),
        "accelerators": env["accelerators"],
        "python": env["python"],
        "versions": env["versions"],
        "cache": str(cache),
        "cache_free_gb": None if free is None else round(free / 1e9, 1),
        "not_installed": {
            name: {"for": what, "type": f"pip install {how}"}
            for name, (what, how) in OPTIONAL.items()
            if importlib.util.find_spec(name) is None
        },
        "wrong": wrong,
    }


def _free(path: Path) -> int | None:
    """Bytes left where `path` is or would be made."""
    import shutil

    while not path.exists():
        path = path.parent
    try:
        return shutil.disk_usage(path).free
    except OSError:
        return None


def _memory() -> float | None:
    try:
        return round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9, 1)
    except (ValueError, OSError, AttributeError):
        return None


def _lines(found: dict[str, Any]) -> Iterator[str]:
    memory = f", {found['memory_gb']} GB" if found["memory_gb"] else ""
    yield f"processor    {found['processor']}, {found['cores']} cores{memory}"
    yield f"threads      {found['threads']}"
    kernel = found["cpu_kernel"]
    yield f"CPU kernel   {'not there' if kernel is None else kernel}"
    yield f"GPU          {', '.join(found['accelerators']) or 'none that PyTorch sees'}"
    yield f"Python       {found['python']}"
    for name, version in found["versions"].items():
        yield f"{name:<13}{version}"
    free = "" if found["cache_free_gb"] is None else f", {found['cache_free_gb']} GB free"
    yield f"cache        {found['cache']}{free}"
    for name, one in found["not_installed"].items():
        yield f"without      {name} ({one['for']}): {one['type']}"
    for sentence in found["wrong"]:
        yield f"WRONG        {sentence}"
    if not found["wrong"]:
        yield "All is well."

"""The Triton kernels on a GPU against the float64 oracles: values and all gradients of every feature, before any time.

    python benchmarks/gpu/gate.py [--seconds 90]

The interpreter's cases (tests/kernels/triton), and such with the tiles of a GPU: heads of 64, 128 and 256 over a few
hundred tokens. A line a problem; the exit code is 1 if one is wrong or raised.
"""

import argparse
import os
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeAlias

os.environ.setdefault("TRITON_INTERPRET", "0")
sys.path.insert(0, str(Path(__file__).parents[2]))

import torch
from tests.kernels.support import (
    Case,
    answers,
    assert_rounding_only,
    make_inputs,
    make_masks,
    oracle_of,
    rounding,
)
from tests.kernels.triton import test_compact, test_endings
from tests.kernels.triton.test_compact import Held
from tests.kernels.triton.test_endings import Ending
from tests.kernels.triton.test_values import DTYPES, FEATURES, FORMS
from torch import Tensor

from clearhead.bench.cuda import reason_against_cuda
from clearhead.functional import attention, differential_attention

Problem: TypeAlias = Case | Ending | Held


def problems() -> Iterator[tuple[str, Problem]]:
    """Small ones first, so that what is broken shows at once."""
    yield from FEATURES.items()
    for name, ending in test_endings.CASES.items():
        yield f"{name}, ended in the kernel", ending
    for form in test_compact.FORMS:
        for mask in test_compact.MASKS:
            yield f"held keys, {form}, {mask}", Held("grouped", form, mask)
    for width in (64, 128, 256):
        for form, case in FORMS.items():
            wide = width * (2 if form == "v1" else 1)
            sizes: dict[str, Any] = {"width": width, "value_width": wide, "queries": 200, "keys": 200}
            yield f"{form}, {width} wide", replace(case, **sizes, heads=4, groups=2, causal=True)
    long = replace(FORMS["v1"], width=64, value_width=128, queries=300, keys=300, causal=True)
    yield "packed", replace(long, batch=2, hidden=("documents",))
    yield "padded window", replace(long, batch=2, hidden=("padding",), window=100)
    yield "decoding", replace(long, heads=8, groups=2, queries=1, keys=3000)


def on(case: Case, device: str) -> Callable[..., Tensor]:
    """The kernel as a function of CPU tensors, computed on `device`, gradients too."""
    masks = make_masks(case).arguments
    moved = {name: x.to(device) if isinstance(x, Tensor) else x for name, x in masks.items()}
    options: dict[str, Any] = {**moved, "scale": case.scale, "backend": "triton"}

    def run(q: Tensor, k: Tensor, v: Tensor, lam: Tensor | float = case.lam) -> Tensor:  # type: ignore[assignment]
        q, k, v = q.to(device), k.to(device), v.to(device)
        if case.streams == 1:
            return attention(q, k, v, **options).to("cpu")
        gate = lam.to(device) if isinstance(lam, Tensor) else lam
        return differential_attention(q, k, v, gate, **options).to("cpu")

    return run


def wrong(problem: Problem, dtype: torch.dtype, device: str) -> str | None:
    """What is wrong with the answers to a problem, with gradients and without; None if nothing is."""
    try:
        if isinstance(problem, Held):
            test_compact.assert_as_right_as_plain(problem, dtype, device)
        elif isinstance(problem, Ending):
            for grad in (True, False):
                run = test_endings.in_kernel(problem, device)
                found = test_endings.results(run, problem, dtype, dtype, grad)
                test_endings.assert_as_right_as_plain(found, problem, dtype)
        else:
            _check(problem, dtype, device)
    except Exception as error:  # whatever a kernel raises is its answer
        return f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
    return None


def _check(case: Case, dtype: torch.dtype, device: str) -> None:
    """AssertionError unless values and gradients are rounding away from the oracle's."""
    inputs = make_inputs(case, dtype)
    units = rounding(case, inputs, dtype)
    if dtype == torch.float16:
        # Small weights and their gradients are rounded to multiples of 2⁻²⁴ before they meet q, k, v or dO.
        largest = max(float(x.abs().max()) for x in (*inputs.tensors, inputs.cotangent))
        units = [unit + 2**-24 * case.keys * case.heads * case.queries * largest for unit in units]
    expected = answers(oracle_of(case), inputs, torch.float64, "dense")
    for grad in (True, False):
        found = answers(on(case, device), inputs, dtype, case.layout, grad)
        assert_rounding_only(found, expected, units)


def main(arguments: list[str], device: str = "cuda") -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seconds", type=float, default=float("inf"), help="no problem begins after so many")
    asked = parser.parse_args(arguments)
    reason = reason_against_cuda() if device == "cuda" else None
    if reason is not None:
        print(reason)
        return 1
    began, red, done = time.monotonic(), 0, 0
    every = [(name, case, dtype) for name, case in problems() for dtype in DTYPES]
    for name, case, dtype in every:
        if time.monotonic() - began > asked.seconds:
            break
        found = wrong(case, DTYPES[dtype], device)
        print(f"{name}, {dtype}: {found or 'right'}", flush=True)
        red, done = red + (found is not None), done + 1
    print(f"{done - red} of {done} right, {len(every) - done} not reached")
    return 1 if red else 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))

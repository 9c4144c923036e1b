"""The Triton kernels on problems nobody chose."""

import os

import pytest
import torch
from hypothesis import HealthCheck, given, seed, settings
from hypothesis import strategies as st

from tests.kernels.support import (
    LAYOUTS,
    Case,
    answers,
    assert_rounding_only,
    make_inputs,
    op_of,
    oracle_of,
    rounding,
)

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# A quarter of a second each in the interpreter; thousands where there is an hour.
EXAMPLES = int(os.environ.get("CLEARHEAD_TRITON_EXAMPLES", "100"))
PARTS = 10
# The backward pass visits every pair of tiles in Python.
MOST_ROWS = 48


@st.composite
def cases(draw: st.DrawFn) -> Case:
    streams = draw(st.sampled_from((1, 2, 2)))
    layout = draw(st.sampled_from(tuple(LAYOUTS)))
    batch = 2 if layout == "expanded" else draw(st.integers(1, 2))
    groups, repeats = draw(st.sampled_from((1, 1, 2))), draw(st.sampled_from((1, 2, 3)))
    queries = max(
        1, min(draw(st.sampled_from((1, 2, 7, 16, 17, 33))), MOST_ROWS // (batch * groups * repeats))
    )
    sizes = st.sampled_from((1, 5, 16, 17, 32, 48))
    hidden = ((), (), ("padding",), ("shared padding",), ("documents",), ("shared documents", "padding"))
    return Case(
        streams=streams,
        own_keys=streams == 2 and draw(st.booleans()),
        batch=batch,
        heads=groups * repeats,
        groups=groups,
        queries=queries,
        keys=queries + draw(st.sampled_from((0, 0, 1, 15, 16, 30))),
        width=draw(sizes),
        value_width=draw(sizes),
        lam=draw(st.sampled_from((0.0, 1.0, -0.7, 2.5, "call", "head", "token", "token"))),
        causal=draw(st.booleans()),
        window=draw(st.sampled_from((None, None, 1, 5, 20, 1000))),
        hidden=draw(st.sampled_from(hidden)),
        scale=draw(st.sampled_from((None, None, 0.0, 1.0, -0.25))),
        layout=layout,
        spread=draw(st.sampled_from((1.0, 1.0, 0.0, 8.0, 64.0))),
    )


@pytest.mark.parametrize("part", range(PARTS))
def test_any_problem(part: int) -> None:
    """In parts, each with problems of its own, so that two processes share them."""
    few = settings(
        max_examples=max(1, EXAMPLES // PARTS),
        deadline=None,
        database=None,
        suppress_health_check=list(HealthCheck),
    )
    seed(part)(few(given(cases(), st.sampled_from(DTYPES), st.booleans())(check)))()


def check(case: Case, dtype: torch.dtype, grad: bool) -> None:
    inputs = make_inputs(case, dtype)
    found = answers(op_of(case, "triton"), inputs, dtype, case.layout, grad)
    units = rounding(case, inputs, dtype)
    if dtype == torch.float16:
        # Small weights and their gradients are rounded to multiples of 2⁻²⁴ before they meet q, k, v or dO.
        largest = max(float(x.abs().max()) for x in (*inputs.tensors, inputs.cotangent))
        units = [unit + 2**-24 * case.keys * case.heads * case.queries * largest for unit in units]
    assert_rounding_only(found, answers(oracle_of(case), inputs, torch.float64, "dense"), units)

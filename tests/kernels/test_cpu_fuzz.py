"""The CPU kernel on problems nobody chose: shapes, strides, masks, precisions, λ and threads together."""

from dataclasses import replace

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from clearhead.kernels import ops
from clearhead.kernels.cpu import library
from tests.kernels.support import (
    DTYPES,
    LAYOUTS,
    Case,
    answers,
    assert_rounding_only,
    instruction_sets,
    make_inputs,
    op_of,
    oracle_of,
    rounding,
)

# The oracle takes its time for every row.
MOST_ROWS = 300


@st.composite
def cases(draw: st.DrawFn) -> Case:
    streams = draw(st.sampled_from((1, 2, 2)))
    layout = draw(st.sampled_from(tuple(LAYOUTS)))
    batch = 2 if layout == "expanded" else draw(st.integers(1, 3))
    groups, repeats = draw(st.sampled_from((1, 1, 2, 3))), draw(st.sampled_from((1, 2, 3, 8)))
    queries = draw(st.one_of(st.integers(1, 9), st.sampled_from((31, 32, 33, 63, 64, 65, 127, 129, 200))))
    queries = max(1, min(queries, MOST_ROWS // (streams * batch * groups * repeats)))
    more = draw(st.one_of(st.just(0), st.integers(0, 9), st.sampled_from((63, 64, 127, 128, 129, 255))))
    sizes = st.one_of(st.integers(1, 20), st.sampled_from((24, 31, 32, 33, 48, 64, 65, 80, 127)))
    return Case(
        streams=streams,
        own_keys=streams == 2 and draw(st.booleans()),
        batch=batch,
        heads=groups * repeats,
        groups=groups,
        queries=queries,
        keys=queries + more,
        width=draw(sizes),
        value_width=draw(sizes),
        lam=draw(st.sampled_from((0.0, 1.0, -0.7, 2.5, "call", "head", "token", "token"))),
        causal=draw(st.booleans()),
        window=draw(st.sampled_from((None, None, None, 1, 2, 5, 40, 130, 1000))),
        hidden=draw(
            st.sampled_from(
                (
                    (),
                    (),
                    ("padding",),
                    ("shared padding",),
                    ("documents",),
                    ("shared documents", "padding"),
                    ("documents", "shared padding"),
                )
            )
        ),
        scale=draw(st.sampled_from((None, None, 0.0, 1.0, -0.25, 1e-3))),
        layout=layout,
        spread=draw(st.sampled_from((1.0, 1.0, 0.0, 8.0, 64.0))),
    )


@settings(
    max_examples=150,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(
    case=cases(),
    dtype=st.sampled_from(tuple(DTYPES.values())),
    isa=st.sampled_from(instruction_sets()),
    threads=st.sampled_from((1, 2, 3)),
    most_noise=st.sampled_from((0, ops.MOST_NOISE)),
)
def test_any_problem(case: Case, dtype: torch.dtype, isa: str, threads: int, most_noise: int) -> None:
    library.load().set_isa(isa)
    torch.set_num_threads(threads)
    inputs = make_inputs(case, dtype)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ops, "MOST_NOISE", most_noise)
        found, alone = (
            answers(op_of(case, "cpu"), inputs, dtype, case.layout, grad) for grad in (True, False)
        )
    torch.set_num_threads(1)
    expected, units = answers(oracle_of(case), inputs, torch.float64, "dense"), rounding(case, inputs, dtype)
    assert_rounding_only(found, expected, units)
    assert_rounding_only(alone, expected, units)


@settings(
    max_examples=50,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(
    case=cases(),
    dtype=st.sampled_from(tuple(DTYPES.values())),
    isa=st.sampled_from(instruction_sets()),
    threads=st.sampled_from((1, 2)),
    left_out=st.sampled_from((1e-6, 0.02, 0.3, 0.9)),
)
def test_any_problem_loses_what_it_may(
    case: Case, dtype: torch.dtype, isa: str, threads: int, left_out: float
) -> None:
    """With blocks left out: off by left_out (1 + |λ|) times how far values spread, beside rounding."""
    library.load().set_isa(isa)
    torch.set_num_threads(threads)
    inputs = make_inputs(case, dtype)
    function = op_of(case, "cpu", block_sparse={"left_out": left_out, "least": 1})
    (found,) = answers(function, inputs, dtype, case.layout, grad=False)
    torch.set_num_threads(1)
    expected = answers(oracle_of(case), inputs, torch.float64, "dense", grad=False)[0]
    _, _, v, *rest = inputs.tensors
    gate = rest[0].abs() if rest else abs(float(case.lam)) if case.streams == 2 else 0.0
    span = (v.amax(2, keepdim=True) - v.amin(2, keepdim=True)).repeat_interleave(case.heads // case.groups, 1)
    allowed = 1.0001 * left_out * (1 + gate) * span + 2 * rounding(case, inputs, dtype)[0]
    assert bool(((found - expected).abs() <= allowed).all())


@settings(
    max_examples=60,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(
    case=cases(),
    dtype=st.sampled_from(tuple(DTYPES.values())),
    isa=st.sampled_from(instruction_sets()),
    threads=st.sampled_from((1, 2, 3)),
    layout=st.sampled_from(tuple(LAYOUTS)),
)
def test_strides_and_repetition_change_no_bit(
    case: Case, dtype: torch.dtype, isa: str, threads: int, layout: str
) -> None:
    library.load().set_isa(isa)
    torch.set_num_threads(threads)
    if case.batch != 2 and layout == "expanded":
        layout = "model"
    inputs = make_inputs(replace(case, layout=layout), dtype)
    dense, again, strided = (
        answers(op_of(case, "cpu"), inputs, dtype, how) for how in ("dense", "dense", layout)
    )
    for other in (again, strided):
        assert all(torch.equal(a, b) for a, b in zip(dense, other, strict=True))

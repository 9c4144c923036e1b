"""Values and all gradients of the Triton kernels against the float64 oracles: every feature, and some together.

A tile of the interpreter has 16 rows and 16 keys, so that these small problems have whole and cut tiles, tiles on the
diagonal, off it and hidden ones, and several stretches in the backward pass.
"""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from clearhead.functional import attention, differential_attention
from tests.kernels.support import Case, answers, assert_right, assert_rounding_only, op_of, solve
from tests.oracles import differential, softmax
from tests.oracles.softmax import visible

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
V1 = Case(own_keys=True, batch=1, heads=2, groups=1, queries=18, keys=34, width=16, value_width=32)
V2 = replace(V1, own_keys=False, value_width=16)
SOFTMAX = replace(V2, streams=1)
FORMS = {"v1": V1, "v2": V2, "softmax": SOFTMAX}
FEATURES = {
    "open": V1,
    "causal": replace(V1, causal=True),
    "values of the keys' width": replace(V1, causal=True, value_width=V1.width),
    "causal, square": replace(V1, causal=True, queries=34),
    "window": replace(V2, causal=True, queries=34, window=7),
    "wide window": replace(SOFTMAX, causal=True, queries=40, keys=40, window=21),
    "window both ways": replace(V2, queries=34, window=9),
    "padding": replace(V1, batch=2, groups=2, hidden=("padding",)),
    "shared padding": replace(SOFTMAX, batch=2, causal=True, hidden=("shared padding",)),
    "documents": replace(V1, causal=True, queries=34, hidden=("documents",)),
    "shared documents and padding": replace(V2, batch=2, hidden=("shared documents", "padding")),
    "documents, window": replace(V2, causal=True, queries=34, window=11, hidden=("documents",)),
    "multi-head": replace(V1, groups=2, causal=True),
    "three heads a group": replace(V2, heads=6, groups=2, queries=7, keys=20, causal=True),
    "multi-query": replace(SOFTMAX, heads=4, queries=9, causal=True),
    "one query": replace(V1, heads=4, queries=1, keys=50, causal=True),
    "one λ": replace(V1, lam="call"),
    "λ a head": replace(V1, heads=4, groups=2, lam="head", queries=9),
    "number as λ": replace(V2, lam=-0.7),
    "width 12": replace(V1, width=12, value_width=24, causal=True),
    "width 40": replace(V1, width=40, value_width=80, queries=17, keys=17),
    "width 3": replace(V2, width=3, value_width=5),
    "value narrower": replace(V2, width=32, value_width=16),
    "own keys, one width": replace(V1, value_width=16, scale=0.5),
    "negative scale": replace(SOFTMAX, scale=-0.3),
}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("form", FORMS)
def test_each_type(form: str, dtype: str) -> None:
    case, precision = replace(FORMS[form], causal=True), DTYPES[dtype]
    solution = solve(case, precision)
    assert_right(answers(op_of(case, "triton"), solution.inputs, precision, "model"), solution, precision)


@pytest.mark.parametrize("feature", FEATURES)
def test_each_feature(feature: str) -> None:
    case = FEATURES[feature]
    solution = solve(case, torch.float32)
    assert_right(
        answers(op_of(case, "triton"), solution.inputs, torch.float32, case.layout), solution, torch.float32
    )


def test_a_row_that_sees_one_key_has_its_value_and_hardly_a_gradient() -> None:
    case = replace(V2, queries=20, keys=20, causal=True, window=1)
    solution = solve(case, torch.float32)
    found = answers(op_of(case, "triton"), solution.inputs, torch.float32, "dense")
    assert_rounding_only(found, solution.expected, solution.units)


# Without gradients keys are divided among programs, and few rows take other tiles.
@pytest.mark.parametrize(
    "feature",
    ["open", "window", "shared padding", "documents", "three heads a group", "one query", "width 12"],
)
def test_without_gradients(feature: str) -> None:
    case = replace(FEATURES[feature], keys=FEATURES[feature].keys + 40)
    solution = solve(case, torch.float32)
    assert_right(
        answers(op_of(case, "triton"), solution.inputs, torch.float32, "dense", False),
        solution,
        torch.float32,
    )


@pytest.mark.parametrize("form", ["v1", "softmax"])
@pytest.mark.parametrize("width", [64, 128, 256])
def test_wide_heads(width: int, form: str) -> None:
    wide = replace(
        FORMS[form], queries=5, keys=20, width=width, value_width=width * (2 if form == "v1" else 1)
    )
    solution = solve(wide, torch.float32)
    assert_right(
        answers(op_of(wide, "triton"), solution.inputs, torch.float32, "dense"), solution, torch.float32
    )


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("form", ["v1", "softmax"])
def test_alibi(form: str, causal: bool) -> None:
    case = replace(FORMS[form], heads=4, groups=2, queries=20, causal=causal)
    solution = solve(case, torch.float32)
    slopes = torch.tensor([0.5, 0.25, 0.0, 1.5])
    distance = torch.arange(case.keys) - torch.arange(case.keys - case.queries, case.keys)[:, None]
    bias = -slopes.double()[:, None, None] * distance.abs()
    allowed = visible(case.batch, case.queries, case.keys, causal=causal)[:, None]

    def exact(q: Tensor, k: Tensor, v: Tensor, *lam: Tensor) -> Tensor:
        oracle = softmax.attention if case.streams == 1 else differential.differential_attention
        return oracle(q, k, v, *lam, allowed=allowed, bias=bias[None])

    def fused(q: Tensor, k: Tensor, v: Tensor, *lam: Tensor) -> Tensor:
        op = attention if case.streams == 1 else differential_attention
        return op(q, k, v, *lam, is_causal=causal, alibi_slopes=slopes, backend="triton")

    expected = answers(exact, solution.inputs, torch.float64, "dense")
    # The unit of rounding of the same problem without slopes: the bias adds up to 50 to its logits.
    units = [30 * x for x in solution.units]
    assert_rounding_only(answers(fused, solution.inputs, torch.float32, "dense"), expected, units)
    assert_rounding_only(answers(fused, solution.inputs, torch.float32, "dense", False), expected, units)

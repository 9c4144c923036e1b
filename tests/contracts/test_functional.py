"""The public ops against the float64 oracles: every head layout, mask and engine, values and gradients."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from clearhead.functional import attention, differential_attention
from clearhead.kernels.cpu import library
from tests.contracts.support import (
    HEADS,
    INDEXED,
    MASKS,
    assert_within,
    distance,
    distances,
    make_mask,
    plain_attention,
    plain_differential,
    rand,
    value_and_gradients,
)
from tests.oracles import differential, softmax

B, L, D = 2, 6, 4
DIFFERENTIABLE = ("eager", "sdpa", "auto")
LOW_PRECISION = ("causal", "last", "padding", "bias", "blind_rows", "window_of_real_documents")
needs_kernel = pytest.mark.skipif(library.missing() is not None, reason=str(library.missing()))
# The CPU kernel computes in low precision only, and takes no (L, S) masks.
LOW = [(backend, kind) for backend in DIFFERENTIABLE for kind in LOW_PRECISION]
LOW += [pytest.param("cpu", kind, marks=needs_kernel) for kind in ("none", *INDEXED, "window_of_one")]  # type: ignore[misc]
low_precision = pytest.mark.parametrize(("backend", "kind"), LOW)


def softmax_problem(heads: int, groups: int, extra: int, wide: int = 1) -> tuple[list[Tensor], Tensor]:
    """q, k, v and a cotangent; values `wide` times as wide as keys."""
    inputs = [rand(B, heads, L, D, seed=1), rand(B, groups, L + extra, D, seed=2)]
    inputs.append(rand(B, groups, L + extra, wide * D, seed=3))
    return inputs, rand(B, heads, L, wide * D, seed=4)


def differential_problem(
    heads: int, groups: int, extra: int, own_keys: bool, wide: int
) -> tuple[list[Tensor], Tensor]:
    """q, k, v, λ and a cotangent; λ differs by token and head and may be negative or above one."""
    keys = 2 * groups if own_keys else groups
    inputs = [
        rand(B, 2 * heads, L, D, seed=1),
        rand(B, keys, L + extra, D, seed=2),
        rand(B, groups, L + extra, wide * D, seed=3),
        rand(B, heads, L, 1, seed=5),
    ]
    return inputs, rand(B, heads, L, wide * D, seed=4)


@pytest.mark.parametrize("backend", DIFFERENTIABLE)
@pytest.mark.parametrize("kind", MASKS)
@pytest.mark.parametrize("layout", HEADS)
def test_attention_is_exact_in_float64(layout: str, kind: str, backend: str) -> None:
    heads, groups = HEADS[layout]
    mask = make_mask(kind, B, heads, L)
    inputs, cotangent = softmax_problem(heads, groups, mask.keys_beyond_queries)
    expected = value_and_gradients(softmax.attention, inputs, cotangent, torch.float64, **mask.oracle)
    found = value_and_gradients(attention, inputs, cotangent, torch.float64, backend=backend, **mask.op)
    assert max(distances(found, expected)) < 1e-10


# V1 has keys of its own for each stream and a value twice as wide; V2 shares the keys.
FORMS = {"v1": (True, 2), "v2": (False, 1), "own_keys_narrow": (True, 1)}


@pytest.mark.parametrize("backend", DIFFERENTIABLE)
@pytest.mark.parametrize("kind", MASKS)
@pytest.mark.parametrize("layout", HEADS)
@pytest.mark.parametrize("form", FORMS)
def test_differential_attention_is_exact_in_float64(form: str, layout: str, kind: str, backend: str) -> None:
    heads, groups = HEADS[layout]
    mask = make_mask(kind, B, heads, L)
    inputs, cotangent = differential_problem(heads, groups, mask.keys_beyond_queries, *FORMS[form])
    oracle = differential.differential_attention
    expected = value_and_gradients(oracle, inputs, cotangent, torch.float64, **mask.oracle)
    found = value_and_gradients(
        differential_attention, inputs, cotangent, torch.float64, backend=backend, **mask.op
    )
    assert max(distances(found, expected)) < 1e-10


@low_precision
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=("float32", "bfloat16"))
def test_low_precision_attention_is_as_good_as_plain(dtype: torch.dtype, kind: str, backend: str) -> None:
    mask = make_mask(kind, B, 4, L)
    inputs, cotangent = softmax_problem(4, 2, mask.keys_beyond_queries)
    inputs, cotangent = [x.to(dtype).double() for x in inputs], cotangent.to(dtype).double()
    expected = value_and_gradients(softmax.attention, inputs, cotangent, torch.float64, **mask.oracle)
    plain = value_and_gradients(plain_attention, inputs, cotangent, dtype, **mask.op)
    found = value_and_gradients(attention, inputs, cotangent, dtype, backend=backend, **mask.op)
    assert_within(found, expected, plain, dtype)


@low_precision
@pytest.mark.parametrize("form", ("v1", "v2"))
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=("float32", "bfloat16"))
def test_low_precision_differential_is_as_good_as_plain(
    dtype: torch.dtype, form: str, kind: str, backend: str
) -> None:
    mask = make_mask(kind, B, 4, L)
    inputs, cotangent = differential_problem(4, 2, mask.keys_beyond_queries, *FORMS[form])
    inputs, cotangent = [x.to(dtype).double() for x in inputs], cotangent.to(dtype).double()
    oracle = differential.differential_attention
    expected = value_and_gradients(oracle, inputs, cotangent, torch.float64, **mask.oracle)
    plain = value_and_gradients(plain_differential, inputs, cotangent, dtype, **mask.op)
    found = value_and_gradients(differential_attention, inputs, cotangent, dtype, backend=backend, **mask.op)
    assert_within(found, expected, plain, dtype)


@settings(max_examples=25, deadline=None, derandomize=True)
@given(
    batch=st.integers(1, 3),
    groups=st.integers(1, 3),
    repeats=st.integers(1, 3),
    queries=st.integers(1, 7),
    more_keys=st.integers(0, 5),
    width=st.sampled_from((2, 3, 8)),
    value_width=st.sampled_from((1, 4, 6, 16)),
    own_keys=st.booleans(),
    causal=st.booleans(),
    window=st.sampled_from((None, 1, 2, 5, 20)),
    scale=st.sampled_from((None, 0.25, 1.0)),
    lam=st.sampled_from((0.0, 0.8, -0.3, "head", "token")),
)
def test_any_shape(
    batch: int,
    groups: int,
    repeats: int,
    queries: int,
    more_keys: int,
    width: int,
    value_width: int,
    own_keys: bool,
    causal: bool,
    window: int | None,
    scale: float | None,
    lam: float | str,
) -> None:
    heads, keys = groups * repeats, queries + more_keys
    q = rand(batch, 2 * heads, queries, width, seed=1)
    k = rand(batch, 2 * groups if own_keys else groups, keys, width, seed=2)
    v = rand(batch, groups, keys, value_width, seed=3)
    shapes = {"head": (heads, 1, 1), "token": (batch, heads, queries, 1)}
    gate = rand(*shapes[lam], seed=4) if isinstance(lam, str) else lam
    oracle = {
        "allowed": softmax.visible(batch, queries, keys, causal=causal, window=window)[:, None],
        "scale": scale,
    }
    expected = differential.differential_attention(q, k, v, gate, **oracle)  # type: ignore[arg-type]
    found = differential_attention(q, k, v, gate, is_causal=causal, window=window, scale=scale)
    assert found.shape == expected.shape
    assert distance(found, expected) < 1e-10
    one = (
        attention(q, k, v, is_causal=causal, window=window, scale=scale)
        if (2 * heads) % k.shape[1] == 0 and not own_keys
        else None
    )
    if one is not None:
        assert distance(one, softmax.attention(q, k, v, **oracle)) < 1e-10  # type: ignore[arg-type]


@pytest.mark.parametrize("backend", DIFFERENTIABLE)
@pytest.mark.parametrize("shape", [(1, L), (L, 1), (B, 1, 1, L), (1, 4, 1, 1), (1, 1, L, L)], ids=str)
def test_a_one_in_a_mask_stands_for_any_size(shape: tuple[int, ...], backend: str) -> None:
    inputs, _ = differential_problem(4, 2, 0, True, 2)
    full = (B, 4, L, L)
    bias = rand(*shape, seed=8)
    for mask, name in ((bias, "bias"), (bias < 0.5, "allowed")):
        found = differential_attention(*inputs, is_causal=True, attn_mask=mask, backend=backend)
        expected = differential.differential_attention(*inputs, causal=True, **{name: mask.expand(full)})  # type: ignore[arg-type]
        assert distance(found, expected) < 1e-10


@pytest.mark.parametrize("backend", DIFFERENTIABLE)
def test_blind_rows_are_zero_and_their_gradients_finite(backend: str) -> None:
    mask = make_mask("blind_rows", B, 4, L)
    for dtype in (torch.float32, torch.bfloat16):
        inputs, cotangent = differential_problem(4, 2, 0, True, 2)
        found = value_and_gradients(
            differential_attention, inputs, cotangent, dtype, backend=backend, **mask.op
        )
        assert not found[0][0, :, 1].any()
        assert not found[0][:, 0, 3].any()
        assert all(bool(x.isfinite().all()) for x in found)


def test_the_automatic_choice_compiles_as_one_graph() -> None:
    torch._dynamo.reset()
    inputs, _ = differential_problem(4, 2, 0, True, 2)
    compiled = torch.compile(differential_attention, fullgraph=True, backend="aot_eager")
    for arguments in ({"is_causal": True}, {"window": 3}):
        assert distance(compiled(*inputs, **arguments), differential_attention(*inputs, **arguments)) < 1e-10


COMPILED = ("causal", "window_of_real_documents")
UNCOMPILED = [kind for kind in INDEXED if kind not in COMPILED]


@pytest.mark.parametrize(
    "kind", [*UNCOMPILED, *(pytest.param(kind, marks=pytest.mark.compiles) for kind in COMPILED)]
)
def test_flex_forward_is_as_good_as_plain(kind: str) -> None:
    mask = make_mask(kind, B, 4, L)
    inputs, _ = differential_problem(4, 2, mask.keys_beyond_queries, *FORMS["v2"])
    narrow = [x.float() for x in inputs]
    expected = differential.differential_attention(*[x.double() for x in narrow], **mask.oracle)  # type: ignore[arg-type]
    plain = plain_differential(*narrow, **mask.op)
    found = differential_attention(*narrow, backend="flex", **mask.op)  # type: ignore[arg-type]
    assert_within([found], [expected], [plain], torch.float32)

"""The Triton kernels where numbers are extreme, missing or hidden, and where a cache decides the positions."""

from dataclasses import replace

import pytest
import torch

from clearhead.core.attend import attend, difference, prepare, problem_of
from clearhead.core.dispatch import load_backend
from clearhead.core.masks import MaskSpec
from clearhead.core.streams import Streams
from clearhead.functional import differential_attention
from clearhead.kernels.triton import launch
from tests.kernels.support import (
    Case,
    Inputs,
    answers,
    assert_rounding_only,
    make_inputs,
    op_of,
    oracle_of,
    rounding,
)

V1 = Case(own_keys=True, batch=1, heads=2, groups=1, queries=18, keys=34, width=16, value_width=32)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_logits_of_ten_thousand(dtype: torch.dtype) -> None:
    case = replace(V1, scale=0.25)
    plain = make_inputs(case, torch.bfloat16)
    q, k = torch.zeros_like(plain.tensors[0]), torch.zeros_like(plain.tensors[1])
    q[..., 0] = torch.where(torch.arange(case.queries) % 2 == 0, 100.0, -100.0)
    k[..., 0] = torch.linspace(-400, 400, case.keys).bfloat16().double()
    inputs = Inputs((q, k, *plain.tensors[2:]), plain.cotangent)
    expected = answers(oracle_of(case), inputs, torch.float64, "dense")
    for grad in (True, False):
        found = answers(op_of(case, "triton"), inputs, dtype, "dense", grad)
        assert all(bool(x.isfinite().all()) for x in found)
        assert_rounding_only(found, expected, rounding(case, inputs, dtype))


@pytest.mark.parametrize("grad", [True, False])
def test_a_row_that_sees_nothing_is_zero_and_padding_may_hold_anything(grad: bool) -> None:
    case = replace(V1, batch=2)
    real = torch.ones(2, case.keys, dtype=torch.bool)
    real[0] = False
    real[1, :20] = False
    tensors = [x.float() for x in make_inputs(case, torch.float32).tensors]
    clean = [x.clone().requires_grad_(grad) for x in tensors]
    for x in tensors[1:3]:
        x.masked_fill_(~real[:, None, :, None], float("nan"))
    leaves = [x.requires_grad_(grad) for x in tensors]
    out, expected = (
        differential_attention(*x, key_padding_mask=real, backend="triton") for x in (leaves, clean)
    )
    assert not out[0].any() and torch.equal(out, expected)
    if grad:
        found, right = (torch.autograd.grad(y.sum(), x) for y, x in ((out, leaves), (expected, clean)))
        assert all(torch.equal(a, b) and not a[0].any() for a, b in zip(found, right, strict=True))


@pytest.mark.parametrize("documents", [False, True])
@pytest.mark.parametrize("queries", [1, 5])
def test_a_cache_of_fixed_size_gives_positions_as_a_tensor(queries: int, documents: bool) -> None:
    case = replace(V1, batch=2, queries=queries)
    q, k, v, lam = (x.float() for x in make_inputs(case, torch.float32).tensors)
    heads = Streams(q.unflatten(1, (-1, 2)).unbind(2), k.unflatten(1, (-1, 2)).unbind(2), v, lam)
    packed = (torch.arange(case.keys) // 7)[None] if documents else None
    results = []
    for name, offset in (("eager", 11), ("triton", 11), ("triton", torch.tensor(11))):
        mask = MaskSpec(is_causal=True, offset=offset, window=30, documents=packed)
        prepared = prepare(
            (load_backend(name),), problem_of(heads, mask, "difference"), mask, automatic=False
        )
        results.append(attend(heads, prepared, 0.25, difference)[0])
    assert float((results[0] - results[1]).abs().max()) < 1e-5
    assert torch.equal(results[1], results[2])


def test_blocks_that_nobody_sees_are_skipped(monkeypatch: pytest.MonkeyPatch) -> None:
    """Packed documents of 16 tokens: a tile each, of the nine by nine."""
    from triton.runtime import interpreter

    visits = []
    original = interpreter.InterpreterBuilder.create_dot

    def create_dot(self, a, b, *rest):  # type: ignore[no-untyped-def]
        visits.append((a.data.shape, b.data.shape))
        return original(self, a, b, *rest)

    monkeypatch.setattr(interpreter.InterpreterBuilder, "create_dot", create_dot)
    case = replace(V1, heads=1, queries=144, keys=144, causal=True)
    inputs = make_inputs(case, torch.float32)
    q, k, v, lam = (x.float().requires_grad_() for x in inputs.tensors)
    documents = (torch.arange(144) // 16)[None]
    out = differential_attention(q, k, v, lam, is_causal=True, documents=documents, backend="triton")
    assert len(visits) == 9 * 4
    torch.autograd.grad(out.sum(), (q, k, v, lam))
    assert len(visits) == 9 * (4 + 8)


def test_the_backward_pass_gives_the_same_for_any_number_of_stretches(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    case = replace(V1, queries=34, causal=True)
    inputs, results = make_inputs(case, torch.float32), []
    for processors in (1, 3, 100):
        monkeypatch.setattr(launch, "_INTERPRETED_PROCESSORS", processors)
        results.append(answers(op_of(case, "triton"), inputs, torch.float32, "dense"))
    for other in results[1:]:
        for a, b in zip(results[0], other, strict=True):
            assert float((a - b).abs().max()) <= 1e-5 * float(b.abs().max())

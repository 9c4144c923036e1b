"""A derivative that an operator does not define is an error that says who has it, never a zero."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.autograd.forward_ad as forward_ad
from torch import Tensor
from torch.func import grad, hessian, jvp, vmap

import clearhead.nn as nn
from clearhead.core.attend import problem_of
from clearhead.core.dispatch import Caps, Kernel, choose, load_backend
from clearhead.core.masks import MaskSpec
from clearhead.core.streams import Streams
from clearhead.functional import attention, differential_attention
from clearhead.kernels.cpu import library
from tests.contracts.support import rand

X = rand(1, 2, 8, 8, seed=1).float()
Q, K, V = (rand(1, heads, 40, 8, seed=heads).float() for heads in (8, 4, 2))
needs_kernel = pytest.mark.skipif(library.missing() is not None, reason=str(library.missing()))


def fused(q: Tensor) -> Tensor:
    out: Tensor = torch.ops.clearhead.fused_attention(
        q, None, X, None, X, None, None, None, None, 0, 0, True, 0.3, False
    )[0]
    return out


def factored(q: Tensor) -> Tensor:
    out: Tensor = torch.ops.clearhead.factored_attention(
        q, None, X[..., :4], None, torch.ones(1, 8, 8), X, None, None, None, 0, 0, True, 0.3
    )
    return out


@needs_kernel
@pytest.mark.parametrize("operator", [fused, factored])
def test_the_operators_themselves(operator: Callable[[Tensor], Tensor]) -> None:
    q = X[:, :, :2]
    with pytest.raises(RuntimeError, match=r'no forward-mode derivatives.*backend="eager"'):
        jvp(operator, (q,), (q,))
    with (
        forward_ad.dual_level(),
        pytest.raises(RuntimeError, match=r'no forward-mode derivatives.*backend="eager"'),
    ):
        operator(forward_ad.make_dual(q, q))


def tangent_of_gradient(backend: str) -> Tensor | None:
    """An ordinary forward pass; its gradient is then differentiated along a change of the cotangent."""
    q = Q.clone().requires_grad_()
    out = differential_attention(q, K, V, 0.5, is_causal=True, backend=backend)
    with forward_ad.dual_level():
        cotangent = forward_ad.make_dual(torch.ones_like(out), torch.ones_like(out))
        (gradient,) = torch.autograd.grad(out, q, cotangent)
        return forward_ad.unpack_dual(gradient).tangent


@needs_kernel
@pytest.mark.parametrize("backend", ["auto", "cpu", "sdpa"])
def test_the_gradient_of_a_recorded_pass(backend: str) -> None:
    assert tangent_of_gradient("eager") is not None
    with pytest.raises(RuntimeError, match=r'nor of its gradients.*backend="eager"'):
        tangent_of_gradient(backend)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("backend", ["auto", "cpu", "sdpa", "eager"])
def test_a_second_derivative(backend: str, dtype: torch.dtype) -> None:
    if backend == "cpu" and (library.missing() is not None or dtype == torch.float64):
        pytest.skip("not computed by it")
    q = Q.to(dtype).requires_grad_()
    out = differential_attention(q, K.to(dtype), V.to(dtype), 0.5, is_causal=True, backend=backend)
    (first,) = torch.autograd.grad(out.square().sum(), q, create_graph=True)
    if backend == "eager":
        assert bool(torch.autograd.grad(first.sum(), q)[0].any())
        return
    with pytest.raises(RuntimeError, match='no second derivative: take backend="eager"'):
        first.sum().backward()


def test_a_first_derivative_is_not_in_the_way() -> None:
    """Also one that is recorded, several at once, and one that is taken twice."""
    q = Q.clone().requires_grad_()
    out = differential_attention(q, K, V, 0.5, is_causal=True, backend="sdpa")
    (plain,) = torch.autograd.grad(out.sum(), q, retain_graph=True)
    (recorded,) = torch.autograd.grad(out.sum(), q, create_graph=True)
    assert torch.equal(plain, recorded)
    batched = torch.autograd.grad(
        out, q, torch.ones(2, *out.shape), is_grads_batched=True, create_graph=True
    )[0]
    assert torch.allclose(batched[1], plain, atol=1e-5)


class Careless(Kernel):
    """Says nothing of derivatives, as a kernel from elsewhere may."""

    name = "careless"

    def refusal(self, problem: Any) -> str | None:
        return None

    def run(self, heads: Streams, mask: MaskSpec, scale: float) -> Tensor:
        raise AssertionError("it must not run")


def test_who_says_nothing_has_none() -> None:
    assert Caps().modes == frozenset()
    chosen: list[str] = []

    def function(q: Tensor) -> Tensor:
        problem = problem_of(Streams((q,), (X,), X), MaskSpec(), "single")
        chosen.append(choose((Careless(), load_backend("eager")), problem, automatic=True).backend.name)
        with pytest.raises(ValueError, match="it has no "):
            choose((Careless(),), problem, automatic=False)
        with pytest.raises(ValueError, match=r"flash_attention_2.* it runs on|it has no"):
            choose((load_backend("flash_attention_2"),), problem, automatic=False)
        return q.sum()

    grad(function)(X)
    jvp(function, (X,), (X,))
    vmap(function)(X[None])
    assert chosen == ["eager"] * 3


@pytest.mark.parametrize("way", ["jvp", "grad", "vmap of grad", "hessian"])
def test_each_way_compiles_as_one_graph(way: str) -> None:
    torch._dynamo.reset()

    def loss(q: Tensor) -> Tensor:
        return differential_attention(q, K, V, 0.5, is_causal=True).square().sum()

    small = tuple(x[:, :, :3] for x in (Q, K, V))
    function: Callable[[Tensor], Tensor] = {
        "jvp": lambda q: jvp(loss, (q,), (torch.ones_like(q),))[1],
        "grad": grad(loss),
        "vmap of grad": lambda q: vmap(grad(lambda row: loss(row[None])))(q),
        "hessian": lambda lam: hessian(
            lambda lam: differential_attention(*small, lam.sum(), is_causal=True).square().sum()
        )(lam),
    }[way]
    argument = torch.tensor([0.3, 0.1]) if way == "hessian" else Q
    compiled = torch.compile(function, fullgraph=True, backend="eager")(argument)
    assert torch.allclose(compiled, function(argument), rtol=1e-4, atol=1e-4) and bool(compiled.any())


def test_a_compiled_layer_is_compiled_anew_where_tangents_are() -> None:
    torch._dynamo.reset()
    layer = nn.DifferentialAttentionV2(16, 2)
    compiled = torch.compile(layer, backend="eager")
    x = rand(1, 40, 16, seed=3).float()
    with torch.no_grad():
        compiled(x, is_causal=True)
        with forward_ad.dual_level():
            dual = forward_ad.make_dual(x, torch.ones_like(x))
            found = forward_ad.unpack_dual(compiled(dual, is_causal=True)).tangent
            expected = forward_ad.unpack_dual(layer(dual, is_causal=True)).tangent
    assert found is not None and torch.allclose(found, expected, atol=1e-5)


def test_a_named_backend_keeps_its_reason() -> None:
    with pytest.raises(ValueError, match=r"'sdpa' cannot run .*no forward-mode derivatives"):
        jvp(lambda q: attention(q, K, V.repeat(1, 2, 1, 1), backend="sdpa"), (Q,), (Q,))

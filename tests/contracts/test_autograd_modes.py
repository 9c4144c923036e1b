"""Every way to differentiate that PyTorch has: the oracle's derivative, or one sentence that says who has it."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.autograd.forward_ad as forward_ad
from torch import Tensor
from torch.func import functional_call, grad, hessian, jacfwd, jacrev, jvp, vjp, vmap

import clearhead.nn as nn
from clearhead.core.modes import active_modes
from clearhead.functional import attention, differential_attention
from clearhead.kernels.cpu import library
from tests.contracts.support import rand
from tests.oracles import differential, softmax

# 40 tokens in float32 is where "auto" takes the fused kernel.
B, H, G, L, D = 2, 2, 1, 40, 4
DTYPES = {torch.float32: 2e-5, torch.float64: 1e-10}
INPUTS = (rand(B, 2 * H, L, D, seed=1), rand(B, 2 * G, L, D, seed=2), rand(B, G, L, 2 * D, seed=3))
LAM = rand(B, H, L, 1, seed=4)
TANGENTS = tuple(
    torch.randn(x.shape, generator=torch.Generator().manual_seed(9)).double() for x in (*INPUTS, LAM)
)
SMALL = tuple(x[:1, :, :3] for x in (*INPUTS, LAM))


def ours(*inputs: Tensor, backend: str = "auto") -> Tensor:
    return differential_attention(*inputs, is_causal=True, backend=backend)  # type: ignore[arg-type]


def exact(*inputs: Tensor) -> Tensor:
    return differential.differential_attention(*inputs, causal=True)  # type: ignore[arg-type]


def near(found: Tensor, expected: Tensor) -> bool:
    return bool((found.double() - expected).abs().max() <= DTYPES[found.dtype] * expected.abs().max())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_forward_mode(dtype: torch.dtype) -> None:
    inputs, tangents = ([x.to(dtype) for x in part] for part in ((*INPUTS, LAM), TANGENTS))
    _, expected = jvp(exact, (*INPUTS, LAM), TANGENTS)
    assert float(expected.abs().max()) > 1
    assert near(jvp(ours, tuple(inputs), tuple(tangents))[1], expected)
    with forward_ad.dual_level():
        out = ours(*(forward_ad.make_dual(x, t) for x, t in zip(inputs, tangents, strict=True)))
        assert near(forward_ad.unpack_dual(out).tangent, expected)
    # λ alone, which is a number to the kernel.
    _, expected = jvp(lambda lam: exact(*INPUTS, lam), (LAM,), TANGENTS[3:])
    assert near(jvp(lambda lam: ours(*inputs[:3], lam), (inputs[3],), (tangents[3],))[1], expected)


def test_one_stream_too() -> None:
    q, k, v = INPUTS[0].float(), INPUTS[1].float(), INPUTS[2].repeat(1, 2, 1, 1).float()
    ones = (torch.ones_like(q),)
    found = jvp(lambda q: attention(q, k, v, is_causal=True), (q,), ones)[1]
    double = (k.double(), v.double())
    expected = jvp(lambda q: softmax.attention(q, *double, causal=True), (q.double(),), (ones[0].double(),))[
        1
    ]
    assert near(found, expected)


REVERSE: dict[str, Callable[[Callable[..., Tensor], tuple[Tensor, ...]], Tensor]] = {
    "grad": lambda f, x: grad(lambda q: f(q, *x[1:]).square().sum())(x[0]),
    "vjp": lambda f, x: vjp(lambda v: f(*x[:2], v, x[3]), x[2])[1](f(*x))[0],
    "jacrev": lambda f, x: jacrev(lambda lam: f(*x[:3], lam).sum((0, 3)))(x[3]),
    "jacfwd": lambda f, x: jacfwd(lambda lam: f(*x[:3], lam).sum((0, 3)))(x[3]),
    "hessian": lambda f, x: hessian(lambda lam: f(*x[:3], lam).square().sum())(x[3]),
    "grad of grad": lambda f, x: grad(
        lambda q: grad(lambda q: f(q, *x[1:]).square().sum())(q).square().sum()
    )(x[0]),
}


@pytest.mark.parametrize("way", REVERSE)
def test_functional_gradients(way: str) -> None:
    inputs = SMALL if way in ("jacrev", "jacfwd", "hessian", "grad of grad") else (*INPUTS, LAM)

    def reference(*x: Tensor) -> Tensor:
        # The oracle's loops cannot be vmapped, and eager attention in float64 equals it in all that can be.
        return ours(*x, backend="eager")

    expected = REVERSE[way](reference if way in ("jacrev", "jacfwd", "hessian") else exact, inputs)
    assert near(REVERSE[way](ours, tuple(x.float() for x in inputs)), expected)


def test_gradients_of_each_sample() -> None:
    samples = tuple(x.float()[:, None] for x in (*INPUTS, LAM))
    found = vmap(grad(lambda q, k, v, lam: ours(q, k, v, lam).square().sum()))(*samples)
    for i in range(B):
        own = [x[i : i + 1] for x in (*INPUTS, LAM)]
        q = own[0].clone().requires_grad_()
        (expected,) = torch.autograd.grad(exact(q, *own[1:]).square().sum(), q)
        assert near(found[i], expected)


def test_a_layer_s_parameters() -> None:
    layer = nn.DifferentialAttention(16, 4)
    x = torch.randn(3, 40, 16)
    parameters = {name: p.detach() for name, p in layer.named_parameters()}
    moved = {name: torch.ones_like(p) for name, p in parameters.items()}

    def loss(parameters: dict[str, Tensor], x: Tensor) -> Tensor:
        return functional_call(layer, parameters, (x,), {"is_causal": True}).square().sum()

    _, forward = jvp(lambda p: loss(p, x), (parameters,), (moved,))
    reverse = grad(loss)(parameters, x)
    assert torch.allclose(forward, sum(g.sum() for g in reverse.values()), rtol=1e-3)  # type: ignore[arg-type]
    each = vmap(grad(lambda p, row: loss(p, row[None])), in_dims=(None, 0))(parameters, x)
    for name, whole in reverse.items():
        assert torch.allclose(each[name].sum(0), whole, rtol=1e-3, atol=1e-4), name


SENTENCES = {
    "forward-mode": lambda f, x: jvp(f, x, x),
    "vmap": lambda f, x: vmap(f)(*(y[None] for y in x)),
    "torch.func's gradients": REVERSE["grad"],
    "derivatives of derivatives": REVERSE["grad of grad"],
}


@pytest.mark.parametrize("mode", SENTENCES)
@pytest.mark.parametrize("backend", ["cpu", "sdpa", "flex"])
def test_a_named_backend_is_right_or_says_what_it_has_not(backend: str, mode: str) -> None:
    if backend == "cpu" and library.missing() is not None:
        pytest.skip(str(library.missing()))
    inputs = tuple(x.float() for x in SMALL)
    if backend == "sdpa" and mode in ("vmap", "torch.func's gradients"):
        found, expected = (
            SENTENCES[mode](lambda *x: ours(*x, backend=name), inputs)  # noqa: B023
            for name in (backend, "eager")
        )
        assert torch.allclose(found, expected, atol=1e-5)
        return
    with pytest.raises(ValueError, match=f"backend '{backend}' cannot run .*it has no "):
        SENTENCES[mode](lambda *x: ours(*x, backend=backend), inputs)


def test_modes_are_seen_inside_compiled_functions() -> None:
    torch._dynamo.reset()
    inputs = tuple(x.float() for x in (*INPUTS, LAM))
    tangents = tuple(x.float() for x in TANGENTS)

    def tangent(*inputs: Tensor) -> Tensor:
        return jvp(ours, inputs, tangents)[1]

    found = torch.compile(tangent, backend="eager")(*inputs)
    assert torch.allclose(found, tangent(*inputs), atol=1e-5) and float(found.abs().max()) > 1


def test_nothing_is_going_on_in_an_ordinary_call() -> None:
    assert active_modes() == frozenset()
    seen: list[Any] = []
    hessian(lambda x: (seen.append(active_modes()), x.square().sum())[1])(torch.ones(2))
    assert seen == [{"forward", "grad", "vmap"}]

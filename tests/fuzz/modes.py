"""Random calls in every mode of differentiation that PyTorch has: the exact derivative, or one sentence."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.autograd.forward_ad as forward_ad
from torch import Tensor

from tests.fuzz import exact
from tests.fuzz.bounds import roundings
from tests.fuzz.draw import Draw
from tests.fuzz.judge import Case, compare
from tests.fuzz.operations import DTYPES, Masks, Operation, instruction_sets, machine

Function = Callable[..., Tensor]


def _double(f: Function, inputs: list[Tensor], directions: list[Tensor], u: Tensor) -> list[Tensor]:
    leaves = [x.detach().clone().requires_grad_() for x in inputs]
    first = torch.autograd.grad(f(*leaves), leaves, u, create_graph=True)
    along = sum((g * d).sum() for g, d in zip(first, directions, strict=True))
    assert isinstance(along, Tensor)
    return list(torch.autograd.grad(along, leaves, materialize_grads=True))


def _functional_grad(f: Function, inputs: list[Tensor], directions: list[Tensor], u: Tensor) -> list[Tensor]:
    every = tuple(range(len(inputs)))
    return list(torch.func.grad(lambda *x: (f(*x) * u).sum(), argnums=every)(*inputs))


def _vjp(f: Function, inputs: list[Tensor], directions: list[Tensor], u: Tensor) -> list[Tensor]:
    out, pull = torch.func.vjp(f, *inputs)
    return [out, *pull(u)]


def _jvp(f: Function, inputs: list[Tensor], directions: list[Tensor], u: Tensor) -> list[Tensor]:
    return list(torch.func.jvp(f, tuple(inputs), tuple(directions)))


def _dual(f: Function, inputs: list[Tensor], directions: list[Tensor], u: Tensor) -> list[Tensor]:
    with forward_ad.dual_level():
        duals = [forward_ad.make_dual(x, d) for x, d in zip(inputs, directions, strict=True)]
        out = forward_ad.unpack_dual(f(*duals))
        tangent = out.tangent
        # A tangent that is not there is one of zeros to whoever reads it.
        return [out.primal, torch.zeros_like(out.primal) if tangent is None else tangent]


def _jacrev(f: Function, inputs: list[Tensor], directions: list[Tensor], u: Tensor) -> list[Tensor]:
    every = tuple(range(len(inputs)))
    return list(torch.func.jacrev(f, argnums=every)(*inputs))


def _jacfwd(f: Function, inputs: list[Tensor], directions: list[Tensor], u: Tensor) -> list[Tensor]:
    every = tuple(range(len(inputs)))
    return list(torch.func.jacfwd(f, argnums=every)(*inputs))


def _hessian(f: Function, inputs: list[Tensor], directions: list[Tensor], u: Tensor) -> list[Tensor]:
    rest = inputs[1:]
    return [torch.func.hessian(lambda q: (f(q, *rest) * u).sum())(inputs[0])]


def _vmap(f: Function, inputs: list[Tensor], directions: list[Tensor], u: Tensor) -> list[Tensor]:
    pairs = [torch.stack((x, d)) for x, d in zip(inputs, directions, strict=True)]
    return [torch.func.vmap(f)(*pairs)]


def _per_sample(f: Function, inputs: list[Tensor], directions: list[Tensor], u: Tensor) -> list[Tensor]:
    every = tuple(range(len(inputs)))
    one = torch.func.grad(lambda *x: (f(*x) * u).sum(), argnums=every)
    pairs = [torch.stack((x, d)) for x, d in zip(inputs, directions, strict=True)]
    return list(torch.func.vmap(one)(*pairs))


Mode = Callable[[Function, list[Tensor], list[Tensor], Tensor], list[Tensor]]
MODES: dict[str, Mode] = {
    "double backward": _double,
    "func.grad": _functional_grad,
    "func.vjp": _vjp,
    "func.jvp": _jvp,
    "forward_ad": _dual,
    "func.jacrev": _jacrev,
    "func.jacfwd": _jacfwd,
    "func.hessian": _hessian,
    "func.vmap": _vmap,
    "vmap(grad)": _per_sample,
}
SMALL = ("func.jacrev", "func.jacfwd", "func.hessian")


@dataclass(frozen=True)
class Derivative(Case):
    """A mode on an operation; `directions` and the output's weights are drawn from the operation's seed."""

    mode: str
    operation: Operation

    @classmethod
    def draw(cls, draw: Draw) -> "Derivative":
        mode = draw.among(list(MODES))
        small = mode in SMALL
        streams = draw.one(1, 2, 2)
        backend = draw.one("auto", "auto", "cpu", "eager", "sdpa")
        queries = draw.between(1, 3) if small else draw.one(draw.between(1, 6), 33)
        operation = Operation(
            seed=draw.seed(),
            streams=streams,
            own_keys=streams == 2 and draw.chance(0.5),
            batch=1 if small else draw.one(1, 2),
            groups=draw.one(1, 2),
            repeats=draw.one(1, 2),
            queries=queries,
            keys=queries + draw.one(0, 2),
            width=draw.one(1, 2, 4) if small else draw.one(1, 3, 8, 17, 32),
            value_width=draw.one(1, 3) if small else draw.one(2, 8, 17),
            dtype="float32" if backend == "cpu" else draw.one("float32", "float32", "float64"),
            lam=draw.one("number", "call", "head", "token"),
            causal=draw.chance(0.5),
            window=draw.one(None, None, 2),
            padding=draw.one(None, None, "left", "all", "shared"),
            documents=draw.one(None, None, "runs"),
            dense=None if backend == "cpu" else draw.one(None, None, None, "bool", "bias head"),
            scale=draw.one(None, None, 0.0, -0.5),
            backend=backend,
            isa=draw.among(instruction_sets()) if instruction_sets() else None,
        )
        return cls(mode, operation)

    @property
    def may_refuse(self) -> bool:
        # A second derivative is known too late for "auto" to choose by it.
        return self.operation.backend != "auto" or self.mode == "double backward"

    def check(self) -> None:
        case, masks = self.operation, self.operation.masks()
        inputs, u = case.inputs()
        # Forward derivatives of a view whose sign is only noted are an internal error of PyTorch.
        inputs = [x.resolve_neg() for x in inputs]
        draw = Draw(case.seed + 3)
        directions = [draw.normal(*x.shape).to(x.dtype) for x in inputs]
        run = MODES[self.mode]
        with machine(case.isa, 1):
            found = run(lambda *x: case.call(list(x), masks), inputs, directions, u)
        wide, along = [x.double() for x in inputs], [x.double() for x in directions]
        expected = run(self._exact(masks), wide, along, u.double())
        epsilon = torch.finfo(DTYPES[case.dtype]).eps
        terms = max(case.width, case.value_width, case.keys, case.repeats * case.queries)
        # All the inputs are about 1, so what cancels is about as large as the largest number that does not.
        largest = 1.0 + max(float(x.abs().max()) for x in expected)
        slack = 16 * roundings(terms) * epsilon * largest
        allowed = [slack * (1 + case.width**0.5)] * len(expected)
        names = [f"result {i}" for i in range(len(expected))]
        compare(names, [x.detach() for x in found], expected, allowed, f"{self.mode}, {case.backend}, ")

    def _exact(self, masks: Masks) -> Function:
        case = self.operation

        def function(*x: Tensor) -> Tensor:
            lam: Any = None
            if case.streams == 2:
                lam = case.number if case.lam == "number" else x[3]
            return exact.attend(*x[:3], lam, masks.see, masks.bias, case.scale)  # type: ignore[arg-type]

        return function

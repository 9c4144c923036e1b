"""What the Triton kernels do with a row before they store it: V1's head norm and V2's sigmoid, with their gradients."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from clearhead.core.attend import attend, difference, prepare, problem_of, single
from clearhead.core.dispatch import Kernel, load_backend
from clearhead.core.masks import MaskSpec
from clearhead.core.norm import HeadNorm, RMSNorm
from clearhead.core.streams import Streams
from clearhead.core.values import moved
from clearhead.kernels.triton import launch
from clearhead.nn import Attention
from clearhead.variants.differential import Differential
from clearhead.variants.differential_v2 import DifferentialV2
from tests.kernels.support import Case, make_inputs, make_masks, oracle_of, plain_of
from tests.oracles.softmax import rms_norm

V1 = Case(
    own_keys=True, batch=1, heads=2, groups=1, queries=18, keys=34, width=16, value_width=32, causal=True
)
V2 = replace(V1, own_keys=False, value_width=16)
SOFTMAX = replace(V2, streams=1, heads=4)
EPS, GAIN = 1e-5, 0.8


@dataclass(frozen=True)
class Ending:
    """A case, and what is done to its rows."""

    case: Case
    norm: bool = True
    sigmoid: bool = False


CASES = {
    "v1": Ending(V1),
    "v1, multi-head, open": Ending(replace(V1, heads=2, groups=2, causal=False)),
    "v1, λ of the call": Ending(replace(V1, lam="call")),
    "v1, window": Ending(replace(V1, queries=34, window=7)),
    "v1, padding": Ending(replace(V1, batch=2, hidden=("padding",))),
    "v1, rows that see nothing": Ending(replace(V1, queries=34, batch=2, hidden=("padding", "documents"))),
    "v1, values 20 wide": Ending(replace(V1, width=12, value_width=20)),
    "v2": Ending(V2, norm=False, sigmoid=True),
    "v2, three heads a group": Ending(
        replace(V2, heads=6, groups=2, queries=7, keys=20), norm=False, sigmoid=True
    ),
    "v2, padding, window": Ending(
        replace(V2, batch=2, hidden=("padding",), window=9), norm=False, sigmoid=True
    ),
    "v2 with both": Ending(replace(V2, heads=4, groups=2, queries=9), sigmoid=True),
    "softmax, multi-query": Ending(SOFTMAX),
    "one query": Ending(replace(V1, heads=4, queries=1, keys=50)),
}
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def mask_of(case: Case) -> MaskSpec:
    told = make_masks(case).arguments
    names = {
        "is_causal": "is_causal",
        "window": "window",
        "key_padding_mask": "key_padding",
        "documents": "documents",
    }
    return MaskSpec(**{to: told[name] for name, to in names.items() if name in told})


def in_kernel(ending: Ending, device: str = "cpu") -> Callable[..., Tensor]:
    """The kernel's own ending, as the layers ask for it, of CPU tensors that are moved to `device` and back."""
    case, mask = ending.case, moved(mask_of(ending.case), torch.device(device))

    def run(*tensors: Tensor) -> Tensor:
        q, k, v, *rest = (x.to(device) for x in tensors)
        gates = {}
        if case.streams == 2:
            gates["gate_logit" if ending.sigmoid else "gate"] = rest[0][(None,) * (4 - rest[0].ndim)]
        streams = (
            q.unflatten(1, (-1, case.streams)).unbind(2),
            k.unflatten(1, (-1, 1 + case.own_keys)).unbind(2),
        )
        heads = Streams(*streams, v, **gates)
        mix = single if case.streams == 1 else difference
        problem = problem_of(heads, mask, mix.__name__)  # type: ignore[arg-type]
        prepared = prepare((load_backend("triton"),), problem, mask, False)
        if ending.norm:
            norm = HeadNorm(rest[-1], EPS, GAIN)
            assert prepared.norms(norm, heads)
            heads = replace(heads, norm=norm)
        return attend(heads, prepared, case.width**-0.5, mix)[0].to("cpu")

    return run


def apart(ending: Ending, attention: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """The same with the sigmoid before and the norm behind another attention."""

    def run(q: Tensor, k: Tensor, v: Tensor, *rest: Tensor) -> Tensor:
        gates = rest[: ending.case.streams - 1]
        wide = [x.to(torch.promote_types(x.dtype, torch.float32)) for x in gates]
        out = attention(q, k, v, *(x.sigmoid() if ending.sigmoid else x for x in wide))
        if not ending.norm:
            return out
        rows = out if out.dtype == torch.float64 else out.float()
        return (rms_norm(rows, torch.ones_like(rest[-1]).to(rows.dtype), EPS).to(out.dtype) * rest[-1]) * GAIN

    return run


def results(
    function: Callable[..., Tensor], ending: Ending, dtype: torch.dtype, used: torch.dtype, grad: bool = True
) -> list[Tensor]:
    """Output and all gradients in float64, of inputs that are rounded to `dtype` and computed in `used`."""
    case, made = ending.case, make_inputs(ending.case, dtype)
    tensors = [*made.tensors[:3]]
    if case.streams == 2:
        # A logit comes in the model's own type.
        tensors.append(made.tensors[3].to(dtype).double() * (4.0 if ending.sigmoid else 1.0))
    if ending.norm:
        rng = torch.Generator().manual_seed(7)
        tensors.append((1 + torch.randn(case.value_width, generator=rng)).to(dtype).double())
    leaves = [x.to(used).requires_grad_(grad) for x in tensors]
    out = function(*leaves)
    assert out.dtype == used
    if not grad:
        return [out.detach().double()]
    found = torch.autograd.grad(out, leaves, made.cotangent.to(used))
    assert all(a.dtype == b.dtype for a, b in zip(found, leaves, strict=True))
    return [x.detach().double() for x in (out, *found)]


@lru_cache(4)
def right(ending: Ending, dtype: torch.dtype) -> tuple[list[Tensor], list[Tensor]]:
    """The float64 oracle's results, and plain arithmetic's in `dtype`."""
    return (
        results(apart(ending, oracle_of(ending.case)), ending, dtype, torch.float64),
        results(apart(ending, plain_of(ending.case)), ending, dtype, dtype),
    )


def assert_as_right_as_plain(found: list[Tensor], ending: Ending, dtype: torch.dtype) -> None:
    """Each tensor at most twice as far off the float64 oracle as plain arithmetic in `dtype`, give or take its ε."""
    expected, plain = right(ending, dtype)
    names = ("output", "q", "k", "v", *(("λ",) if ending.case.streams == 2 else ()), "weight")
    for name, a, b, own in zip(names, found, expected, plain, strict=False):
        error, allowed = (
            float((a - b).norm()),
            2 * float((own - b).norm()) + torch.finfo(dtype).eps * float(b.norm()),
        )
        assert error <= allowed, f"{name}: {error:.2e} off, over {allowed:.2e}"


@pytest.mark.parametrize("name", CASES)
def test_each_ending(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without gradients keys are shared out among programs if there are enough, and `combine` ends the rows."""
    ending, single = CASES[name], torch.float32
    assert_as_right_as_plain(results(in_kernel(ending), ending, single, single), ending, single)
    for processors in (1, 40):
        monkeypatch.setattr(launch, "_INTERPRETED_PROCESSORS", processors)
        found = results(in_kernel(ending), ending, single, single, grad=False)
        assert_as_right_as_plain(found, ending, single)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("name", ["v1", "v2", "softmax, multi-query"])
def test_in_half_precision(name: str, dtype: str) -> None:
    ending, used = CASES[name], DTYPES[dtype]
    assert_as_right_as_plain(results(in_kernel(ending), ending, used, used), ending, used)


def test_a_row_that_sees_nothing_is_zero_and_so_are_its_gradients() -> None:
    ending = CASES["v1, rows that see nothing"]
    hidden = ~make_masks(ending.case).allowed.any(-1)[:, 0]
    assert hidden.any()
    out, q, *_ = results(in_kernel(ending), ending, torch.float32, torch.float32)
    assert not out.transpose(1, 2)[hidden].any() and not q.transpose(1, 2)[hidden].any()


@pytest.mark.parametrize("name", ["v1", "v2"])
def test_a_broken_gradient_is_noticed(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The norm's rows taken for constants, or the sigmoid's slope for one."""
    ending, run = CASES[name], launch.before_backward

    def broken(call: Any, inputs: launch.TritonInputs, grad: Tensor, *rest: Tensor) -> Any:
        found = run(call, inputs, grad, *rest)
        if ending.sigmoid:
            rest[2].div_(found[2] * (1 - found[2]))
        else:
            out = rest[0].float()
            found[0].copy_(grad * inputs.weight * inputs.gain / (out.square().mean(-1, True) + EPS).sqrt())
        return found

    monkeypatch.setattr(launch, "before_backward", broken)
    with pytest.raises(AssertionError, match="off, over"):
        assert_as_right_as_plain(
            results(in_kernel(ending), ending, torch.float32, torch.float32), ending, torch.float32
        )


class Done(TorchDispatchMode):
    """Which operations PyTorch is asked for."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(function.overloadpacket.__name__)
        return function(*args, **(kwargs or {}))


LAYERS: dict[str, tuple[str, dict[str, Any], str]] = {
    "v1": ("differential", {}, "rsqrt"),
    "v2": ("differential_v2", {}, "sigmoid"),
    "v2 with a bias": ("differential_v2", {"lambda_bias": -1.0}, "sigmoid"),
    "softmax": ("softmax", {"head_norm": True}, "rsqrt"),
    "differential collinear": ("differential_collinear", {"mode": "exact"}, "rsqrt"),
}


def layer_of(name: str, backend: str) -> Attention:
    variant, options, _ = LAYERS[name]
    torch.manual_seed(0)
    layer = Attention(32, 4, variant=variant, num_kv_heads=2, backend=backend, **options)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return layer


def outcome(layer: nn.Module, x: Tensor, **options: Any) -> list[Tensor]:
    out = layer(x, is_causal=True, **options)
    return [out, *torch.autograd.grad(out.square().sum(), list(layer.parameters()))]


@pytest.mark.parametrize("name", LAYERS)
def test_a_layer_leaves_its_ending_to_the_kernel(name: str) -> None:
    """With all its gradients, and none of the operations that it would take apart."""
    x, apart_by = torch.randn(2, 19, 32), LAYERS[name][2]
    with Done() as done:
        found = outcome(layer_of(name, "triton"), x)
    assert "triton_attention" in done.names and apart_by not in done.names
    with Done() as done:
        expected = outcome(layer_of(name, "eager"), x)
    assert apart_by in done.names
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, atol=2e-5 * float(b.detach().abs().max()), rtol=1e-4)


@contextmanager
def hooked(layer: Attention) -> Iterator[None]:
    handle = layer.variant.head_norm.register_forward_hook(lambda *_: None)  # type: ignore[union-attr,operator]
    yield
    handle.remove()


class OwnFinish(Differential):
    def finish(self, o: Tensor) -> Tensor:
        return 2 * super().finish(o)


class OwnGate(DifferentialV2):
    def gate(self, x: Tensor | None) -> Tensor:
        return super().gate(x) / 2


class OwnNorm(RMSNorm):
    pass


def test_what_must_be_called_is_called() -> None:
    """A norm with a hook, one of another class, a `finish` or `gate` of a variant's own: they are not the kernel's."""
    x, layer = torch.randn(1, 5, 32), layer_of("v1", "triton")
    expected = layer(x, is_causal=True)
    with hooked(layer), Done() as done:
        torch.testing.assert_close(layer(x, is_causal=True), expected, atol=1e-5, rtol=1e-4)
    assert "rsqrt" in done.names
    layer.variant.head_norm.forward = layer.variant.head_norm.forward  # type: ignore[method-assign,union-attr,assignment]
    with Done() as done:
        layer(x, is_causal=True)
    assert "rsqrt" in done.names
    shape = layer.variant.shape
    assert HeadNorm.of(OwnNorm(8, 1e-5)) is None and HeadNorm.of(None) is None
    assert OwnFinish(shape).finishing_norm() is None and Differential(shape).finishing_norm() is not None
    assert not OwnGate.sigmoid_gate and DifferentialV2.sigmoid_gate
    q = torch.randn(1, 2, 64)
    assert OwnGate(shape).split_open(q, q[..., :16], q[..., :16], torch.randn(1, 2, 32)).gate is not None


def test_a_weight_of_another_type_is_left_to_its_module() -> None:
    """Its result would have another type; under autocast it would not, and the weight keeps its own gradient."""
    layer, x = layer_of("v1", "triton"), torch.randn(1, 5, 32)
    norm, kernel = layer.variant.finishing_norm(), load_backend("triton")
    assert norm is not None and isinstance(kernel, Kernel)
    heads = Streams((x,), (x,), torch.zeros(1, 1, 5, 16, dtype=torch.bfloat16))
    assert not kernel.norms(norm, heads)
    with torch.autocast("cpu", torch.bfloat16), Done() as done:
        found = outcome(layer, x)
    assert "rsqrt" not in done.names and all(p.dtype == torch.float32 for p in found[1:])
    exact = outcome(layer_of("v1", "eager"), x)
    assert float((found[0] - exact[0]).norm() / exact[0].norm()) < 0.05


def test_an_empty_batch() -> None:
    for name in LAYERS:
        assert layer_of(name, "triton")(torch.randn(0, 5, 32), is_causal=True).shape == (0, 5, 32)


@pytest.mark.parametrize("name", ["v1", "v2"])
def test_it_compiles_as_one_graph(name: str) -> None:
    torch._dynamo.reset()
    layer, x = layer_of(name, "triton"), torch.randn(1, 7, 32)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    for a, b in zip(outcome(compiled, x), outcome(layer, x), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("name", ["v1", "v2 with both"])
def test_opcheck(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[Any, ...]] = []
    ending = CASES[name]
    small = replace(ending, case=replace(ending.case, queries=5, keys=20))
    run = launch.forward
    monkeypatch.setattr(
        launch, "forward", lambda inputs, *rest: (seen.append((*inputs, rest[-1])), run(inputs, *rest))[1]
    )
    results(in_kernel(small), small, torch.float32, torch.float32)
    call = [x.detach().requires_grad_(x.is_floating_point()) if isinstance(x, Tensor) else x for x in seen[0]]
    torch.library.opcheck(torch.ops.clearhead.triton_attention.default, tuple(call), {})

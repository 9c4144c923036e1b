"""The CPU kernel as a citizen of PyTorch: operator checks, compilation, checkpointing, autocast, threads, memory."""

import gc
import re
import warnings
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from clearhead.functional import attention, differential_attention
from clearhead.kernels import ops
from clearhead.kernels.cpu import direct
from clearhead.kernels.cpu.kernel import Cpu
from clearhead.models import ClearheadForCausalLM
from tests.contracts.model_cases import VARIANTS, left_padded, make_model, tokens
from tests.contracts.support import distance
from tests.kernels.support import DTYPES, Case, answers, every_set, make_inputs, make_masks, op_of

SMALL = Case(own_keys=True, value_width=24, queries=9, keys=12, causal=True)
SCHEMAS: dict[str, Case] = {
    "one stream": replace(SMALL, streams=1, own_keys=False),
    "shared keys": replace(SMALL, own_keys=False),
    "own keys": SMALL,
    "padding": replace(SMALL, hidden=("padding",)),
    "documents, window": replace(SMALL, hidden=("shared documents",), window=3, streams=1, own_keys=False),
    "token by token": replace(SMALL, queries=1, own_keys=False),
    "width outside": replace(SMALL, layout="width outside"),
    "expanded": replace(SMALL, layout="expanded", own_keys=False),
}


def recorded(case: Case, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> dict[str, tuple[Any, ...]]:
    """The arguments that each of the two operators gets for `case`, forward (keep last) and backward."""
    seen: dict[str, tuple[Any, ...]] = {}
    with monkeypatch.context() as patch:
        for name in ("outputs", "gradients"):
            original = getattr(ops, name)

            def noted(*arguments: Any, name: str = name, original: Any = original) -> Any:
                made = original(*arguments)
                seen[name] = (*arguments, made)
                return made

            patch.setattr(ops, name, noted)
        inputs = make_inputs(case, dtype)
        answers(op_of(case, "cpu"), inputs, dtype, case.layout)
    inputs_, keep, made = seen["outputs"]
    grad = inputs.cotangent.to(dtype)
    return {"forward": (*inputs_, keep), "backward": (grad, *made, *inputs_)}


@pytest.mark.parametrize("name", SCHEMAS)
def test_opcheck(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    dtype = torch.bfloat16 if name in ("own keys", "padding") else torch.float32
    calls = recorded(SCHEMAS[name], dtype, monkeypatch)
    detached = {
        key: tuple(x.detach() if isinstance(x, Tensor) else x for x in call) for key, call in calls.items()
    }
    forward, backward = torch.ops.clearhead.fused_attention, torch.ops.clearhead.fused_attention_backward
    torch.library.opcheck(forward.default, (*detached["forward"][:-1], False))
    torch.library.opcheck(backward.default, detached["backward"])
    differentiable = tuple(
        x.clone().requires_grad_() if isinstance(x, Tensor) and x.is_floating_point() else x
        for x in detached["forward"]
    )
    torch.library.opcheck(forward.default, differentiable)


def test_opcheck_of_a_position_that_is_a_tensor(monkeypatch: pytest.MonkeyPatch) -> None:
    for keep in (False, True):
        call = recorded(SMALL, torch.float32, monkeypatch)["forward"]
        inputs = ops.KernelInputs(*[x.detach() if isinstance(x, Tensor) else x for x in call[:-1]])
        moved = inputs._replace(position=torch.tensor(2), offset=0)
        torch.library.opcheck(torch.ops.clearhead.fused_attention.default, (*moved, keep))
        fixed = inputs._replace(offset=2)
        for a, b in zip(
            torch.ops.clearhead.fused_attention(*moved, keep),
            torch.ops.clearhead.fused_attention(*fixed, keep),
            strict=True,
        ):
            assert torch.equal(a, b)


@pytest.mark.parametrize(
    ("name", "dynamic"),
    [("shared keys", False), ("documents, window", False), ("own keys", True), ("padding", True)],
)
def test_the_op_compiles_as_one_graph(name: str, dynamic: bool) -> None:
    torch._dynamo.reset()
    cases = [SCHEMAS[name]] + [replace(SCHEMAS[name], queries=5 + n, keys=14 + n) for n in range(2 * dynamic)]
    for i, case in enumerate(cases):
        if i == 0:
            compiled = torch.compile(any_case, fullgraph=True, backend="aot_eager", dynamic=dynamic)
        inputs = make_inputs(case, torch.float32)
        with torch._dynamo.config.patch(error_on_recompile=i > 1):
            found = answers(with_masks(compiled, case), inputs, torch.float32, "dense")
        expected = answers(op_of(case, "cpu"), inputs, torch.float32, "dense")
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def any_case(streams: int, *tensors: Tensor, **arguments: Any) -> Tensor:
    if streams == 1:
        return attention(*tensors, backend="cpu", **arguments)
    return differential_attention(*tensors, backend="cpu", **arguments)


def with_masks(function: Any, case: Case) -> Any:
    return lambda *tensors: function(case.streams, *tensors, **make_masks(case).arguments)


@pytest.mark.compiles
def test_inductor_compiles_it() -> None:
    torch._dynamo.reset()
    inputs = make_inputs(SMALL, torch.float32)
    compiled = torch.compile(op_of(SMALL, "cpu"), fullgraph=True)
    found = answers(compiled, inputs, torch.float32, "model")
    expected = answers(op_of(SMALL, "cpu"), inputs, torch.float32, "model")
    assert max(distance(a, b) for a, b in zip(found, expected, strict=True)) < 1e-6


class Counted:
    """How often the kernel ran, which it does wherever it can, worth it or not."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.runs = 0
        monkeypatch.setattr(Cpu, "preferred", lambda self, problem: True)
        # The operator makes its output by the one, a call without a gradient is the other.
        for module, name in ((ops, "unwritten"), (direct, "forward")):
            monkeypatch.setattr(module, name, self.counting(getattr(module, name)))

    def counting(self, function: Callable[..., Any]) -> Callable[..., Any]:
        def counted(*arguments: Any) -> Any:
            self.runs += 1
            return function(*arguments)

        return counted


def on(name: str, implementation: str, **changes: Any) -> ClearheadForCausalLM:
    model = make_model(name, initializer_range=0.1, **changes)
    model.set_attn_implementation(implementation)
    return model


def gradients(model: ClearheadForCausalLM, ids: Tensor, run: Any = None) -> list[Tensor]:
    out = (model if run is None else run)(input_ids=ids, labels=ids)
    return [out.logits, *torch.autograd.grad(out.loss, list(model.parameters()))]


@pytest.mark.parametrize(
    "name", ["softmax", "differential", "differential_v2", "collinear", "differential_collinear"]
)
def test_a_model_compiles_as_one_graph(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    torch._dynamo.reset()
    counted, ids = Counted(monkeypatch), tokens(2, 7)
    model = on(name, "clearhead", num_hidden_layers=1).train()
    expected = gradients(on(name, "eager", num_hidden_layers=1).train(), ids)
    assert not counted.runs
    found = gradients(model, ids, torch.compile(model, fullgraph=True, backend="aot_eager"))
    assert counted.runs
    assert max(distance(a, b) for a, b in zip(found, expected, strict=True)) < 1e-5


@pytest.mark.parametrize("name", VARIANTS)
def test_checkpointing_gives_the_same_gradients(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    ids, counted = tokens(2, 70), Counted(monkeypatch)
    plain, saving = on(name, "clearhead").train(), on(name, "clearhead").train()
    saving.activation_checkpointing_enable()
    pairs = zip(gradients(plain, ids), gradients(saving, ids), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)
    assert counted.runs == 2 + 4


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_the_op(reentrant: bool) -> None:
    op = op_of(SMALL, "cpu")
    results = []
    for run in (op, lambda *x: checkpoint(op, *x, use_reentrant=reentrant)):
        leaves = [x.float().requires_grad_() for x in make_inputs(SMALL, torch.float32).tensors]
        run(*leaves).square().sum().backward()
        results.append([x.grad for x in leaves])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


# Few heads of one sequence, so that the keys of a head are divided among threads, and more heads than threads.
REPEATED = {
    "keys divided": Case(batch=1, heads=1, groups=1, queries=2, keys=700, causal=True),
    "keys divided, long": Case(batch=1, heads=2, groups=1, queries=300, keys=300, causal=True),
    "heads divided": Case(batch=3, heads=6, groups=3, queries=70, keys=140, own_keys=True),
}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("name", REPEATED)
def test_the_same_bits_every_time(name: str, threads: int, dtype: str) -> None:
    torch.set_num_threads(threads)
    inputs = make_inputs(REPEATED[name], DTYPES[dtype])
    runs = [answers(op_of(REPEATED[name], "cpu"), inputs, DTYPES[dtype], "dense") for _ in range(4)]
    assert all(torch.equal(a, b) for run in runs[1:] for a, b in zip(run, runs[0], strict=True))


def test_threads_change_rounding_only() -> None:
    for case in REPEATED.values():
        inputs, results = make_inputs(case, torch.float32), []
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append(answers(op_of(case, "cpu"), inputs, torch.float32, "dense"))
        for other in results[1:]:
            assert all(distance(a, b) <= 1e-5 * b.abs().max() for a, b in zip(other, results[0], strict=True))


@pytest.mark.parametrize("cache", ["dynamic", "static"])
@pytest.mark.parametrize("name", VARIANTS)
@torch.no_grad()
def test_generation_gives_eager_s_tokens(name: str, cache: str, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [tokens(1, length, seed=length)[0] for length in (3, 70, 9)]
    ids, mask = left_padded(rows)
    options = {"max_new_tokens": 6, "do_sample": False, "cache_implementation": cache, "output_logits": True}
    options |= {"return_dict_in_generate": True, "attention_mask": mask}
    expected = on(name, "eager").generate(ids, **options)
    counted = Counted(monkeypatch)
    found = on(name, "clearhead").generate(ids, **options)
    assert counted.runs == 2 * 6
    assert torch.equal(found.sequences, expected.sequences)
    assert max(distance(a, b) for a, b in zip(found.logits, expected.logits, strict=True)) < 1e-4


@every_set
@pytest.mark.parametrize("name", VARIANTS)
def test_autocast_runs_it_in_bfloat16(name: str, isa: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """No kind of weight gets a gradient more than twice as far off as eager attention's.

    Over four draws and all layers: λ of a layer is one number, whose error in a single draw is luck.
    """
    dtypes: list[torch.dtype] = []
    original = ops.outputs

    def outputs(inputs: ops.KernelInputs, keep: bool) -> Any:
        dtypes.append(inputs.v.dtype)
        return original(inputs, keep)

    monkeypatch.setattr(ops, "outputs", outputs)
    model = on(name, "eager").train()
    kinds = ["logits", *(re.sub(r"layers\.\d+", "layer", key) for key, _ in model.named_parameters())]
    # Squares: of the error under eager attention, under the kernel, and of the gradients themselves.
    squares = {kind: [0.0, 0.0, 0.0] for kind in kinds}
    for draw in range(4):
        ids = tokens(2, 20, seed=draw)
        exact = gradients(on(name, "eager").train(), ids)
        for column, implementation in enumerate(("eager", "cpu")):
            with torch.autocast("cpu", torch.bfloat16):
                out = (cast := on(name, implementation).train())(input_ids=ids, labels=ids)
            found = [out.logits, *torch.autograd.grad(out.loss, list(cast.parameters()))]
            assert all(bool(x.isfinite().all()) for x in found)
            for kind, a, b in zip(kinds, found, exact, strict=True):
                squares[kind][column] += float((a.double() - b.double()).detach().square().sum())
                squares[kind][2] += float(b.detach().double().square().sum()) / 2
    assert dtypes == [torch.bfloat16] * 8
    for kind, (eager, fused, whole) in squares.items():
        allowed = 2 * eager**0.5 + 4 * torch.finfo(torch.bfloat16).eps * whole**0.5
        assert fused**0.5 <= allowed, f"{kind}: {fused**0.5:.2e} off, eager attention {eager**0.5:.2e}"


def test_a_graph_that_is_kept_gives_the_same_gradients_again() -> None:
    leaves = [x.float().requires_grad_() for x in make_inputs(SMALL, torch.float32).tensors]
    out = op_of(SMALL, "cpu")(*leaves).square().sum()
    first, second = (torch.autograd.grad(out, leaves, retain_graph=True) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_what_the_gradient_needs_cannot_be_changed_unnoticed() -> None:
    leaves = [x.float().requires_grad_() for x in make_inputs(SMALL, torch.float32).tensors]
    out = op_of(SMALL, "cpu")(*leaves)
    total = out.sum()
    with torch.no_grad():
        leaves[2].mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        total.backward()


def test_a_second_derivative_is_an_error() -> None:
    leaves = [x.float().requires_grad_() for x in make_inputs(SMALL, torch.float32).tensors]
    out = op_of(SMALL, "cpu")(*leaves)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        first = torch.autograd.grad(out.square().sum(), leaves, create_graph=True)
        with pytest.raises(RuntimeError, match="twice"):
            sum(x.square().sum() for x in first).backward()  # type: ignore[union-attr]


def test_rows_of_overlapping_windows_get_their_gradient() -> None:
    """Strides of one over tokens and over the width, from which `empty_like` may make the tokens the inner ones."""
    results = []
    for backend in ("eager", "cpu"):
        flat = [x.float()[:1, :2, 0] for x in make_inputs(SMALL, torch.float32).tensors[:1]] * 3
        x = [y.clone().requires_grad_().unfold(2, 12, 1) for y in flat]
        out = attention(*x, backend=backend)
        results.append([out, *torch.autograd.grad(out.square().sum(), x)])
    assert max(distance(a, b) for a, b in zip(*results, strict=True)) < 1e-5


@pytest.mark.parametrize("threads", [1, 2])
def test_many_python_threads_at_once(threads: int) -> None:
    torch.set_num_threads(threads)
    cases = [*SCHEMAS.values(), *REPEATED.values()]
    inputs = [make_inputs(case, torch.float32) for case in cases]

    def solve(i: int) -> list[Tensor]:
        return answers(op_of(cases[i], "cpu"), inputs[i], torch.float32, cases[i].layout)

    expected = [solve(i) for i in range(len(cases))]
    work = [*range(len(cases))] * 6
    with ThreadPoolExecutor(6) as pool:
        for i, found in zip(work, pool.map(solve, work), strict=True):
            # A thread of Python's may have another number of PyTorch's, which divides the keys differently.
            assert all(
                distance(a, b) <= 1e-5 * b.abs().max() for a, b in zip(found, expected[i], strict=True)
            )


def resident() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="there is no /proc to read it from")
def test_memory_does_not_grow() -> None:
    case = replace(REPEATED["heads divided"], batch=1, keys=129, hidden=("padding",))
    inputs = make_inputs(case, torch.float32)
    for i in range(220):
        if i == 20:
            gc.collect()
            before = resident()
        answers(op_of(case, "cpu"), inputs, torch.float32, "dense")
    gc.collect()
    # A call has more than half a megabyte of outputs, gradients and scratch; 200 times one of them would show.
    assert resident() - before < 20 * 2**20


def test_run_takes_a_gate_in_any_precision() -> None:
    case = replace(SMALL, own_keys=False)
    q, k, v, lam = (x.bfloat16() for x in make_inputs(case, torch.bfloat16).tensors)
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        gate = lam.to(dtype).requires_grad_()
        out = differential_attention(q, k, v, gate, is_causal=True, backend="cpu")
        (gradient,) = torch.autograd.grad(out.sum(), gate)
        assert out.dtype == torch.bfloat16 and gradient.dtype == dtype

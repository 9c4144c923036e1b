"""The Triton kernels as PyTorch operators (opcheck, compilation, checkpointing, other derivatives) and as a backend."""

import ast
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

import clearhead
from clearhead.core.dispatch import AttentionProblem, load_backend, plan
from clearhead.functional import differential_attention
from clearhead.kernels.triton.kernel import Triton
from tests.contracts.support import distance
from tests.kernels.support import Case, answers, make_inputs, make_masks, op_of

SMALL = Case(
    own_keys=True, batch=1, heads=2, groups=1, queries=5, keys=20, width=16, value_width=32, causal=True
)
SOFTMAX = replace(SMALL, streams=1, own_keys=False, value_width=16)


def call(case: Case, keep: bool, slopes: Tensor | None = None) -> tuple[Any, ...]:
    """What `Triton.run` gives the operator for `case`."""
    q, k, v, *lam = (x.float().requires_grad_(keep) for x in make_inputs(case, torch.float32).tensors)
    masks = make_masks(case).arguments
    streams = q.unflatten(1, (-1, case.streams)).detach().unbind(2)
    keys = k.unflatten(1, (-1, 1 + case.own_keys)).detach().unbind(2)
    leaves = [x.clone().requires_grad_(keep) for x in (*streams, *keys)]
    q1, q2 = leaves[0], leaves[1] if case.streams == 2 else None
    k1, k2 = leaves[case.streams], leaves[case.streams + 1] if case.own_keys else None
    return (
        *(q1, q2, k1, k2, v, lam[0] if lam else None),
        *(masks.get("key_padding_mask"), masks.get("documents"), None, slopes, None, None),
        *(case.keys - case.queries, case.window or 0, case.causal, 0.25, 0.0, 1.0, False, keep),
    )


CALLS = {
    "v1": lambda: call(SMALL, True),
    "softmax, documents": lambda: call(replace(SOFTMAX, hidden=("documents",)), True),
    "v2, no gradient": lambda: call(replace(SMALL, own_keys=False, hidden=("padding",)), False),
    "slopes, no gradient": lambda: call(SMALL, False, torch.tensor([0.5, 0.25])),
}


@pytest.mark.parametrize("name", CALLS)
def test_opcheck(name: str) -> None:
    # The generated backward under compilation is what "test_aot_dispatch_dynamic" is for.
    torch.library.opcheck(torch.ops.clearhead.triton_attention.default, CALLS[name](), {})


@pytest.mark.parametrize("case", [SMALL, replace(SOFTMAX, hidden=("documents",))], ids=["v1", "softmax"])
def test_it_compiles_as_one_graph(case: Case) -> None:
    torch._dynamo.reset()
    inputs = make_inputs(case, torch.float32)
    compiled = torch.compile(op_of(case, "triton"), fullgraph=True, backend="aot_eager")
    found = answers(compiled, inputs, torch.float32, "model")
    expected = answers(op_of(case, "triton"), inputs, torch.float32, "model")
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_checkpointing() -> None:
    op, results = op_of(SMALL, "triton"), []
    for run in (op, lambda *x: checkpoint(op, *x, use_reentrant=False)):
        leaves = [x.float().requires_grad_() for x in make_inputs(SMALL, torch.float32).tensors]
        run(*leaves).square().sum().backward()
        results.append([x.grad for x in leaves])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_a_second_derivative_is_an_error() -> None:
    leaves = [x.float().requires_grad_() for x in make_inputs(SMALL, torch.float32).tensors]
    first = torch.autograd.grad(op_of(SMALL, "triton")(*leaves).square().sum(), leaves, create_graph=True)
    with pytest.raises(RuntimeError, match="twice"):
        sum(x.square().sum() for x in first).backward()  # type: ignore[union-attr]


def test_other_derivatives_are_errors() -> None:
    leaves = [x.float() for x in make_inputs(SMALL, torch.float32).tensors]
    op = op_of(SMALL, "triton")
    with pytest.raises(ValueError, match="it has no"):
        torch.func.jvp(op, tuple(leaves), tuple(leaves))
    with pytest.raises(ValueError, match="it has no"):
        torch.func.vmap(op)(*(x[None].expand(2, *x.shape) for x in leaves))


@pytest.mark.parametrize("layout", ["model", "slice", "width outside", "every other head"])
def test_strides_and_repetition_change_no_bit(layout: str) -> None:
    case = replace(SMALL, queries=20)
    inputs = make_inputs(case, torch.float32)
    dense, again, strided = (
        answers(op_of(case, "triton"), inputs, torch.float32, x) for x in ("dense", "dense", layout)
    )
    for other in (again, strided):
        assert all(torch.equal(a, b) for a, b in zip(dense, other, strict=True))


def problem(**changes: Any) -> AttentionProblem:
    sizes = {"streams": 2, "shares_keys": False, "heads": 4, "kv_heads": 2, "queries": 8, "keys": 8}
    sizes |= {
        "key_width": 64,
        "value_width": 128,
        "dtype": torch.bfloat16,
        "device": "cuda",
        "mixing": "difference",
    }
    return AttentionProblem(**{**sizes, **changes})  # type: ignore[arg-type]


REFUSED = {
    "cpu": ({"device": "cpu"}, "TRITON_INTERPRET"),
    "device": ({"device": "mps"}, "not on mps"),
    "maps": ({"needs_maps": True}, "maps"),
    "dtype": ({"dtype": torch.float64}, "not in float64"),
    "mixing": ({"mixing": "other"}, "another mixing"),
    "bias": ({"mask": frozenset({"bias"})}, "mask with bias"),
    "dense": ({"mask": frozenset({"dense", "causal"})}, "mask with dense"),
    "width": ({"key_width": 320}, "keys up to 256"),
    "value": ({"value_width": 1024}, "values up to 512"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_it_refuses(name: str) -> None:
    changes, reason = REFUSED[name]
    kernel = Triton()
    kernel.interpreted = False
    assert reason in (kernel.refusal(problem(**changes)) or "")


def test_what_it_takes() -> None:
    every = frozenset({"causal", "window", "padding", "documents", "alibi"})
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        assert Triton().refusal(problem(dtype=dtype, mask=every)) is None


def test_a_gpu_that_is_too_old_is_refused() -> None:
    assert "not 7.5" in (Triton().refusal(problem(capability="sm_75")) or "")
    for able in ("sm_80", "sm_90", "sm_120", "gfx942", None):
        assert Triton().refusal(problem(capability=able)) is None


def test_without_triton_a_sentence_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("clearhead.kernels.triton.kernel.find_spec", lambda name: None)
    assert "pip install 'clearhead[triton]'" in (Triton().refusal(problem()) or "")


def test_it_runs_where_it_is_named_and_auto_passes_it_over_with_the_reason() -> None:
    for asked in (problem(), problem(needs_grad=True, mask=frozenset({"causal", "documents"}))):
        chosen = plan(asked)
        assert chosen.backend.name != "triton"
        assert dict(chosen.refusals)["triton"] == "no GPU has timed it yet: name it to use it"
        assert plan(asked, "triton").backend.name == "triton"
    for dtype in (torch.float32, torch.float16):
        assert plan(problem(device="cpu", dtype=dtype)).backend.name != "triton"
    assert load_backend("triton").refusal(problem(device="cpu")) is None


def test_triton_is_imported_only_when_it_runs() -> None:
    for module in ("kernel.py", "ops.py"):
        tree = ast.parse((Path(clearhead.__file__).parent / "kernels" / "triton" / module).read_text())
        # Imports at the module's own level; those inside the operators come when they run.
        told = " ".join(ast.unparse(x) for x in tree.body if isinstance(x, ast.Import | ast.ImportFrom))
        assert "import triton" not in told and "launch" not in told


def test_an_explicit_choice_on_cpu_without_the_interpreter_raises(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(load_backend("triton"), "interpreted", False)
    q, k, v, lam = (x.float() for x in make_inputs(SMALL, torch.float32).tensors)
    with pytest.raises(ValueError, match="TRITON_INTERPRET"):
        differential_attention(q, k, v, lam, backend="triton")


def test_autocast_runs_it_in_bfloat16() -> None:
    inputs = make_inputs(SMALL, torch.bfloat16)
    q, k, v, lam = (x.float() for x in inputs.tensors)
    found = differential_attention(
        q.bfloat16(), k.bfloat16(), v.bfloat16(), lam, is_causal=True, backend="triton"
    )
    assert found.dtype == torch.bfloat16
    exact = differential_attention(q, k, v, lam, is_causal=True, backend="eager")
    assert distance(found.float(), exact) < 0.05

"""The CPU kernel where numbers are extreme, missing or must not be looked at, and what it refuses."""

from dataclasses import replace
from functools import lru_cache, partial
from typing import Any

import pytest
import torch
from torch import Tensor

from clearhead.core.attend import difference
from clearhead.core.dispatch import AttentionProblem, load_backend
from clearhead.core.masks import MaskSpec
from clearhead.core.streams import Streams
from clearhead.engines.eager import Eager
from clearhead.functional import attention, differential_attention
from clearhead.kernels import ops
from clearhead.kernels.cpu import direct, library
from clearhead.kernels.cpu.kernel import Cpu
from tests.contracts.model_cases import LAYERS, make_model, tokens
from tests.contracts.support import distance
from tests.kernels.support import (
    DTYPES,
    Case,
    Inputs,
    Solution,
    answers,
    assert_rounding_only,
    every_set,
    make_inputs,
    make_masks,
    op_of,
    oracle_of,
    rounding,
    solve,
)
from tests.oracles import differential, softmax
from tests.oracles.softmax import visible

every_dtype = pytest.mark.parametrize("dtype", DTYPES)
FORMS = {
    "softmax": Case(streams=1, queries=33, keys=140),
    "v1": Case(own_keys=True, value_width=32, queries=33, keys=140),
    "decoding": Case(heads=8, queries=2, keys=150),
}
every_form = pytest.mark.parametrize("form", FORMS)
POISONS = (float("nan"), float("inf"), float("-inf"))


def climbing(case: Case, step: int) -> Inputs:
    """Logits from −1e4 to 1e4, rising or falling from key to key; the rows differ in sign."""
    plain = make_inputs(case, torch.bfloat16)
    q, k = torch.zeros_like(plain.tensors[0]), torch.zeros_like(plain.tensors[1])
    q[..., 0] = torch.where(torch.arange(case.queries) % 2 == 0, 100.0, -100.0)
    k[..., 0] = step * torch.linspace(-400, 400, case.keys).bfloat16().double()
    return Inputs((q, k, *plain.tensors[2:]), plain.cotangent)


@every_set
@every_dtype
@pytest.mark.parametrize("step", [1, -1], ids=("rising", "falling"))
@every_form
def test_logits_of_ten_thousand(form: str, step: int, dtype: str, isa: str) -> None:
    case, precision = replace(FORMS[form], scale=0.25), DTYPES[dtype]
    inputs = climbing(case, step)
    expected = answers(oracle_of(case), inputs, torch.float64, "dense")
    values = inputs.tensors[2].repeat_interleave(case.heads // case.groups, 1)
    for grad in (True, False):
        found = answers(op_of(case, "cpu"), inputs, precision, "dense", grad)
        assert all(bool(x.isfinite().all()) for x in found)
        assert_rounding_only(found, expected, rounding(case, inputs, precision))
        if case.streams == 2:
            continue
        # Every row has settled on one key, at an end of the list.
        assert torch.equal(found[0][:, :, 0], values[:, :, -1 if step == 1 else 0])
        assert torch.equal(found[0][:, :, 1], values[:, :, 0 if step == 1 else -1])


@every_set
@every_dtype
@pytest.mark.parametrize("mask", ["window", "padding", "documents"])
@every_form
def test_a_row_that_sees_one_key_has_its_value_and_no_gradient(
    form: str, mask: str, dtype: str, isa: str
) -> None:
    case = FORMS[form]
    inputs = make_inputs(case, DTYPES[dtype])
    only = torch.arange(case.keys - case.queries, case.keys)
    arguments: dict[str, Any] = {"is_causal": True, "window": 1}
    if mask == "padding":
        only = torch.full((case.queries,), 70)
        arguments = {"key_padding_mask": (torch.arange(case.keys) == 70)[None]}
    if mask == "documents":
        arguments = {"documents": torch.arange(case.keys)[None] * 3}
    leaves = [x.to(DTYPES[dtype]).requires_grad_() for x in inputs.tensors]
    op: Any = attention if case.streams == 1 else differential_attention
    out = op(*leaves, backend="cpu", **arguments)
    with torch.no_grad():
        alone = op(*leaves, backend="cpu", **arguments)
    own = leaves[2].repeat_interleave(case.heads // case.groups, 1)[:, :, only]
    for found in (out, alone):
        if case.streams == 1:
            assert torch.equal(found, own)
            continue
        # v − λ v or (1 − λ) v: a few roundings of its two terms.
        error = (found - difference((own, own), leaves[3])).abs()
        assert bool((error <= 2 * torch.finfo(own.dtype).eps * own.abs() * (1 + leaves[3].abs())).all())
    dq, dk, *_ = torch.autograd.grad(out, leaves, inputs.cotangent.to(out.dtype))
    assert not dq.any() and not dk.any()


@every_set
@every_dtype
@every_form
def test_a_row_that_sees_nothing_is_zero_and_moves_nothing(form: str, dtype: str, isa: str) -> None:
    case = FORMS[form]
    real = torch.ones(case.batch, case.keys, dtype=torch.bool)
    real[0] = False
    inputs = make_inputs(case, DTYPES[dtype])
    for poison in (None, float("nan")):
        leaves = [x.to(DTYPES[dtype]) for x in inputs.tensors]
        if poison is not None:
            leaves[1][0], leaves[2][0] = poison, poison
        leaves = [x.requires_grad_() for x in leaves]
        op: Any = attention if case.streams == 1 else differential_attention
        out = op(*leaves, key_padding_mask=real, backend="cpu")
        with torch.no_grad():
            alone = op(*leaves, key_padding_mask=real, backend="cpu")
        found = torch.autograd.grad(out, leaves, inputs.cotangent.to(out.dtype))
        assert all(not x[0].any() for x in (out, alone, *found))
        assert all(bool(x.isfinite().all() and x[1].any()) for x in (out, alone, *found))


@lru_cache(8)
def unseen_keys(form: str, mask: str, dtype: torch.dtype) -> tuple[MaskSpec, Tensor, Solution]:
    """Queries that end before the keys do; (B, S), the keys that none of them sees; the oracle's answers.

    The unseen keys and values are zeros, which are no trouble to anyone.
    """
    case = FORMS[form]
    first, keys = case.keys // 2, torch.arange(case.keys)
    parts: dict[str, Any] = (
        {"window": 9} if mask == "window" else {"causal": True} if mask == "future" else {}
    )
    if mask == "padding":
        parts["key_padding"] = torch.rand(2, case.keys, generator=torch.Generator().manual_seed(3)) < 0.7
    if mask == "documents":
        # Three in turns, the queries of the first two.
        parts["documents"] = torch.where(keys < first, keys % 3, keys % 2).expand(case.batch, -1)
    seen = visible(case.batch, case.keys, case.keys, **parts)[:, None, first : first + case.queries]
    spec = MaskSpec(parts.pop("causal", False), offset=first, **parts)
    unseen = ~seen.any((1, 2))
    inputs = make_inputs(case, dtype)
    for x in inputs.tensors[1:3]:
        x.masked_fill_(unseen[:, None, :, None], 0.0)
    oracle = differential.differential_attention if case.streams == 2 else softmax.attention
    expected = answers(partial(oracle, allowed=seen), inputs, torch.float64, "dense")
    return spec, unseen, Solution(inputs, expected, rounding(case, inputs, dtype, seen), expected)


@every_set
@every_dtype
@pytest.mark.parametrize("mask", ["future", "window", "padding", "documents"])
@every_form
def test_what_nobody_sees_may_be_anything(form: str, mask: str, dtype: str, isa: str) -> None:
    case, precision = FORMS[form], DTYPES[dtype]
    spec, unseen, solution = unseen_keys(form, mask, precision)
    assert bool(unseen.any(1).all()) and not bool(unseen.all(1).any())
    cotangent = solution.inputs.cotangent.to(precision)
    results = []
    for poison in (0.0, *POISONS):
        leaves = [x.to(precision) for x in solution.inputs.tensors]
        for x in leaves[1:3]:
            x.masked_fill_(unseen[:, None, :, None], poison)
        results.append(run(case, spec, leaves, cotangent))
        assert_rounding_only(results[-1], solution.expected, solution.units)
        assert_rounding_only(run(case, spec, leaves), solution.expected, solution.units)
    # A cache of fixed size gives its length as a tensor.
    assert isinstance(spec.offset, int)
    moved = run(case, replace(spec, offset=torch.tensor(spec.offset)), leaves, cotangent)
    assert all(torch.equal(a, b) for a, b in zip(moved, results[-1], strict=True))
    if mask == "padding":
        assert all(torch.equal(a, b) for x in results for a, b in zip(x, results[0], strict=True))


def run(case: Case, spec: MaskSpec, leaves: list[Tensor], cotangent: Tensor | None = None) -> list[Tensor]:
    """The output and, if there is a cotangent, the gradients of the kernel under `spec`."""
    leaves = [x.detach().requires_grad_(cotangent is not None) for x in leaves]
    q, k, v, *gate = leaves
    streams = q.unflatten(1, (-1, case.streams)).unbind(2)
    keys = k.unflatten(1, (-1, 2)).unbind(2) if case.own_keys else (k,)
    out = Cpu().run(Streams(streams, keys, v, *gate), spec, case.width**-0.5)
    gradients = () if cotangent is None else torch.autograd.grad(out, leaves, cotangent)
    return [x.detach().double() for x in (out, *gradients)]


@every_set
@every_dtype
@pytest.mark.parametrize("mask", ["causal", "window", "documents"])
@pytest.mark.parametrize("where", ["keys", "values"])
@every_form
def test_a_poisoned_key_reaches_the_rows_that_see_it_and_no_other(
    form: str, where: str, mask: str, dtype: str, isa: str
) -> None:
    masks = {"causal": {"causal": True}, "window": {"window": 20}, "documents": {"hidden": ("documents",)}}
    case, precision = replace(FORMS[form], **masks[mask]), DTYPES[dtype]  # type: ignore[arg-type]
    solution, allowed = solve(case, precision), make_masks(case).allowed.flatten(0, 2)
    some = (allowed.any(0) & ~allowed.all(0)).nonzero()[:, 0]
    at = int(some[len(some) // 2])
    sees = make_masks(case).allowed[..., at].expand(-1, case.heads, -1)
    # (B, S): keys that share no row with the poisoned one, of another document for instance.
    apart = ~(make_masks(case).allowed[..., at, None] & make_masks(case).allowed).any((1, 2))
    for poison in POISONS:
        tensors = [x.clone() for x in solution.inputs.tensors]
        tensors[1 if where == "keys" else 2][:, :, at] = poison
        poisoned = Inputs(tuple(tensors), solution.inputs.cotangent)
        found = answers(op_of(case, "cpu"), poisoned, precision, "dense")
        (alone,) = answers(op_of(case, "cpu"), poisoned, precision, "dense", grad=False)
        assert_rounding_only([alone[~sees]], [solution.expected[0][~sees]], [solution.units[0][~sees]])
        assert torch.equal(alone[sees].isfinite(), found[0][sees].isfinite())
        if where == "values" or poison != poison:
            assert not found[0][sees].isfinite().any()
        # Under a causal mask the last row sees them all.
        for i in () if mask == "causal" else (2, 3):
            clean = [x[i].transpose(1, 2)[apart] for x in (found, solution.expected, solution.units)]
            assert_rounding_only(*([x] for x in clean))
        # Outputs and the gradients of queries and λ belong to rows; those of keys are sums over the rows that see them.
        for i in (0, 1) if case.streams == 1 else (0, 1, 4):
            rows = sees.repeat_interleave(case.streams, 1) if i == 1 else sees
            assert_rounding_only(*([x[i][~rows]] for x in (found, solution.expected, solution.units)))


@every_set
@every_dtype
@every_form
def test_a_query_that_is_not_a_number_spoils_its_own_row(form: str, dtype: str, isa: str) -> None:
    case = replace(FORMS[form], causal=True)
    solution = solve(case, DTYPES[dtype])
    q, *others = solution.inputs.tensors
    q = q.clone()
    q[0, case.streams, 1] = float("nan")
    leaves = [x.to(DTYPES[dtype]) for x in (q, *others)]
    for x in leaves:
        found = op_of(case, "cpu")(*leaves).detach()
        assert bool(found[0, 1, 1].isnan().all())
        found[0, 1, 1] = solution.expected[0][0, 1, 1].to(found.dtype)
        assert_rounding_only([found.double()], solution.expected[:1], solution.units[:1])
        x.requires_grad_()


@pytest.mark.parametrize("keep", [False, True])
def test_what_the_gradient_needs_is_kept_only_for_a_gradient(
    keep: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    q, k, v, gate = (x.float() for x in make_inputs(FORMS["v1"], torch.float32).tensors)
    pairs, keys = q.unflatten(1, (-1, 2)).unbind(2), k.unflatten(1, (-1, 2)).unbind(2)
    inputs = ops.KernelInputs(*pairs, *keys, v, gate, None, None, None, 0, 0, False, 0.25)
    out, noise, statistics = torch.ops.clearhead.fused_attention(*inputs, keep)
    assert (noise.shape == out.shape) == (statistics.shape == (2, 2, *gate.shape[:3])) == keep
    assert (noise.numel() == statistics.numel() == 0) != keep
    asked = []
    outputs = ops.outputs
    monkeypatch.setattr(ops, "outputs", lambda inputs, keep: asked.append(keep) or outputs(inputs, keep))
    made, unwritten = 0, ops.unwritten
    called, forward = 0, direct.forward

    def counted(*arguments: Tensor) -> Tensor:
        nonlocal made
        made += 1
        return unwritten(*arguments)

    def direct_call(*arguments: Any) -> Tensor:
        nonlocal called
        called += 1
        return forward(*arguments)

    monkeypatch.setattr(ops, "unwritten", counted)
    monkeypatch.setattr(direct, "forward", direct_call)
    differential_attention(q, k, v, gate, backend="cpu")
    gate.requires_grad_()
    with torch.no_grad():
        differential_attention(q, k, v, gate, backend="cpu")
    with torch.inference_mode():
        differential_attention(q, k, v, gate, backend="cpu")
    differential_attention(q, k, v, gate, backend="cpu")
    # Without a gradient no operator is called, so nothing is kept for one.
    assert asked == [True]
    assert (made, called) == (1, 3)
    with pytest.raises(RuntimeError, match="keep=True"):
        torch.ops.clearhead.fused_attention(*inputs, False)


def test_heads_wider_than_the_kernel_holds_are_an_error_of_the_operator_too() -> None:
    x = torch.zeros(1, 1, 3, 513)
    with pytest.raises(RuntimeError, match="CPU kernel"):
        torch.ops.clearhead.fused_attention(
            x, None, x, None, x, None, None, None, None, 0, 0, False, 1.0, False
        )


PROBLEM = AttentionProblem(1, True, 4, 2, 5, 5, 8, 8, torch.float32, "cpu")
REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "float64": ({"dtype": torch.float64}, "bfloat16, float32, not in float64"),
    "float16": ({"dtype": torch.float16}, "bfloat16, float32, not in float16"),
    "dense": ({"mask": frozenset({"causal", "dense"})}, "a mask with dense"),
    "bias": ({"mask": frozenset({"bias"})}, "a mask with bias"),
    "maps": ({"needs_maps": True}, "attention maps"),
    "cuda": ({"device": "cuda"}, "not on cuda"),
    "wide keys": ({"key_width": 513}, "up to 512 wide, not 513"),
    "wide values": ({"value_width": 1024}, "up to 512 wide, not 1024"),
    "three streams": ({"streams": 3, "mixing": "other"}, "not 3 with another mixing"),
    "other mixing": ({"streams": 2, "mixing": "other"}, "not 2 with another mixing"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_refusal_says_why(name: str) -> None:
    assert Cpu().refusal(PROBLEM) is None
    changes, words = REFUSED[name]
    assert words in str(Cpu().refusal(replace(PROBLEM, **changes)))


@pytest.mark.parametrize("name", ["float64", "float16", "dense", "bias", "empty", "missing"])
def test_asked_for_by_name_it_runs_or_raises(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    shape = {"empty": (2, 4, 0, 8)}.get(name, (2, 4, 5, 8))
    x = torch.zeros(shape, dtype={"float64": torch.float64, "float16": torch.float16}.get(name))
    mask = {"dense": torch.ones(5, 5).bool(), "bias": torch.ones(5, 5)}.get(name)
    words = {"empty": "q is empty", "missing": "cannot run this attention .*of a test"}
    if name == "missing":
        monkeypatch.setattr(library, "_found", ["of a test"])
        assert torch.equal(attention(x, x, x), attention(x, x, x, backend="sdpa"))
    for engine in ("sdpa", "eager"):
        monkeypatch.setattr(type(load_backend(engine)), "__call__", lambda *_: pytest.fail("fell back"))
    with pytest.raises(ValueError, match=words.get(name, "backend 'cpu' cannot run this attention")):
        attention(x, x, x, attn_mask=mask, backend="cpu")


def test_maps_come_from_another_backend(monkeypatch: pytest.MonkeyPatch) -> None:
    runs: list[str] = []
    monkeypatch.setattr(Cpu, "preferred", lambda self, problem: True)
    for backend, method in ((Cpu, "run"), (Eager, "__call__")):
        original = getattr(backend, method)

        def counted(self: Any, *arguments: Any, original: Any = original) -> Any:
            runs.append(self.name)
            return original(self, *arguments)

        monkeypatch.setattr(backend, method, counted)
    model, ids = make_model("differential"), tokens(2, 6)
    plain = model(ids)
    assert runs == ["cpu"] * LAYERS
    mapped = model(ids, output_attentions=True)
    assert runs[LAYERS:] and set(runs[LAYERS:]) == {"eager"}
    assert len(mapped.attentions) == LAYERS and distance(mapped.logits, plain.logits) < 1e-5


def negative(x: Tensor) -> Tensor:
    """The same numbers, as a view that only notes their sign."""
    view = torch.complex(torch.zeros_like(x), -x).conj().imag
    assert view.is_neg() and torch.equal(view.resolve_neg(), x)
    return view


@pytest.mark.parametrize("number", range(4))
@pytest.mark.parametrize("change", [negative, lambda x: torch._efficientzerotensor(x.shape)])
@torch.no_grad()
def test_views_without_numbers_of_their_own_are_read_right(change: Any, number: int) -> None:
    """Called without the operator too, which is what makes numbers of them."""
    tensors = [x.float() for x in make_inputs(FORMS["v1"], torch.float32).tensors]
    tensors[number] = change(tensors[number])
    expected = differential_attention(*(x.clone().resolve_neg() for x in tensors), backend="eager")
    found = differential_attention(*tensors, backend="cpu")
    torch.testing.assert_close(found, expected, rtol=0, atol=2e-6)

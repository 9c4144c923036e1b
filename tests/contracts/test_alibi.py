"""ALiBi on every engine that claims it, under every mask, against float64 loops; what does not claim it refuses."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

import clearhead.engines.flex as flex
import clearhead.engines.hf  # noqa: F401  (registers flash_attention_2)
import clearhead.engines.sdpa as sdpa
from clearhead.core.attend import prepare, problem_of
from clearhead.core.dispatch import Caps, Engine, load_backend, plan
from clearhead.core.lowering import Lowering
from clearhead.core.masks import MaskSpec
from clearhead.engines.eager import Eager
from clearhead.functional import attention, differential_attention
from clearhead.kernels.cpu import library
from clearhead.positions.alibi import slopes
from tests.contracts.alibi_cases import (
    DENSE,
    FORMS,
    KINDS,
    LAYOUTS,
    SAYABLE,
    SLOPES,
    B,
    D,
    Kind,
    S,
    heads_of,
    inputs_of,
    oracle_of,
    public_op,
    run,
)
from tests.contracts.support import (
    assert_within,
    distance,
    distances,
    plain_attention,
    plain_differential,
    rand,
    value_and_gradients,
)
from tests.oracles import alibi, differential, softmax

EXACT = 1e-12


@pytest.mark.parametrize("kind", KINDS | DENSE)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("engine", ["eager", "sdpa"])
def test_every_mask_is_exact_in_float64(engine: str, form: str, layout: str, kind: str) -> None:
    case = (KINDS | DENSE)[kind]
    inputs = inputs_of(form, layout, case)
    expected = oracle_of(form)(*inputs, **case.oracle(6))
    assert distance(run(engine, form, inputs, case.mask()), expected) < EXACT


class Limited(Eager):
    """The eager engine under what a fused kernel may lack, for all the ways to rewrite streams into calls."""

    name = "limited"

    def __init__(self, caps: Caps, parent: Engine) -> None:
        self.limits, self.parent = caps, parent

    def caps(self, device: str) -> Caps:
        return self.limits

    def prepare(self, mask: MaskSpec, problem: Any, lowering: Lowering) -> Any:
        return self.parent.prepare(mask, problem, lowering)

    def __call__(self, call: Any, mask: Any, scale: float) -> Any:
        return self.parent(call, mask, scale)


@pytest.mark.parametrize("kind", ["causal", "left_padded", "bias"])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("caps", [("native", False), ("pad", False), ("split", False), ("split", True)])
@pytest.mark.parametrize("engine", ["eager", "sdpa"])
def test_slopes_follow_their_heads_through_every_lowering(
    engine: str, caps: Any, form: str, layout: str, kind: str
) -> None:
    case = (KINDS | DENSE)[kind]
    inputs = inputs_of(form, layout, case)
    limited = Limited(Caps(wide_values=caps[0], one_call=caps[1]), load_backend(engine))  # type: ignore[arg-type]
    expected = oracle_of(form)(*inputs, **case.oracle(6))
    assert distance(run(limited, form, inputs, case.mask()), expected) < EXACT


@pytest.mark.parametrize(
    "kind",
    [pytest.param(kind, marks=[pytest.mark.compiles] * (kind == "fixed_cache_padded")) for kind in KINDS],
)
def test_flex_is_as_good_as_plain(kind: str) -> None:
    case = KINDS[kind]
    inputs = tuple(x.float() for x in inputs_of("v2", "gqa", case))
    expected = differential.differential_attention(*[x.double() for x in inputs], **case.oracle(6))
    found = run("flex", "v2", inputs, case.mask())
    plain = plain_differential(
        *inputs, attn_mask=case.bias().masked_fill(~case.seen(), float("-inf")).float()
    )
    assert_within([found], [expected], [plain], torch.float32)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("form", FORMS)
def test_flex_knows_every_head_s_slope(form: str, layout: str) -> None:
    case = KINDS["chunk"]
    inputs = tuple(x.float() for x in inputs_of(form, layout, case))
    expected = oracle_of(form)(*[x.double() for x in inputs], **case.oracle(6))
    assert distance(run("flex", form, inputs, case.mask()), expected) < 1e-6


@pytest.mark.compiles
def test_flex_is_compiled_once_for_all_lengths_of_a_cache_of_fixed_size() -> None:
    torch._dynamo.reset()
    counters = torch._dynamo.utils.counters
    counters.clear()
    for place in range(12):
        case = replace(KINDS["fixed_cache_one"], offset=torch.tensor(place % S))
        inputs = tuple(x.float() for x in inputs_of("softmax", "gqa", case))
        expected = softmax.attention(*[x.double() for x in inputs], **case.oracle(6))
        assert distance(run("flex", "softmax", inputs, case.mask()), expected) < 1e-6
    assert counters["stats"]["unique_graphs"] == 1


@pytest.mark.parametrize("kind", SAYABLE)
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("backend", ["eager", "sdpa", "auto"])
def test_gradients_are_exact_in_float64(backend: str, form: str, kind: str) -> None:
    case = (KINDS | DENSE)[kind]
    inputs = inputs_of(form, "gqa", case)
    cotangent = rand(B, 6, case.queries, inputs[2].shape[-1], seed=5)
    expected = value_and_gradients(oracle_of(form), inputs, cotangent, torch.float64, **case.oracle(6))
    arguments = case.op | {"alibi_slopes": SLOPES.double()}
    found = value_and_gradients(
        public_op(form), inputs, cotangent, torch.float64, backend=backend, **arguments
    )
    assert max(distances(found, expected)) < 1e-10


@pytest.mark.parametrize("kind", ["both_ways", "causal", "chunk", "left_padded", "packed", "window", "bias"])
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("backend", ["eager", "sdpa"])
def test_low_precision_is_as_good_as_plain(backend: str, dtype: torch.dtype, form: str, kind: str) -> None:
    case = (KINDS | DENSE)[kind]
    inputs = tuple(x.to(dtype).double() for x in inputs_of(form, "gqa", case))
    cotangent = rand(B, 6, case.queries, inputs[2].shape[-1], seed=5).to(dtype).double()
    expected = value_and_gradients(oracle_of(form), inputs, cotangent, torch.float64, **case.oracle(6))
    bias = case.bias().masked_fill(~case.seen(), float("-inf")).float()

    def plain(*tensors: Tensor) -> Tensor:
        return (plain_attention if form == "softmax" else plain_differential)(*tensors, attn_mask=bias)

    def ours(*tensors: Tensor) -> Tensor:
        return public_op(form)(*tensors, backend=backend, alibi_slopes=SLOPES, **case.op)

    found = value_and_gradients(ours, inputs, cotangent, dtype)
    assert_within(found, expected, value_and_gradients(plain, inputs, cotangent, dtype), dtype)


NEAR_HIDDEN = (torch.arange(1300) < 300).expand(B, -1)
FAR = {
    "beyond_the_keys": Kind({"is_causal": True}, queries=2, keys=300, offset=1300),
    "nearest_padded": Kind({"is_causal": True, "key_padding_mask": NEAR_HIDDEN}, queries=2, keys=1300),
}


@pytest.mark.parametrize("kind", FAR)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("engine", ["eager", "sdpa", "flex"])
def test_distances_past_256_are_not_lost(engine: str, dtype: torch.dtype, kind: str) -> None:
    """All keys are a thousand tokens away: bfloat16 rounds their biases, 20 to 130, by up to a quarter."""
    case, steepness = FAR[kind], torch.linspace(0.02, 0.1, 6)
    q, k, v = (x.to(dtype) for x in inputs_of("softmax", "gqa", case))
    bias = alibi.bias(steepness, case.queries, case.keys, case.first)
    expected = softmax.attention(q.double(), k.double(), v.double(), allowed=case.seen(), bias=bias)
    found = run(engine, "softmax", (q, k, v), replace(case.mask(), slopes=steepness))
    plain, rounded = (
        plain_attention(q, k, v, attn_mask=given.masked_fill(~case.seen(), float("-inf")))
        for given in (bias.float(), bias.bfloat16())
    )
    assert_within([found], [expected], [plain], dtype)
    with pytest.raises(AssertionError, match="over"):
        assert_within([rounded], [expected], [plain], dtype)


@pytest.mark.parametrize("kind", ["causal", "chunk", "left_padded", "window"])
def test_it_compiles_as_one_graph(kind: str) -> None:
    torch._dynamo.reset()
    case = KINDS[kind]
    inputs = inputs_of("v1", "gqa", case)
    compiled = torch.compile(differential_attention, fullgraph=True, backend="aot_eager")
    found = compiled(*inputs, alibi_slopes=SLOPES, **case.op)
    expected = differential.differential_attention(*inputs, **case.oracle(6))
    assert distance(found, expected) < 1e-10


@pytest.mark.compiles
def test_inductor_keeps_the_overlapping_rows_of_the_mask() -> None:
    torch._dynamo.reset()
    case = KINDS["causal"]
    inputs = [x.float().requires_grad_() for x in inputs_of("softmax", "gqa", case)]
    cotangent = rand(B, 6, S, D, seed=5)
    compiled = torch.compile(attention, fullgraph=True)
    arguments = {"is_causal": True, "alibi_slopes": SLOPES, "backend": "sdpa"}
    found = value_and_gradients(compiled, inputs, cotangent, torch.float32, **arguments)
    expected = value_and_gradients(
        softmax.attention, [x.double() for x in inputs], cotangent, torch.float64, **case.oracle(6)
    )
    assert max(distances(found, expected)) < 1e-5


@pytest.mark.parametrize("kind", ["both_ways", "causal", "chunk", "fixed_cache", "window"])
def test_sdpa_s_mask_holds_one_row_a_head(kind: str) -> None:
    case = KINDS[kind]
    heads = heads_of("v2", inputs_of("v2", "gqa", case))
    prepared = prepare(
        (load_backend("sdpa"),), problem_of(heads, case.mask(), "difference"), case.mask(), False
    )
    # 12 heads of the one call, by their storage: the view has L times as many elements.
    assert prepared.mask[0].mask.untyped_storage().nbytes() == 12 * (case.queries + case.keys - 1) * 8


@pytest.mark.parametrize("kind", [name for name, kind in KINDS.items() if kind.queries > 1])
@pytest.mark.parametrize("form", FORMS)
def test_bands_of_queries_are_exact(form: str, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sdpa, "_ROWS", 3)
    case = KINDS[kind]
    inputs = inputs_of(form, "gqa", case)
    expected = oracle_of(form)(*inputs, **case.oracle(6))
    assert distance(run("sdpa", form, inputs, case.mask()), expected) < EXACT
    if case.offset is None:
        cotangent = rand(B, 6, case.queries, inputs[2].shape[-1], seed=5)
        wanted = value_and_gradients(oracle_of(form), inputs, cotangent, torch.float64, **case.oracle(6))
        arguments = case.op | {"alibi_slopes": SLOPES.double(), "backend": "sdpa"}
        found = value_and_gradients(public_op(form), inputs, cotangent, torch.float64, **arguments)
        assert max(distances(found, wanted)) < 1e-10


@pytest.mark.parametrize("offset", [-7, -2, 3, 40])
@pytest.mark.parametrize(
    "parts", [{"is_causal": True}, {"window": 2}, {"is_causal": True, "window": 2}], ids=str
)
def test_bands_that_see_nothing_are_zero(
    parts: dict[str, Any], offset: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sdpa, "_ROWS", 2)
    case = Kind(parts, offset=offset)
    inputs = inputs_of("v1", "gqa", case)
    expected = differential.differential_attention(*inputs, **case.oracle(6))
    assert distance(run("sdpa", "v1", inputs, case.mask()), expected) < EXACT
    assert distance(run("eager", "v1", inputs, case.mask()), expected) < EXACT


def problem(device: str, dtype: torch.dtype) -> Any:
    heads = heads_of("v1", inputs_of("v1", "gqa", KINDS["causal"]))
    found = problem_of(heads, KINDS["causal"].mask(), "difference")
    return replace(found, device=device, dtype=dtype)


def test_what_cannot_take_slopes_says_so_and_the_choice_goes_on() -> None:
    on_cpu, on_cuda = problem("cpu", torch.float32), problem("cuda", torch.bfloat16)
    chosen = plan(on_cpu)
    assert chosen.backend.name == "sdpa"
    if library.missing() is None:
        assert dict(chosen.refusals)["cpu"] == "it cannot express a mask with alibi"
    assert plan(on_cuda).backend.name == "flex"
    assert "precise" in (load_backend("sdpa").refusal(on_cuda) or "")
    assert "alibi" in (load_backend("flash_attention_2").refusal(on_cuda) or "")
    with pytest.raises(ValueError, match="no backward pass"):
        plan(replace(on_cpu, needs_grad=True), "flex")


BAD = {
    "one number a query head": (slopes(12), "alibi_slopes has shape (12,); expected (6,)"),
    "a table": (slopes(6)[None], "alibi_slopes has shape (1, 6); expected (6,)"),
    "bfloat16": (slopes(6).bfloat16(), "alibi_slopes must be float32, or float64"),
    "a parameter": (slopes(6).requires_grad_(), "alibi_slopes are constants and get no gradient"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_slopes_are_errors(name: str) -> None:
    given, message = BAD[name]
    inputs = inputs_of("v1", "gqa", KINDS["causal"])
    with pytest.raises(ValueError) as error:
        differential_attention(*inputs, is_causal=True, alibi_slopes=given)
    assert message in str(error.value)


def test_more_queries_than_keys_have_no_distances() -> None:
    q, k = rand(1, 6, 5, D), rand(1, 6, 3, D)
    with pytest.raises(ValueError, match="alibi_slopes with 5 queries and 3 keys"):
        attention(q, k, k, alibi_slopes=SLOPES)


def test_no_heads_have_no_slopes() -> None:
    with pytest.raises(ValueError, match="heads must be at least 1, not 0"):
        slopes(0)


def stream_by_stream(given: Tensor, lowering: Lowering, groups: int) -> Tensor:
    return given.repeat(lowering.heads_factor)


WRONG: dict[str, Callable[[Tensor], Tensor]] = {
    "sign": torch.neg,
    "order": lambda given: given.flip(0),
    "one for all": lambda given: given[:1].expand(6),
    "as if six were a power of two": lambda given: 2.0 ** (-8 * torch.arange(1, 7) / 6),
}


@pytest.mark.parametrize("kind", ["both_ways", "causal", "right_padded"])
@pytest.mark.parametrize("wrong", WRONG)
@pytest.mark.parametrize("engine", ["eager", "sdpa"])
def test_the_comparison_notices_wrong_slopes(engine: str, wrong: str, kind: str) -> None:
    case = KINDS[kind]
    inputs = inputs_of("v2", "gqa", case)
    expected = differential.differential_attention(*inputs, **case.oracle(6))
    mask = replace(case.mask(), slopes=WRONG[wrong](SLOPES))
    assert distance(run(engine, "v2", inputs, mask), expected) > 1e-3


@pytest.mark.parametrize("kind", ["both_ways", "right_padded"])
@pytest.mark.parametrize("engine", ["eager", "sdpa"])
def test_the_comparison_notices_a_token_too_many(
    engine: str, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not under a causal mask: there softmax itself takes off what all keys of a row have in common."""
    case = KINDS[kind]
    inputs = inputs_of("v2", "gqa", case)
    original = MaskSpec.query_positions
    monkeypatch.setattr(MaskSpec, "query_positions", lambda self, *sizes: original(self, *sizes) + 1)
    expected = differential.differential_attention(*inputs, **case.oracle(6))
    assert distance(run(engine, "v2", inputs, case.mask()), expected) > 1e-3


@pytest.mark.parametrize(("engine", "module"), [("sdpa", sdpa), ("flex", flex)])
def test_the_comparison_notices_slopes_in_the_order_of_streams(
    engine: str, module: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = KINDS["chunk"]
    inputs = tuple(x.float() for x in inputs_of("v2", "gqa", case))
    monkeypatch.setattr(module, "lower_slopes", stream_by_stream)
    expected = differential.differential_attention(*[x.double() for x in inputs], **case.oracle(6))
    assert distance(run(engine, "v2", inputs, case.mask()), expected) > 1e-3

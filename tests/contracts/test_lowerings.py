"""Whatever an engine cannot do, the rewritten calls compute the same: FlashDiffAttn_1, FlashDiffAttn_2 and the rest."""

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from clearhead.core.attend import attend, difference, prepare, problem_of, single
from clearhead.core.dispatch import Caps, load_backend
from clearhead.core.lowering import SoftmaxCall, WideValues
from clearhead.core.masks import MaskSpec
from clearhead.core.streams import Streams
from clearhead.engines.eager import Eager
from clearhead.functional import attention
from tests.contracts.flash import stand_in
from tests.contracts.support import HEADS, distance, make_mask, rand
from tests.oracles import differential, softmax

B, L, D = 2, 6, 4
EXACT = 1e-12


class Limited(Eager):
    """The eager engine, pretending to lack what a fused kernel may lack, and checking that nobody asks for it."""

    name = "limited"

    def __init__(self, wide_values: WideValues, one_call: bool) -> None:
        self.limits = Caps(wide_values=wide_values, one_call=one_call, maps=True)
        self.calls = 0

    def caps(self, device: str) -> Caps:
        return self.limits

    def __call__(self, call: SoftmaxCall, mask: Any, scale: float) -> tuple[Tensor, Tensor | None]:
        self.calls += 1
        assert call.q.shape[1] % call.k.shape[1] == 0
        assert call.k.shape[1] == call.v.shape[1]
        if self.limits.wide_values != "native":
            assert call.v.shape[-1] == call.k.shape[-1] == call.q.shape[-1]
        return super().__call__(call, mask, scale)


def run(
    engine: Limited, heads: Streams, mask: MaskSpec, mix: Callable[..., Tensor]
) -> tuple[Tensor, Tensor, str]:
    prepared = prepare(
        (engine,), problem_of(heads, mask, mix.__name__, needs_maps=True), mask, automatic=False
    )
    out, maps = attend(heads, prepared, D**-0.5, mix, with_maps=True)
    assert maps is not None
    assert prepared.plan.lowering is not None
    assert engine.calls == prepared.plan.lowering.calls
    return out, maps, prepared.plan.lowering.name


V1_NAMES = {
    ("native", False): "FlashDiffAttn_1",
    ("pad", False): "FlashDiffAttn_1 padded",
    ("split", False): "FlashDiffAttn_2",
    ("native", True): "stacked",
    ("pad", True): "stacked",
    ("split", True): "stacked",
}


def differential_inputs(layout: str, own_keys: bool, value_width: int) -> tuple[tuple[Tensor, ...], Streams]:
    heads, groups = HEADS[layout]
    q, v = rand(B, 2 * heads, L, D, seed=1), rand(B, groups, L, value_width, seed=3)
    k = rand(B, 2 * groups if own_keys else groups, L, D, seed=2)
    lam = rand(B, heads, L, 1, seed=4)
    keys = (k[:, 0::2], k[:, 1::2]) if own_keys else (k,)
    return (q, k, v, lam), Streams((q[:, 0::2], q[:, 1::2]), keys, v, lam)


@pytest.mark.parametrize("kind", ["causal", "per_head"])
@pytest.mark.parametrize("layout", HEADS)
@pytest.mark.parametrize(("wide_values", "one_call"), V1_NAMES)
def test_v1(wide_values: WideValues, one_call: bool, layout: str, kind: str) -> None:
    inputs, heads = differential_inputs(layout, True, 2 * D)
    mask = make_mask(kind, B, HEADS[layout][0], L)
    spec = MaskSpec(is_causal=kind == "causal", dense=mask.op.get("attn_mask"))  # type: ignore[arg-type]
    out, maps, name = run(Limited(wide_values, one_call), heads, spec, difference)
    q, k, v, lam = inputs
    assert name == V1_NAMES[wide_values, one_call]
    assert distance(out, differential.differential_attention(q, k, v, lam, **mask.oracle)) < EXACT  # type: ignore[arg-type]
    assert distance(maps, differential.differential_map(q, k, v.shape[1], lam, **mask.oracle)) < EXACT  # type: ignore[arg-type]


@pytest.mark.parametrize("slices", [2, 3, 4])
def test_a_value_of_several_key_widths_is_cut_as_often(slices: int) -> None:
    inputs, heads = differential_inputs("gqa", True, slices * D)
    engine = Limited("split", False)
    out, _, name = run(engine, heads, MaskSpec(is_causal=True), difference)
    assert (engine.calls, name) == (2 * slices, "FlashDiffAttn_2")
    assert distance(out, differential.differential_attention(*inputs, causal=True)) < EXACT


@pytest.mark.parametrize("kind", ["causal", "per_head"])
@pytest.mark.parametrize("layout", HEADS)
@pytest.mark.parametrize("one_call", [False, True])
def test_v2_is_one_call_with_the_streams_as_heads(one_call: bool, layout: str, kind: str) -> None:
    inputs, heads = differential_inputs(layout, False, D)
    mask = make_mask(kind, B, HEADS[layout][0], L)
    spec = MaskSpec(is_causal=kind == "causal", dense=mask.op.get("attn_mask"))  # type: ignore[arg-type]
    engine = Limited("split", one_call)
    out, maps, name = run(engine, heads, spec, difference)
    q, k, v, lam = inputs
    assert (engine.calls, name) == (1, "grouped")
    assert distance(out, differential.differential_attention(q, k, v, lam, **mask.oracle)) < EXACT  # type: ignore[arg-type]
    assert distance(maps, differential.differential_map(q, k, v.shape[1], lam, **mask.oracle)) < EXACT  # type: ignore[arg-type]


SHARED_NAMES = {
    ("native", False): "grouped",
    ("pad", True): "grouped padded",
    ("split", False): "FlashDiffAttn_2",
}
SHARED_NAMES |= {("split", True): "stacked"}


@pytest.mark.parametrize(("wide_values", "one_call"), SHARED_NAMES)
def test_shared_keys_with_wide_values(wide_values: WideValues, one_call: bool) -> None:
    inputs, heads = differential_inputs("gqa", False, 3 * D)
    out, maps, name = run(Limited(wide_values, one_call), heads, MaskSpec(is_causal=True), difference)
    q, k, v, lam = inputs
    assert name == SHARED_NAMES[wide_values, one_call]
    assert distance(out, differential.differential_attention(q, k, v, lam, causal=True)) < EXACT
    assert distance(maps, differential.differential_map(q, k, v.shape[1], lam, causal=True)) < EXACT


@pytest.mark.parametrize("layout", HEADS)
def test_one_stream_is_one_call(layout: str) -> None:
    heads, groups = HEADS[layout]
    q, k, v = rand(B, heads, L, D, seed=1), rand(B, groups, L, D, seed=2), rand(B, groups, L, D, seed=3)
    engine = Limited("split", True)
    out, maps, name = run(engine, Streams((q,), (k,), v), MaskSpec(is_causal=True), single)
    assert (engine.calls, name) == (1, "direct")
    assert distance(out, softmax.attention(q, k, v, causal=True)) < EXACT
    assert distance(maps, softmax.attention_map(q, k, causal=True)) < EXACT


PADDING = torch.tensor([[False, False, True, True, True, True], [True] * 6])
DOCUMENTS = torch.tensor([[0, 0, 1, 1, 1, 1], [3, 3, 3, 3, 4, 5]])
FLASH_MASKS = {
    "none": (L, {}),
    "causal": (L, {"is_causal": True}),
    "last": (4, {"is_causal": True}),
    "one": (1, {"is_causal": True}),
    "left_padding": (L, {"is_causal": True, "key_padding": PADDING}),
    "left_padding_last": (3, {"is_causal": True, "key_padding": PADDING}),
    "left_padding_one": (1, {"is_causal": True, "key_padding": PADDING}),
    "right_padding": (L, {"is_causal": True, "key_padding": PADDING.flip(1)}),
    "documents": (L, {"is_causal": True, "documents": DOCUMENTS}),
    "documents_of_one": (L, {"is_causal": True, "documents": DOCUMENTS[:1]}),
    "documents_both_ways": (L, {"documents": DOCUMENTS}),
    "documents_and_padding": (L, {"is_causal": True, "documents": DOCUMENTS, "key_padding": PADDING}),
    "documents_last": (3, {"is_causal": True, "documents": DOCUMENTS}),
    "padding_both_ways": (L, {"key_padding": PADDING}),
    "padding_of_a_context": (3, {"key_padding": PADDING}),
    "window": (L, {"is_causal": True, "window": 3}),
    "window_last": (4, {"is_causal": True, "window": 2}),
    "window_one": (1, {"is_causal": True, "window": 2}),
    "window_wider_than_all": (4, {"is_causal": True, "window": 99}),
    "window_both_ways": (L, {"window": 2}),
    "window_both_ways_last": (4, {"window": 2}),
    "window_documents": (L, {"is_causal": True, "window": 2, "documents": DOCUMENTS}),
    "window_and_padding": (L, {"is_causal": True, "window": 2, "key_padding": PADDING}),
    "window_of_a_fixed_cache": (3, {"is_causal": True, "window": 2, "offset": torch.tensor(1)}),
    "offset": (3, {"is_causal": True, "offset": 1}),
    "offset_of_a_fixed_cache": (3, {"is_causal": True, "offset": torch.tensor(1)}),
}


def may_see(queries: int, parts: dict[str, Any]) -> Tensor:
    """(B, 1, queries, L) bool, from the definition of each part."""
    see = torch.ones(B, queries, L, dtype=torch.bool)
    offset = int(parts.get("offset", L - queries))
    for b in range(B):
        for i in range(queries):
            for j in range(L):
                far = "window" in parts and abs(i + offset - j) >= parts["window"]
                late = parts.get("is_causal", False) and j > i + offset
                unreal = "key_padding" in parts and not parts["key_padding"][b, j]
                foreign = False
                if "documents" in parts:
                    row = parts["documents"][b % len(parts["documents"])]
                    foreign = row[i + offset] != row[j]
                see[b, i, j] = not (late or far or unreal or foreign)
    return see[:, None]


@pytest.mark.parametrize("kind", FLASH_MASKS)
@pytest.mark.parametrize("form", ["v1", "v2"])
def test_flash_attention_2_is_right_or_refuses(form: str, kind: str) -> None:
    """Under Hugging Face's own dispatch: never wide values, and no mask that is silently lost."""
    queries, parts = FLASH_MASKS[kind]
    inputs, _ = differential_inputs("gqa", form == "v1", 2 * D if form == "v1" else D)
    q, k, v, lam = inputs[0][:, :, L - queries :], inputs[1], inputs[2], inputs[3][:, :, L - queries :]
    keys = (k[:, 0::2], k[:, 1::2]) if form == "v1" else (k,)
    heads, mask = Streams((q[:, 0::2], q[:, 1::2]), keys, v, lam), MaskSpec(**parts)
    with stand_in() as recorder:
        problem = problem_of(heads, mask, "difference")
        backend = load_backend("flash_attention_2")
        if kind in REFUSED:
            with pytest.raises(ValueError, match=REFUSED[kind]):
                prepare((backend,), problem, mask, automatic=False)
            return
        prepared = prepare((backend,), problem, mask, automatic=False)
        out, _ = attend(heads, prepared, D**-0.5, difference)
    expected = differential.differential_attention(q, k, v, lam, allowed=may_see(queries, parts))
    if "key_padding" in parts:
        # Flash-attn takes padding out of the batch, queries too: only the real ones have an answer.
        real = parts["key_padding"][:, None, L - queries :, None]
        out, expected = out * real, expected * real
    assert distance(out, expected) < EXACT
    assert len(recorder.calls) == (4 if form == "v1" else 1)
    assert all(
        q_shape[-2] == (4 if form == "v1" else 8) and k_shape[-2] == 2
        for q_shape, k_shape, _ in recorder.calls
    )


@pytest.fixture
def registered_name() -> Iterator[str]:
    """An attention function of somebody else's, with masks of queries against keys."""
    name = "somebody_s_attention"
    AttentionInterface.register(name, sdpa_attention_forward)
    AttentionMaskInterface.register(name, sdpa_mask)
    yield name
    del AttentionInterface._global_mapping[name], AttentionMaskInterface._global_mapping[name]


@pytest.mark.parametrize("kind", FLASH_MASKS)
def test_any_function_of_the_attention_interface_is_right(registered_name: str, kind: str) -> None:
    queries, parts = FLASH_MASKS[kind]
    (q, k, v, lam), _ = differential_inputs("gqa", True, 2 * D)
    q, lam = q[:, :, L - queries :], lam[:, :, L - queries :]
    heads, mask = Streams((q[:, 0::2], q[:, 1::2]), (k[:, 0::2], k[:, 1::2]), v, lam), MaskSpec(**parts)
    problem = problem_of(heads, mask, "difference")
    out, _ = attend(
        heads, prepare((load_backend(registered_name),), problem, mask, False), D**-0.5, difference
    )
    expected = differential.differential_attention(q, k, v, lam, allowed=may_see(queries, parts))
    assert distance(out, expected) < EXACT


def test_a_window_is_refused_where_hugging_face_would_lose_it() -> None:
    q, k, v = (rand(1, 2, 3, 4) for _ in range(3))
    mask = MaskSpec(is_causal=True, window=2)
    problem = replace(problem_of(Streams((q,), (k,), v), mask, "single"), device="npu", dtype=torch.bfloat16)
    reason = load_backend("flash_attention_2").refusal(problem)
    assert reason is not None and "window" in reason
    assert load_backend("flash_attention_2").refusal(replace(problem, device="cuda")) is None


def test_a_function_without_a_mask_function_is_refused() -> None:
    name = "maskless_attention"
    AttentionInterface.register(name, sdpa_attention_forward)
    try:
        with pytest.raises(ValueError, match="no mask function"):
            attention(*(rand(1, 2, 3, 4) for _ in range(3)), backend=name)
    finally:
        del AttentionInterface._global_mapping[name]


# What flash-attn's interface in Hugging Face cannot say, and a word of the reason.
REFUSED = {
    "documents_and_padding": "documents",
    "documents_last": "documents",
    "padding_both_ways": "padding",
    "padding_of_a_context": "padding",
    "window_and_padding": "window or padding",
    "window_of_a_fixed_cache": "fixed size",
    "offset": "fixed size",
    "offset_of_a_fixed_cache": "fixed size",
}

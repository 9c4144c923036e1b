"""The public layers against the oracle of a whole layer: every variant, option, mask, self- and cross-attention."""

from typing import Any

import pytest
import torch
from transformers import DynamicCache, LlamaConfig, StaticCache

from clearhead import registry
from clearhead.kernels.cpu import library
from tests.contracts.layer_cases import (
    CALLS,
    CASES,
    CLASSES,
    LAYOUTS,
    MAIN,
    WIDTH,
    B,
    D,
    L,
    S,
    compare,
    make,
    run_layer,
    run_oracle,
    spec_of,
    weights_digest,
)
from tests.contracts.support import assert_within, distance, rand, relative_error
from tests.oracles.layers import layer

needs_kernel = pytest.mark.skipif(library.missing() is not None, reason=str(library.missing()))
# Every call but the one with an (L, S) mask.
KERNEL_CALLS = [name for name in CALLS if name != "mask"]


def test_nothing_in_the_registry_is_left_out() -> None:
    assert set(CLASSES) == set(registry.VARIANTS)
    assert set(registry.ENGINES) == {"eager", "sdpa", "flex"}
    assert set(registry.KERNELS) == {"cpu", "triton", "blocks"}


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("name", MAIN)
def test_layer_is_exact_in_float64(name: str, call: str) -> None:
    compare(name, "gqa", call)


@pytest.mark.parametrize("name", [name for name in CASES if name not in MAIN])
def test_every_option_is_exact_in_float64(name: str) -> None:
    compare(name, "gqa", "padding")


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", MAIN)
@pytest.mark.parametrize("backend", ["eager", "sdpa"])
def test_every_head_layout_is_exact_in_float64(backend: str, name: str, layout: str) -> None:
    if layout == "one" and name in ("differential", "differential_collinear"):
        with pytest.raises(ValueError, match="num_kv_heads must be even"):
            make(CASES[name], layout)
        return
    compare(name, layout, "causal", backend)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=("float32", "bfloat16"))
@pytest.mark.parametrize("name", MAIN)
@pytest.mark.parametrize(
    ("backend", "call_name"),
    [("sdpa", "padding"), *(pytest.param("cpu", call, marks=needs_kernel) for call in KERNEL_CALLS)],
)
def test_low_precision_is_as_good_as_eager(
    name: str, dtype: torch.dtype, backend: str, call_name: str
) -> None:
    """Same weights and inputs, rounded to `dtype` first; the error of every item against float64.

    The weights are small enough that no row is one-hot: gradients through those are all cancellation.
    """
    case, call = CASES[name], CALLS[call_name]
    tensors = [rand(B, n, WIDTH, seed=n).to(dtype).double() for n in ((L, S) if call[0] else (L,))]
    eager, fused = (make(case, "gqa", dtype, b, spread=0.4) for b in ("eager", backend))
    expected = run_oracle(case, "gqa", eager, call[2], tensors)
    plain, found = (run_layer(module, dtype, call[1], tensors) for module in (eager, fused))
    assert_within(found, expected, plain, dtype)
    # Eager itself is no excuse: its own error stays near the rounding of its dtype.
    assert relative_error(plain, expected) < 20 * torch.finfo(dtype).eps


@pytest.mark.parametrize("call", ["padding", "documents", "window_both_ways"])
def test_flex_masks(call: str) -> None:
    case = CASES["differential"]
    module, eager = (make(case, "gqa", torch.float32, backend) for backend in ("flex", "eager"))
    x = rand(B, L, WIDTH, seed=1)
    expected, _ = layer(spec_of(case, "gqa"), weights_digest(module), x.float().double(), **CALLS[call][2])
    with torch.no_grad():
        found, plain = (m(x.float(), **CALLS[call][1]).double() for m in (module, eager))
    assert_within([found], [expected], [plain], torch.float32)


@pytest.mark.parametrize("call", ["causal", "padding", "window", "cross", "mask"])
@pytest.mark.parametrize("name", MAIN)
def test_effective_map_is_the_oracle_s(name: str, call: str) -> None:
    case = CASES[name]
    module = make(case, "gqa")
    has_context, arguments, oracle_arguments = CALLS[call]
    tensors = [rand(B, L, WIDTH, seed=1)] + ([rand(B, S, WIDTH, seed=2)] if has_context else [])
    _, expected = layer(spec_of(case, "gqa"), weights_digest(module), *tensors, **oracle_arguments)
    assert distance(module.effective_map(*tensors, **arguments), expected) < 1e-10


@pytest.mark.parametrize("kind", ["dynamic", "static"])
@pytest.mark.parametrize("window", [None, 2])
@pytest.mark.parametrize("chunks", [(1,) * L, (3, 1, 1), (2, 3)], ids=str)
@pytest.mark.parametrize("name", MAIN)
def test_a_cached_layer_is_the_uncached_one(
    name: str, chunks: tuple[int, ...], window: int | None, kind: str
) -> None:
    for dtype, bound in ((torch.float64, 1e-12), (torch.float32, 1e-4)):
        module, x = make(CASES[name], "gqa", dtype), rand(B, L, WIDTH).to(dtype)
        fixed = StaticCache(config=LlamaConfig(num_hidden_layers=2), max_cache_len=L + 2)
        arguments: dict[str, Any] = {"is_causal": True, "window": window}
        arguments["cache"] = fixed if kind == "static" else DynamicCache()
        with torch.no_grad():
            parts = [module(part, **arguments) for part in x.split(list(chunks), dim=1)]
            assert distance(torch.cat(parts, 1), module(x, **arguments | {"cache": None})) < bound


@pytest.mark.parametrize("name", [name for name in CASES if name in MAIN or "collinear" in name])
def test_shift_invariance(name: str) -> None:
    """Moving every position by 1,000 changes nothing, except in CoCA as released ("slack")."""
    for dtype, bound in ((torch.float32, 1e-4), (torch.float64, 1e-9)):
        module, x = make(CASES[name], "gqa", dtype), rand(B, L, WIDTH, seed=1).to(dtype)
        here = torch.arange(L)[None]
        moved = distance(
            module(x, is_causal=True, positions=here), module(x, is_causal=True, positions=here + 1000)
        )
        assert moved > 1e-2 if name.endswith("slack") else moved < bound


@pytest.mark.parametrize("layout", ["mha", "gqa"])
def test_parameters_equal_the_twin_s(layout: str) -> None:
    """V1 has 6·d more, V2 h·d·d_model + h·d_model, collinear none; the combinations what their parent has."""
    heads, _ = LAYOUTS[layout]

    def count(name: str) -> int:
        return sum(p.numel() for p in make(CASES[name], layout).parameters())

    twin = count("softmax")
    assert count("differential") - twin == 6 * D
    assert count("differential_bare") - twin == 4 * D
    assert count("differential_v2") - twin == heads * D * WIDTH + heads * WIDTH
    assert count("differential_own") - twin == (heads + LAYOUTS[layout][1]) * D * WIDTH + 4 * D
    assert count("differential_v2_bias") - count("differential_v2") == heads
    assert count("dex") - twin == D * D + 1
    # A and B of rank 3 for queries and keys, and the vectors of λ.
    assert count("diff_lora") - twin == 3 * (2 * WIDTH + (heads + LAYOUTS[layout][1]) * D) + 4 * D
    assert count("softmax_head_norm") - twin == D
    assert count("collinear") == count("collinear_slack") == count("collinear_strict") == twin
    for parent in ("differential", "differential_v2"):
        for form in ("collinear", "collinear_slack", "collinear_strict"):
            assert count(f"{parent}_{form}") == count(parent)
    assert count("differential_collinear_bare") == count("differential_bare")


def test_a_context_may_have_its_own_width() -> None:
    for name in MAIN:
        module = make(CASES[name], "gqa", context_dim=6)
        x, context = rand(B, L, WIDTH, seed=1), rand(B, S, 6, seed=2)
        expected, _ = layer(spec_of(CASES[name], "gqa"), weights_digest(module), x, context)
        assert distance(module(x, context), expected) < 1e-10

"""What would run on GPUs that are not here: plans for all that a model does, and what each engine refuses."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from clearhead.core.dispatch import AttentionProblem, Engine, load_backend, plan
from clearhead.core.lowering import Lowering
from clearhead.engines import sdpa
from clearhead.engines.sdpa_kernels import is_masked, kernel_of
from clearhead.functional import attention
from tests.contracts.support import distance
from tests.gpu.device import bare, gpu, on_cuda

LENGTH = 2048
CAUSAL = frozenset({"causal"})
# As in the models: all of a row at once, or one query against a cache.
SITUATIONS: dict[str, dict[str, Any]] = {
    "training": {"needs_grad": True},
    "packed": {"needs_grad": True, "mask": CAUSAL | {"documents"}},
    "window": {"needs_grad": True, "mask": CAUSAL | {"window"}},
    "prompt": {},
    "padded prompt": {"mask": CAUSAL | {"padding"}},
    "decoding": {"queries": 1},
    "fixed cache": {"queries": 1, "ends_aligned": False},
}


def problem(form: str, situation: str, width: int = 64, capability: str = "sm_90", **changes: Any) -> Any:
    """Eight heads of V1 over four key-value heads, or as many of V2 and softmax."""
    streams, shares, wide = {"v1": (2, False, 2), "v2": (2, True, 1), "softmax": (1, True, 1)}[form]
    sizes = (streams, shares, 8, 4, LENGTH, LENGTH, width, wide * width, torch.bfloat16, "cuda", CAUSAL)
    made = AttentionProblem(*sizes, mixing="single" if streams == 1 else "difference", capability=capability)
    return replace(made, **{**SITUATIONS[situation], **changes})


# Lowering and kernel of SDPA, for V1 with heads of 64.
SDPA = {
    "training": ("FlashDiffAttn_2", "flash"),
    "packed": ("FlashDiffAttn_1", "efficient"),
    "window": ("FlashDiffAttn_1", "efficient"),
    "prompt": ("FlashDiffAttn_2", "flash"),
    "padded prompt": ("FlashDiffAttn_1", "efficient"),
    "decoding": ("FlashDiffAttn_2", "flash"),
    "fixed cache": ("FlashDiffAttn_1", "efficient"),
}


def sdpa_of(asked: AttentionProblem) -> tuple[str, str]:
    engine = load_backend("sdpa")
    assert isinstance(engine, Engine)
    lowering = engine.lowering(asked)
    assert isinstance(lowering, Lowering)
    return lowering.name, kernel_of(asked, lowering)[0]


@pytest.mark.parametrize("situation", SITUATIONS)
def test_sdpa(situation: str) -> None:
    lowering, kernel = SDPA[situation]
    assert sdpa_of(problem("v1", situation, capability="sm_80")) == (lowering, kernel)
    # Where cuDNN is asked first, and takes masks and values of their own width.
    for capability in ("sm_90", "sm_100"):
        assert sdpa_of(problem("v1", situation, capability=capability)) == (lowering, "cudnn")
    on_amd = sdpa_of(problem("v1", situation, capability="gfx942"))
    assert on_amd == ("FlashDiffAttn_2", kernel)
    # Values of 256 stay in slices: efficient attention adds them up in memory.
    assert sdpa_of(problem("v1", situation, width=128, capability="sm_80")) == ("FlashDiffAttn_2", kernel)
    assert sdpa_of(problem("v2", situation, capability="sm_80")) == ("grouped", kernel)
    assert sdpa_of(problem("softmax", situation, capability="sm_80")) == ("direct", kernel)


@pytest.mark.parametrize("situation", SITUATIONS)
def test_what_auto_takes(situation: str) -> None:
    """Nothing has been timed on a GPU, so the registered order decides: SDPA, and why not the kernels before it."""
    for form in ("v1", "v2", "softmax"):
        found = plan(problem(form, situation))
        assert found.backend.name == "sdpa"
        reasons = dict(found.refusals)
        assert reasons["cpu"] == "it runs on cpu, not on cuda"
        assert reasons["triton"] == "no GPU has timed it yet: name it to use it"
    assert plan(problem("v1", situation, needs_maps=True)).backend.name == "eager"


@pytest.mark.parametrize("situation", SITUATIONS)
def test_flex_takes_wide_values_and_every_one_of_these_masks(situation: str) -> None:
    for form, lowering in (("v1", "FlashDiffAttn_1"), ("v2", "grouped"), ("softmax", "direct")):
        found = plan(problem(form, situation), "flex").lowering
        assert found is not None and found.name == lowering
    assert plan(problem("v1", situation, mask=CAUSAL | {"alibi"})).backend.name == "flex"


FLASH = ("flash_attention_2", "flash_attention_3", "flash_attention_4")


@pytest.mark.parametrize("name", FLASH)
def test_flash_attention_through_hugging_face(name: str) -> None:
    """Values in slices: its function would cut a wider one to the query's width."""
    for situation in SITUATIONS:
        asked = problem("v1", situation)
        if situation == "fixed cache":
            reason = load_backend(name).reason_against(asked)
            assert reason == "it takes the last query for the last key, which a cache of fixed size breaks"
            continue
        found = plan(asked, name).lowering
        assert found is not None and (found.name, found.calls) == ("FlashDiffAttn_2", 4)
    for mask in ("alibi", "bias", "dense"):
        reason = load_backend(name).reason_against(problem("v1", "prompt", mask=CAUSAL | {mask}))
        assert reason == f"it cannot express a mask with {mask}"
    single = problem("v1", "prompt", dtype=torch.float32)
    assert load_backend(name).reason_against(single) == "it computes in bfloat16, float16, not in float32"


REFUSED = {
    ("flash_attention_2", "sm_75", 64): "it needs a GPU of compute capability 8.0 or higher, not 7.5",
    ("flash_attention_2", "gfx942", 64): None,
    ("flash_attention_2", "sm_100", 128): None,
    ("flash_attention_3", "sm_75", 64): "it needs a GPU of compute capability 8.0 or higher, not 7.5",
    ("flash_attention_3", "sm_90", 256): None,
    ("flash_attention_4", "sm_80", 64): "it needs a GPU of compute capability 9.0 or higher, not 8.0",
    ("flash_attention_4", "gfx942", 64): "it does not run on AMD's GPUs (gfx942)",
    ("flash_attention_4", "sm_90", 192): None,
    ("flash_attention_4", "sm_100", 192): "on sm_100 it takes heads up to 128 wide, or 256, not 192",
    ("flash_attention_4", "sm_100", 128): None,
    ("triton", "sm_75", 64): "it needs a GPU of compute capability 8.0 or higher, not 7.5",
    ("triton", "gfx942", 64): None,
    ("sdpa", "sm_75", 64): None,
}


@pytest.mark.parametrize(("name", "capability", "width"), REFUSED)
def test_gpus_and_widths(name: str, capability: str, width: int) -> None:
    asked = problem("v1", "training", width=width, capability=capability)
    assert load_backend(name).reason_against(asked) == REFUSED[name, capability, width]


KERNELS = {
    "32 bits": ({"dtype": torch.float32}, "efficient"),
    "64 bits": ({"dtype": torch.float64}, "math"),
    "an odd width": ({"mask": CAUSAL | {"window"}, "key_width": 12, "value_width": 12}, "math"),
    "an odd width without a mask": ({"key_width": 12, "value_width": 12}, "flash"),
    "wide heads": ({"key_width": 320, "value_width": 320}, "efficient"),
    "fewer queries than keys": ({"queries": 7}, "efficient"),
    "an old GPU": ({"capability": "sm_75", "dtype": torch.float16}, "efficient"),
    "an old GPU and bfloat16": ({"capability": "sm_75"}, "math"),
    "AMD": ({"capability": "gfx942", "key_width": 320, "value_width": 320}, "flash"),
    "a backward pass of 208 on sm_89": (
        {"capability": "sm_89", "key_width": 208, "value_width": 208, "needs_grad": True},
        "efficient",
    ),
    "one key, which cuDNN refuses": ({"capability": "sm_90", "queries": 1, "keys": 1}, "flash"),
}


@pytest.mark.parametrize("case", KERNELS)
def test_kernels_of_sdpa(case: str) -> None:
    changes, kernel = KERNELS[case]
    asked = problem("softmax", "prompt", capability="sm_80")
    assert sdpa_of(replace(asked, **changes))[1] == kernel


def test_what_a_reader_is_told() -> None:
    engine = load_backend("sdpa")
    assert isinstance(engine, Engine)

    def told(asked: AttentionProblem) -> str | None:
        lowering = engine.lowering(asked)
        assert isinstance(lowering, Lowering)
        return engine.remark(asked, lowering)

    assert told(problem("v1", "training", capability="sm_80")) == "in PyTorch's flash kernel"
    assert told(problem("v1", "packed", capability="sm_80")) == (
        "in PyTorch's efficient kernel under a dense mask, 2048 × 2048 (flash: it takes no mask)"
    )
    assert told(problem("softmax", "prompt", dtype=torch.float64, capability="sm_80")) == (
        "in PyTorch's math kernel, which writes out every map (flash: it computes in 16 bits only; "
        "efficient: it computes in 16 and 32 bits only)"
    )
    assert told(replace(problem("v1", "training"), device="cpu", capability=None)) is None


@pytest.mark.parametrize("changes", [{}, {"window": 5}, {"queries": 3}])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_groups_reach_a_kernel_that_knows_none(
    changes: dict[str, int], dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Only flash and cuDNN have groups: under a mask, and in 32 bits, keys are repeated before the call."""
    seen: list[tuple[int, bool, bool]] = []
    original = sdpa.F.scaled_dot_product_attention

    def noted(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Tensor:
        seen.append((k.shape[1], options["enable_gqa"], options["attn_mask"] is not None))
        return original(q, k, v, **options)

    monkeypatch.setattr(sdpa.F, "scaled_dot_product_attention", noted)
    queries = changes.get("queries", 9)
    q, k, v = (torch.randn(2, heads, n, 8).to(dtype) for heads, n in ((6, queries), (2, 9), (2, 9)))
    options = {"is_causal": True, "window": changes.get("window")}
    with gpu():
        moved = (on_cuda(x) for x in (q, k, v))
        found = bare(attention(*moved, backend="sdpa", **options))  # type: ignore[arg-type]
    masked = bool(changes)
    asked = problem("softmax", "prompt", queries=queries, keys=9)
    asked = replace(asked, mask=CAUSAL | ({"window"} if "window" in changes else set()))
    assert is_masked(asked) == masked
    repeated = masked or dtype == torch.float32
    assert seen == [(6 if repeated else 2, not repeated, masked)]
    expected = attention(q.double(), k.double(), v.double(), backend="eager", **options)  # type: ignore[arg-type]
    assert distance(found, expected) < (1e-5 if dtype == torch.float32 else 0.05)

"""What is measured on a GPU, as data. The first peer of a case is its reference."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import product

from clearhead.bench.cases import CASES, NAIVE, SAME_QUERIES, TWIN, AttentionCase, Case, TrainCase, Variant

TRITON = "clearhead triton"
TRITON_ONE = "clearhead triton, one stream"
TWIN_FLASH = "Transformer twin (SDPA, flash)"
TWIN_CUDNN = "Transformer twin (SDPA, cuDNN)"
FLEX = "FlexAttention"
FLEX_ONE = "FlexAttention, one stream"
WIDE_3, WIDE_4 = "FlashDiffAttn_1 (flash-attn 3)", "FlashDiffAttn_1 (flash-attn 4)"
# Through Hugging Face's interface, whose function takes values as wide as keys.
FLASH = tuple(
    f"{lowering} (flash_attention_{version})"
    for version in (2, 3, 4)
    for lowering in ("FlashDiffAttn_2", "FlashDiffAttn_1 padded")
)

_V1 = (
    TWIN,
    TWIN_FLASH,
    TWIN_CUDNN,
    TRITON,
    TRITON_ONE,
    "FlashDiffAttn_1",
    "FlashDiffAttn_2",
    FLEX,
    *FLASH,
    WIDE_3,
    WIDE_4,
    "DiffLlama",
)
_V2 = (SAME_QUERIES, TRITON, TRITON_ONE, "grouped (SDPA)", FLEX)
_SOFTMAX = (TWIN, TWIN_FLASH, TWIN_CUDNN, TRITON_ONE, FLEX_ONE)
# Tokens of a batch, as the authors of FlashAttention measure.
_TOKENS = 16384


def _row(
    form: str,
    variant: Variant,
    peers: tuple[str, ...],
    length: int,
    width: int,
    backward: bool,
    groups: int = 0,
) -> AttentionCase:
    heads = 8 if variant == "differential" else 16
    name = f"{form}-d{width}-{length}-{'both' if backward else 'forward'}-bfloat16"
    sizes = (heads, groups or heads, width, length, length)
    return AttentionCase(
        name, variant, peers, *sizes, True, backward, "bfloat16", max(1, _TOKENS // length), device="cuda"
    )


def _attention() -> tuple[AttentionCase, ...]:
    passes = (True, False)
    long = _row("v1-memory", "differential", _V1, 16384, 128, True)
    return (
        # The bar's cases first.
        *(
            _row("v1", "differential", _V1, length, width, backward)
            for backward, width, length in product(passes, (128, 64), (2048, 4096, 8192, 16384))
        ),
        *(_row("v2-mha", "differential_v2", _V2, 4096, width, b) for b, width in product(passes, (128, 64))),
        *(_row("v2-gqa", "differential_v2", _V2, 4096, 128, b, groups=4) for b in passes),
        *(_row("softmax", "softmax", _SOFTMAX, 4096, width, b) for b, width in product(passes, (128, 64))),
        replace(_row("v1-short", "differential", (*_V1, NAIVE), 1024, 64, True), batch=4),
        replace(long, memory=True),
    )


def _decode() -> tuple[AttentionCase, ...]:
    return tuple(
        AttentionCase(
            name=f"v1-d{width}-{keys}-batch{batch}-bfloat16",
            variant="differential",
            peers=_V1,
            heads=16,
            groups=4,
            width=width,
            queries=1,
            keys=keys,
            causal=False,
            backward=False,
            dtype="bfloat16",
            batch=batch,
            # All of them together exceed the cache, which is flushed besides.
            layers=4,
            device="cuda",
        )
        for batch, width, keys in product((8, 1), (128, 64), (8192, 32768, 65536))
    )


def _train() -> tuple[TrainCase, ...]:
    small = TrainCase(
        "v1-1024x12-2048",
        (
            "Transformer (sdpa)",
            *(f"DIFF V1 ({backend})" for backend in ("triton", "sdpa", "flex")),
            "DIFF V2 (triton)",
            "DIFF V2 (sdpa)",
            "DiffLlama (sdpa)",
        ),
        width=1024,
        layers=12,
        heads=16,
        context=2048,
        batch=4,
        vocabulary=32000,
        dtype="bfloat16",
        device="cuda",
    )
    # The sizes of the paper's 1.4B (recipes/paper/diff-1.4b.toml). Two models with AdamW's moments fill 45 GB.
    large = replace(
        small,
        name="v1-1.4b-2048",
        peers=("Transformer (sdpa)", "DIFF V1 (triton)"),
        width=2048,
        layers=24,
        batch=2,
        vocabulary=100288,
    )
    return small, large


GPU_CASES: dict[str, Sequence[Case]] = {"attention": _attention(), "decode": _decode(), "train": _train()}


def cases_on(device: str) -> Mapping[str, Sequence[Case]]:
    """The cases by verb for "cpu" or "cuda"."""
    return CASES if device == "cpu" else GPU_CASES

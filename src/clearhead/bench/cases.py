"""What is measured, as data. The first peer of a case is its reference."""

import difflib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from functools import partial
from itertools import product
from typing import Literal

Dtype = Literal["float32", "bfloat16"]
Variant = Literal["softmax", "differential", "differential_v2"]
# What a peer computes: the case's variant, or plain softmax attention with as many query heads.
Formula = Literal["variant", "softmax"]

DTYPES: tuple[Dtype, ...] = ("float32", "bfloat16")
BYTES: dict[Dtype, int] = {"float32": 4, "bfloat16": 2}

TWIN = "Transformer twin (SDPA)"
SAME_QUERIES = "SDPA, same query heads"
KERNEL = "clearhead cpu"
KERNEL_ONE = "clearhead cpu, one stream"
NAIVE = "naive maps"

GENERATING = "Transformer (sdpa)"
GENERATE_PEERS = (
    GENERATING,
    "Transformer (sdpa), growing",
    "Transformer (sdpa), static",
    "LLaMA of transformers (sdpa)",
    "DiffLlama of transformers (sdpa)",
    "Transformer",
    "Transformer, int8",
    "DIFF V1",
    "DIFF V1, copied",
    "DIFF V1, static",
    "DIFF V1, int8",
    "DIFF V1, int4",
    "DIFF V1, a quarter of the prompt",
    "DIFF V2",
    "CoCA exact",
    "CoCA exact, compact",
)

V1_PEERS = (
    TWIN,
    KERNEL,
    KERNEL_ONE,
    "FlashDiffAttn_1",
    "FlashDiffAttn_1 padded",
    "FlashDiffAttn_2",
    NAIVE,
    "DiffLlama",
)
V2_PEERS = (SAME_QUERIES, KERNEL, KERNEL_ONE, "grouped (SDPA)", NAIVE)
SOFTMAX_PEERS = (TWIN, KERNEL_ONE, NAIVE)


def attention_flops(
    pairs: float, heads: int, streams: int, key_width: int, value_width: int, *, backward: bool
) -> float:
    """Two for every multiply-add that the mechanism needs, however a peer computes it.

    A visible pair of a query and a key costs an output head with s streams, keys of width D and values of width E
    s·D + E multiply-adds forward (the scores; one product of the mixed map with the value) and 3·s·D + 2·E backward
    (the scores again, dQ and dK; dV and dP). Causal attention sees half of the pairs.
    """
    needed = streams * key_width + value_width
    if backward:
        needed += 3 * streams * key_width + 2 * value_width
    return 2.0 * pairs * heads * needed


@dataclass(frozen=True, slots=True)
class AttentionCase:
    """One attention: `heads` output heads over `groups` key-value heads, queries and keys of `width`.

    causal: queries and keys are the same tokens. With a single query nothing is hidden and causal is False.
    layers: so many attentions of this size, each with inputs of its own, are run in turn as one call, as a model's
        layers are: what one of them reads is not in the cache when its turn comes again.
    memory: the peak of one call in a process of its own is measured, not the time; on a GPU that of PyTorch's memory.
    """

    name: str
    variant: Variant
    peers: tuple[str, ...]
    heads: int
    groups: int
    width: int
    queries: int
    keys: int
    causal: bool
    backward: bool
    dtype: Dtype
    batch: int = 1
    layers: int = 1
    memory: bool = False
    device: str = "cpu"

    @property
    def streams(self) -> int:
        return 1 if self.variant == "softmax" else 2

    @property
    def key_streams(self) -> int:
        return 2 if self.variant == "differential" else 1

    @property
    def value_width(self) -> int:
        return self.key_streams * self.width

    @property
    def title(self) -> str:
        """The case in words."""
        names = {
            "softmax": "softmax attention",
            "differential": "DIFF V1",
            "differential_v2": "DIFF V2",
        }
        tokens = (
            f"{self.keys} tokens" if self.queries == self.keys else f"{self.queries} of {self.keys} tokens"
        )
        parts = [
            names[self.variant],
            f"{'peak memory of ' if self.memory else ''}{'forward and backward' if self.backward else 'forward'}",
            self.dtype,
            f"batch {self.batch}, {self.heads} heads, {self.groups} key-value heads, width {self.width}",
            f"{tokens}{', causal' if self.causal else ''}",
            *([f"{self.layers} layers in turn"] if self.layers > 1 else []),
        ]
        return ", ".join(parts)

    @property
    def key_value_bytes(self) -> int:
        """Bytes of all keys and values."""
        numbers = self.key_streams * self.width + self.value_width
        return self.layers * self.batch * self.groups * self.keys * numbers * BYTES[self.dtype]

    def flops(self, formula: Formula) -> float:
        """What a peer of that formula has to compute, see `attention_flops`."""
        pairs = self.layers * self.batch * self.queries * self.keys / (2 if self.causal else 1)
        if formula == "softmax":
            return attention_flops(
                pairs, self.streams * self.heads, 1, self.width, self.width, backward=self.backward
            )
        return attention_flops(
            pairs, self.heads, self.streams, self.width, self.value_width, backward=self.backward
        )

    def of_length(self, length: int) -> "AttentionCase":
        """The same case over at most `length` tokens."""
        queries = self.queries if self.queries == 1 else min(length, self.queries)
        return replace(self, queries=queries, keys=min(length, self.keys))


@dataclass(frozen=True, slots=True)
class TrainCase:
    """One training step (forward, loss, backward, AdamW) of models that differ in their attention alone.

    heads counts as for the Transformer twin; the head width is width / heads.
    """

    name: str
    peers: tuple[str, ...]
    width: int
    layers: int
    heads: int
    context: int
    batch: int
    vocabulary: int
    dtype: Dtype = "float32"
    device: str = "cpu"

    @property
    def title(self) -> str:
        """The case in words."""
        return (
            f"training step, {self.dtype}, width {self.width}, {self.layers} layers, {self.heads} heads, "
            f"{self.batch} × {self.context} tokens, vocabulary {self.vocabulary}"
        )


@dataclass(frozen=True, slots=True)
class GenerateCase:
    """Greedy text of a whole model behind prompts of `context` tokens: time to the first token, and of each later one.

    heads and groups (key-value heads) count as for the Transformer twin; the head width is width / heads.
    prefills: times that every peer reads the prompts, in turn.
    by_default: False for what takes longer than a first look: it is measured where its name is asked for.
    """

    name: str
    peers: tuple[str, ...]
    width: int
    layers: int
    heads: int
    groups: int
    context: int
    batch: int
    vocabulary: int
    prefills: int
    dtype: Dtype = "float32"
    by_default: bool = False
    device: str = "cpu"

    @property
    def title(self) -> str:
        """The case in words."""
        return (
            f"generation, {self.dtype}, width {self.width}, {self.layers} layers, {self.heads} heads, {self.groups} "
            f"key-value heads, behind {self.batch} × {self.context} tokens, vocabulary {self.vocabulary}"
        )


Case = AttentionCase | TrainCase | GenerateCase


def _self_attention(
    prefix: str,
    length: int,
    causal: bool,
    backward: bool,
    dtype: Dtype,
    *,
    variant: Variant,
    peers: tuple[str, ...],
    heads: int,
    groups: int,
    width: int = 64,
    batch: int = 1,
) -> AttentionCase:
    name = f"{prefix}-{length}-{'causal' if causal else 'full'}-{'both' if backward else 'forward'}-{dtype}"
    return AttentionCase(
        name, variant, peers, heads, groups, width, length, length, causal, backward, dtype, batch
    )


def _attention() -> tuple[AttentionCase, ...]:
    v1 = partial(_self_attention, variant="differential", peers=V1_PEERS)
    v2 = partial(_self_attention, variant="differential_v2", peers=V2_PEERS, heads=16)
    one = partial(_self_attention, variant="softmax", peers=SOFTMAX_PEERS, heads=16, groups=16)
    passes = (True, False)
    long = v1("v1-memory", 16384, True, True, "float32", heads=8, groups=8)
    return (
        *(
            v1("v1", length, causal, backward, dtype, heads=8, groups=8)
            for length, causal, backward, dtype in product((1024, 2048, 4096), (True, False), passes, DTYPES)
        ),
        *(
            v2("v2-mha", 2048, True, backward, dtype, groups=16)
            for backward, dtype in product(passes, DTYPES)
        ),
        *(v2("v2-gqa", 2048, True, backward, dtype, groups=4) for backward, dtype in product(passes, DTYPES)),
        *(one("softmax", 2048, True, backward, dtype) for backward, dtype in product(passes, DTYPES)),
        v1("v1-small", 256, True, True, "float32", heads=4, groups=4, width=32, batch=8),
        replace(long, memory=True),
    )


def _decode() -> tuple[AttentionCase, ...]:
    return tuple(
        AttentionCase(
            name=f"v1-8192-batch{batch}-{dtype}",
            variant="differential",
            peers=V1_PEERS,
            heads=8,
            groups=2,
            width=64,
            queries=1,
            keys=8192,
            causal=False,
            backward=False,
            dtype=dtype,
            batch=batch,
            layers=8 // batch,
        )
        for batch, dtype in product((1, 8), DTYPES)
    )


def _train() -> tuple[TrainCase, ...]:
    reference = "Transformer (sdpa)"
    peers = {
        "v1": (
            reference,
            "Transformer (cpu)",
            *(f"DIFF V1 ({backend})" for backend in ("cpu", "sdpa", "eager", "flex")),
            "DiffLlama (sdpa)",
        ),
        "v2": (reference, *(f"DIFF V2 ({backend})" for backend in ("cpu", "sdpa", "eager"))),
        "coca": (reference, "CoCA exact (cpu)", "CoCA exact (sdpa)", "CoCA slack (sdpa)"),
    }
    return tuple(
        TrainCase(
            f"{name}-512x6-2048", found, width=512, layers=6, heads=8, context=2048, batch=1, vocabulary=8192
        )
        for name, found in peers.items()
    )


def _generate() -> tuple[GenerateCase, ...]:
    def one(context: int, batch: int, dtype: Dtype = "float32", groups: int = 8) -> GenerateCase:
        form = "" if groups == 8 else f"gqa{8 // groups}-"
        read = context * batch
        return GenerateCase(
            f"512x6-{form}{context}-batch{batch}-{dtype}",
            GENERATE_PEERS,
            width=512,
            layers=6,
            heads=8,
            groups=groups,
            context=context,
            batch=batch,
            vocabulary=8192,
            prefills=3 if read <= 2048 else 2 if read <= 4096 else 1,
            dtype=dtype,
            by_default=context == 1024,
        )

    return (
        *(one(context, batch) for context, batch in product((1024, 2048, 4096, 8192, 16384, 32768), (1, 8))),
        one(8192, 1, groups=2),
        one(8192, 1, "bfloat16"),
    )


CASES: dict[str, Sequence[Case]] = {
    "attention": _attention(),
    "decode": _decode(),
    "train": _train(),
    "generate": _generate(),
}


def select(verb: str, patterns: Sequence[str], among: Mapping[str, Sequence[Case]] = CASES) -> list[Case]:
    """The cases of `verb` whose names match any of `patterns` (all without patterns), in their order.

    among: the cases by verb, those of a CPU or of a GPU.

    ValueError for a pattern that matches nothing, with the nearest name.
    """
    cases = among[verb]
    names = [case.name for case in cases]
    for pattern in patterns:
        if not any(fnmatchcase(name, pattern) for name in names):
            (near,) = difflib.get_close_matches(pattern, names, n=1, cutoff=0.0)
            raise ValueError(
                f"no {verb} case matches {pattern!r}: the nearest is {near!r} (--list shows all)"
            )
    return [case for case in cases if not patterns or any(fnmatchcase(case.name, p) for p in patterns)]


def default(case: Case) -> bool:
    """Whether it is measured without being asked for by name."""
    return not isinstance(case, GenerateCase) or case.by_default

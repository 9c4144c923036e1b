"""Cases small enough for a test."""

from dataclasses import replace

from clearhead.bench.cases import CASES, AttentionCase, Case, GenerateCase, TrainCase, select


def attention(origin: str, verb: str = "attention", /, **changes: object) -> AttentionCase:
    """The case `origin` with two heads of width 8 over 24 tokens, unless `changes` says otherwise."""
    (case,) = select(verb, [origin])
    assert isinstance(case, AttentionCase)
    keys = changes.pop("keys", 24)
    sizes = {"heads": 2, "groups": 2, "width": 8, "keys": keys}
    sizes["queries"] = 1 if case.queries == 1 else keys
    return replace(case, **{**sizes, **changes})  # type: ignore[arg-type]


def train(**changes: object) -> TrainCase:
    """The first training case as one narrow layer."""
    case = CASES["train"][0]
    assert isinstance(case, TrainCase)
    sizes = {"width": 16, "layers": 1, "heads": 2, "context": 12, "vocabulary": 20}
    return replace(case, **{**sizes, **changes})  # type: ignore[arg-type]


def generate(**changes: object) -> GenerateCase:
    """The first case of generation as one narrow layer, its prompt long enough for codes."""
    case = CASES["generate"][0]
    assert isinstance(case, GenerateCase)
    sizes = {"width": 32, "layers": 1, "heads": 4, "groups": 4, "context": 192, "vocabulary": 20}
    return replace(case, **{**sizes, **changes})  # type: ignore[arg-type]


V1 = attention("v1-1024-causal-both-float32", name="tiny-v1")
MEMORY = attention("v1-memory-*", name="tiny-memory", peers=V1.peers[:3:2], keys=32)
TINY: dict[str, tuple[Case, ...]] = {
    "attention": (V1, MEMORY),
    "decode": (attention("v1-8192-batch1-bfloat16", "decode", name="tiny-decode", groups=1),),
    "train": (train(name="tiny-train"),),
    "generate": (
        generate(name="tiny-generate"),
        generate(name="tiny-later", by_default=False, peers=CASES["generate"][0].peers[:2]),
    ),
}

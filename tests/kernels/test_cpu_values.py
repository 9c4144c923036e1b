"""The CPU kernel's output and gradients against the float64 oracles, in every form and on every instruction set."""

from dataclasses import replace

import pytest
import torch

from clearhead.core.masks import MaskSpec
from clearhead.core.streams import Streams, split_heads
from clearhead.functional import attention, differential_attention
from clearhead.kernels import ops
from clearhead.kernels.cpu.kernel import Cpu
from tests.kernels.support import (
    DTYPES,
    LAYOUTS,
    Case,
    answers,
    assert_right,
    every_set,
    make_inputs,
    op_of,
    solve,
)

# More rows to a group than fit one chunk, and a chunk with rows of two heads.
V2 = Case(queries=33, keys=33)
V1 = replace(V2, own_keys=True, value_width=32)
ONE = replace(V2, streams=1)
FORMS = {"softmax": ONE, "v2": V2, "v1": V1}
HEADS = {"mha": (4, 4), "gqa": (4, 2), "mqa": (4, 1), "one": (1, 1)}
# One head of one sequence: what lengths around the blocks of 64 queries and 128 keys need.
ALONE = Case(batch=1, heads=1, groups=1)

CASES: dict[str, Case] = {
    f"{form}-{layout}": replace(case, heads=heads, groups=groups, causal=True)
    for form, case in FORMS.items()
    for layout, (heads, groups) in HEADS.items()
}
CASES |= {f"v1-narrow-{w}": replace(V1, value_width=w) for w in (1, 8, 16)}
OWN = replace(V1, value_width=V1.width)
CASES |= {
    f"own width-{layout}": replace(OWN, heads=heads, groups=groups, causal=True)
    for layout, (heads, groups) in HEADS.items()
}
CASES |= {f"lambda {lam}": replace(V2, lam=lam) for lam in (-0.3, 0.0, 0.8, 1.7, "call", "head", "token")}

MASKS: dict[str, dict[str, object]] = {
    "none": {},
    "causal, more keys": {"causal": True, "keys": 50},
    "no mask, fewer keys": {"keys": 9},
    "padding": {"hidden": ("padding",)},
    "causal padding": {"causal": True, "hidden": ("padding",)},
    "shared padding": {"causal": True, "hidden": ("shared padding",), "keys": 40},
    "documents": {"hidden": ("documents",)},
    "causal documents": {"causal": True, "hidden": ("documents",)},
    "shared documents and padding": {"hidden": ("shared documents", "padding"), "keys": 41},
    "shared both": {"causal": True, "hidden": ("shared documents", "shared padding")},
    "window": {"causal": True, "window": 7},
    "window of one": {"causal": True, "window": 1},
    "window of two": {"window": 2, "keys": 40},
    "window both ways": {"window": 9},
    "everything": {"causal": True, "window": 20, "hidden": ("documents", "padding"), "keys": 140},
    "everything both ways": {"window": 30, "hidden": ("documents", "shared padding"), "keys": 150},
}
CASES |= {f"v2 {name}": replace(V2, **changes) for name, changes in MASKS.items()}  # type: ignore[arg-type]
CASES |= {
    f"{form} {name}": replace(FORMS[form], **MASKS[name])  # type: ignore[arg-type]
    for form in ("softmax", "v1")
    for name in ("causal padding", "everything")
}

DECODING = Case(heads=8, groups=2, keys=150, causal=True, width=32, value_width=32)
CASES |= {
    f"own width, {n} new tokens": replace(DECODING, streams=2, own_keys=True, queries=n) for n in (1, 5)
}
CASES |= {f"{n} new tokens": replace(DECODING, queries=n) for n in range(1, 9)}
CASES |= {
    "decoding, many keys": replace(DECODING, queries=1, keys=700, groups=1),
    "decoding, padding": replace(DECODING, queries=1, keys=300, hidden=("padding",)),
    "decoding, window": replace(DECODING, queries=3, keys=300, window=100, own_keys=True, value_width=64),
    "decoding, documents": replace(DECODING, queries=2, hidden=("documents",), streams=1),
}

# One or two rows to a group, which read keys and values as they lie when no gradient will follow.
FEW = Case(heads=2, groups=2, queries=1, keys=150, causal=True)
CASES |= {
    f"few rows, {name}": replace(FEW, **changes)  # type: ignore[arg-type]
    for name, changes in {
        "one": {},
        "two tokens": {"queries": 2},
        "two heads": {"heads": 4, "own_keys": True, "value_width": 32},
        "one stream": {"streams": 1, "heads": 4, "width": 128, "value_width": 128},
        "padding": {"hidden": ("padding",), "queries": 2},
        "documents": {"hidden": ("documents", "shared padding"), "heads": 4, "causal": False},
        "window": {"window": 40, "queries": 2, "own_keys": True},
        "one key": {"keys": 1},
        "few keys": {"keys": 33, "scale": -0.5, "lam": "head"},
        "width outside": {"layout": "width outside", "queries": 2},
        "slice": {"layout": "slice", "own_keys": True},
        "large logits": {"spread": 10.0, "keys": 300},
    }.items()
}
CASES |= {
    f"few rows, width {d} and {e}": replace(FEW, width=d, value_width=e, heads=4, keys=70)
    for d, e in ((1, 1), (7, 33), (33, 7), (80, 200), (256, 130), (512, 512))
}

CASES |= {
    f"width {d} and {e}": replace(V2, batch=1, queries=20, keys=20, groups=1, width=d, value_width=e)
    for d, e in (
        (7, 7),
        (33, 16),
        (80, 33),
        (64, 128),
        (128, 80),
        (256, 256),
        (17, 512),
        (512, 16),
        (1, 1),
        (2, 3),
    )
}
LENGTHS = (
    (63, 63),
    (64, 64),
    (65, 65),
    (127, 127),
    (128, 128),
    (129, 129),
    (300, 300),
    (65, 257),
    (129, 128),
)
CASES |= {
    f"{queries} by {keys}": replace(
        ALONE,
        queries=queries,
        keys=keys,
        streams=1 + (i % 2),
        own_keys=i % 4 == 1,
        causal=queries <= keys and i % 3 > 0,
    )
    for i, (queries, keys) in enumerate(LENGTHS)
}
CASES["130 by 300, two heads, window"] = replace(
    ALONE, queries=130, keys=300, heads=2, window=70, causal=True
)
CASES |= {f"scale {scale}": replace(V2, scale=scale) for scale in (0.0, -0.3, 2.0, 1e-4)}
CASES |= {f"logits to {3 * spread:.0f}": replace(V2, spread=spread) for spread in (10.0, 100.0)}
CASES |= {
    f"{form}, {layout}": replace(FORMS[form], queries=20, layout=layout, causal=True, hidden=("documents",))
    for layout in LAYOUTS
    for form in (("softmax", "v1") if layout != "dense" else ())
}


@every_set
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", CASES)
def test_values_and_gradients(name: str, dtype: str, isa: str) -> None:
    case, precision = CASES[name], DTYPES[dtype]
    solution = solve(case, precision)
    for grad in (True, False):
        found = answers(op_of(case, "cpu"), solution.inputs, precision, case.layout, grad)
        assert_right(found, solution, precision)


@every_set
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "name", ["v1-gqa", "v2 causal padding", "v2 everything", "1 new tokens", "lambda call", "scale -0.3"]
)
def test_the_second_stream_s_output_need_not_be_kept(
    name: str, dtype: str, isa: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where it would be large, the backward pass does without it."""
    monkeypatch.setattr(ops, "MOST_NOISE", 0)
    case, precision = CASES[name], DTYPES[dtype]
    solution = solve(case, precision)
    assert_right(answers(op_of(case, "cpu"), solution.inputs, precision, "model"), solution, precision)


@every_set
@pytest.mark.parametrize("dtype", DTYPES)
def test_streams_side_by_side(dtype: str, isa: str) -> None:
    """Streams that are halves of one projection, keys of a cache that packs them: the same numbers, bit by bit."""
    q, k, v, gate = (x.to(DTYPES[dtype]) for x in make_inputs(V1, DTYPES[dtype]).tensors)
    pairs = q.unflatten(1, (-1, 2))
    packed = torch.cat(pairs.unbind(2), -1).transpose(1, 2).flatten(2)
    streams = split_heads(packed, V1.heads).chunk(2, -1)
    keys = torch.cat(k.unflatten(1, (-1, 2)).unbind(2), -1)
    heads = Streams(streams, keys.chunk(2, -1), v, gate)
    found = Cpu().run(heads, MaskSpec(is_causal=True), V1.width**-0.5)
    assert torch.equal(found, differential_attention(q, k, v, gate, is_causal=True, backend="cpu"))


@every_set
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("form", FORMS)
def test_a_gradient_that_is_one_number_for_all(form: str, dtype: str, isa: str) -> None:
    case = FORMS[form]
    inputs = make_inputs(case, DTYPES[dtype])
    results = []
    for spread in (torch.Tensor.expand, lambda x, shape: x.repeat(shape)):
        leaves = [x.to(DTYPES[dtype]).requires_grad_() for x in inputs.tensors]
        out = op_of(case, "cpu")(*leaves)
        one = torch.ones((1, 1, 1, 1), dtype=out.dtype)
        results.append(torch.autograd.grad(out, leaves, spread(one, out.shape)))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@every_set
def test_only_what_is_asked_for_gets_a_gradient(isa: str) -> None:
    inputs = make_inputs(V1, torch.float32)
    every = answers(op_of(V1, "cpu"), inputs, torch.float32, "dense")[1:]
    for i in range(4):
        leaves = [x.float().requires_grad_(i == j) for j, x in enumerate(inputs.tensors)]
        op_of(V1, "cpu")(*leaves).backward(inputs.cotangent.float())
        assert [leaf.grad is not None for leaf in leaves] == [i == j for j in range(4)]
        assert torch.equal(leaves[i].grad.double(), every[i])  # type: ignore[union-attr]


@every_set
@pytest.mark.parametrize("window", [10**6, 2**40, 2**62, 2**63 - 1])
def test_a_window_wider_than_everything_is_none(window: int, isa: str) -> None:
    q, k, v = (x.float() for x in make_inputs(ONE, torch.float32).tensors)
    for causal in (False, True):
        plain = attention(q, k, v, is_causal=causal, backend="cpu")
        assert torch.equal(plain, attention(q, k, v, is_causal=causal, window=window, backend="cpu"))

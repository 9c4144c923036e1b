"""Decoding on the Triton kernels against keys that are held at half their width and turned as they are read."""

from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch import Tensor

from clearhead.core.attend import attend, difference, prepare, problem_of, single
from clearhead.core.dispatch import load_backend
from clearhead.core.masks import MaskSpec
from clearhead.core.streams import Streams
from clearhead.core.values import moved
from clearhead.kernels.triton import launch
from clearhead.nn.projections import ProjectedAttention
from tests.contracts.model_cases import left_padded, make_model, tokens
from tests.contracts.support import distance
from tests.kernels.plain import attention as plain_attention
from tests.oracles import differential, softmax

# query heads, key-value heads, queries, keys, D, E
SHAPES = {
    "grouped": (8, 2, 1, 70, 32, 64),
    "multi-head, three queries": (2, 2, 3, 36, 16, 16),
    "multi-query": (4, 1, 2, 37, 32, 32),
    "one key": (6, 2, 1, 1, 12, 20),
    "wide": (2, 1, 1, 20, 128, 32),
}
FORMS = {"one stream": (1, True), "own keys": (2, False), "shared keys": (2, True)}


def heads_of(
    shape: tuple[int, ...], form: str, dtype: torch.dtype, batch: int = 2, tables: int | None = None
) -> Streams:
    (count, groups, queries, keys, width, value), (streams, shared) = shape, FORMS[form]
    rng = torch.Generator().manual_seed(sum(shape) + streams)

    def some(*size: int) -> Tensor:
        return torch.randn(size, generator=rng)

    gate = torch.rand(batch, count, queries, 1, generator=rng) if streams == 2 else None
    return Streams(
        tuple(some(batch, count, queries, width).to(dtype) for _ in range(streams)),
        tuple(some(batch, groups, keys, width // 2).to(dtype) for _ in range(1 if shared else streams)),
        some(batch, groups, keys, value).to(dtype),
        gate,
        some(batch if tables is None else tables, keys, width),
    )


def run(heads: Streams, mask: MaskSpec, backend: str = "triton") -> Tensor:
    mix = single if len(heads.q) == 1 else difference
    problem = problem_of(heads, mask, mix.__name__)  # type: ignore[arg-type]
    return attend(heads, prepare((load_backend(backend),), problem, mask, False), 0.3, mix)[0]


def masks_of(shape: tuple[int, ...], batch: int) -> dict[str, MaskSpec]:
    keys = shape[3]
    padding = torch.ones(batch, keys, dtype=torch.bool)
    padding[0, : keys // 3] = False
    shifted = torch.tensor(max(0, keys - shape[2] - 5))
    return {
        "causal": MaskSpec(is_causal=True),
        "padded": MaskSpec(is_causal=True, key_padding=padding),
        "window": MaskSpec(is_causal=True, window=max(1, keys // 2)),
        "shifted": MaskSpec(is_causal=True, offset=shifted),
        "shifted, padded, window": MaskSpec(is_causal=True, key_padding=padding, offset=shifted, window=9),
    }


MASKS = tuple(masks_of(SHAPES["grouped"], 2))


def expected(heads: Streams, mask: MaskSpec, exact: bool) -> Tensor:
    """The oracle's answer in float64, or plain arithmetic's in the heads' own type, of the keys multiplied out."""
    assert heads.table is not None

    def typed(x: Tensor) -> Tensor:
        return x.double() if exact else x

    halves = heads.table.double()[:, None].chunk(2, dim=-1)
    keys = [torch.cat([k.double() * half for half in halves], -1) for k in heads.k]
    together = torch.stack(keys, 2).flatten(1, 2)
    q, v = torch.stack(heads.q, 2).flatten(1, 2), typed(heads.v)
    seen = mask.materialise(q.shape[2], v.shape[2], torch.float32, v.device)
    allowed = seen.expand(q.shape[0], -1, -1, -1)
    lam = () if heads.gate is None else (typed(heads.gate),)
    if not exact:
        return plain_attention(q, together.to(q.dtype), v, *lam, allowed=allowed, scale=0.3)
    oracle: Any = differential.differential_attention if lam else softmax.attention
    out: Tensor = oracle(typed(q), together, v, *lam, allowed=allowed, scale=0.3)
    return out


@dataclass(frozen=True)
class Held:
    """A problem of held keys, by its names."""

    shape: str
    form: str
    mask: str


@torch.no_grad()
def assert_as_right_as_plain(held: Held, dtype: torch.dtype, device: str = "cpu") -> None:
    """At most twice as far off the float64 oracle as plain arithmetic in `dtype`, give or take its ε."""
    shape, where = SHAPES[held.shape], torch.device(device)
    heads, mask = heads_of(shape, held.form, dtype), masks_of(shape, 2)[held.mask]
    right = expected(heads, mask, True)
    own = float((expected(heads, mask, False).double() - right).norm())
    found = run(moved(heads, where), moved(mask, where)).to("cpu")
    error, allowed = (
        float((found.double() - right).norm()),
        2 * own + torch.finfo(dtype).eps * float(right.norm()),
    )
    assert error <= allowed, f"{held}: {error:.2e} off, over {allowed:.2e}"


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("shape", SHAPES)
def test_it_is_as_right_as_plain_attention_over_whole_keys(shape: str, form: str) -> None:
    for name in MASKS:
        assert_as_right_as_plain(Held(shape, form, name), torch.float32)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])
@pytest.mark.parametrize("form", FORMS)
def test_in_half_precision(form: str, dtype: torch.dtype) -> None:
    for name in ("causal", "shifted, padded, window"):
        assert_as_right_as_plain(Held("grouped", form, name), dtype)


@torch.no_grad()
def test_no_key_is_made_whole_outside_the_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    heads = heads_of(SHAPES["grouped"], "own keys", torch.float32)
    right, seen = expected(heads, MaskSpec(is_causal=True), True), []

    def expanded(self: Streams) -> Streams:
        raise AssertionError("the keys were expanded")

    original = launch.forward
    monkeypatch.setattr(Streams, "expanded", expanded)
    monkeypatch.setattr(
        launch, "forward", lambda inputs, *rest: (seen.append(inputs), original(inputs, *rest))[1]
    )
    for processors in (1, 40):
        monkeypatch.setattr(launch, "_INTERPRETED_PROCESSORS", processors)
        torch.testing.assert_close(run(heads, MaskSpec(is_causal=True)).double(), right, atol=2e-6, rtol=2e-5)
    assert all(inputs.k1.shape[3] == inputs.q1.shape[3] // 2 for inputs in seen) and len(seen) == 2


@torch.no_grad()
def test_one_table_serves_the_whole_batch() -> None:
    heads = heads_of(SHAPES["multi-query"], "own keys", torch.float32, 3, 1)
    mask = MaskSpec(is_causal=True)
    assert heads.table is not None
    repeated = replace(heads, table=heads.table.expand(3, -1, -1).contiguous())
    assert torch.equal(run(heads, mask), run(repeated, mask))
    torch.testing.assert_close(run(heads, mask).double(), expected(heads, mask, True), atol=2e-6, rtol=2e-5)


def test_many_rows_and_gradients_take_whole_keys() -> None:
    for shape in ((8, 1, 9, 40, 16, 16), (2, 2, 1, 40, 16, 16)):
        heads = heads_of(shape, "one stream", torch.float32, 1)
        heads = replace(heads, k=(heads.k[0].requires_grad_(),))
        mask = MaskSpec(is_causal=True)
        found, right = run(heads, mask), run(heads, mask, "eager")
        torch.testing.assert_close(found, right, atol=2e-6, rtol=2e-5)
        found, right = (torch.autograd.grad(x.square().sum(), heads.k)[0] for x in (found, right))
        torch.testing.assert_close(found, right, atol=2e-5, rtol=2e-4)
        with torch.no_grad():
            torch.testing.assert_close(run(heads, mask), run(heads, mask, "eager"), atol=2e-6, rtol=2e-5)


@torch.no_grad()
def test_a_hidden_key_and_its_place_may_hold_nan() -> None:
    heads, keys = heads_of(SHAPES["grouped"], "own keys", torch.float32), SHAPES["grouped"][3]
    padding = torch.ones(2, keys, dtype=torch.bool)
    padding[0, :20] = False
    mask = MaskSpec(is_causal=True, key_padding=padding)
    before = run(heads, mask)
    assert heads.table is not None
    for x in (*heads.k, heads.v):
        x[0, :, :20] = float("nan")
    heads.table[0, :20] = float("nan")
    assert torch.equal(run(heads, mask), before)


@torch.no_grad()
def test_it_compiles() -> None:
    torch._dynamo.reset()
    heads, mask = heads_of(SHAPES["grouped"], "own keys", torch.float32), MaskSpec(is_causal=True)
    compiled = torch.compile(lambda h: run(h, mask), backend="aot_eager", fullgraph=True)
    assert torch.equal(compiled(heads), run(heads, mask))


def test_an_operator_with_a_table_has_no_gradient() -> None:
    q, k, v = torch.randn(1, 2, 1, 16, requires_grad=True), torch.randn(1, 1, 5, 8), torch.randn(1, 1, 5, 16)
    nothing = (None,) * 4
    numbers = (4, 0, True, 0.25, 0.0, 1.0, False, True)
    with pytest.raises(RuntimeError, match="half their width"):
        torch.ops.clearhead.triton_attention(
            q, None, k, None, v, None, *nothing, torch.randn(1, 5, 16), None, *numbers
        )


MODELS = ("collinear", "collinear_slack", "differential_collinear", "differential_v2_collinear")


@pytest.mark.parametrize(
    ("name", "cache"), [*((name, "dynamic") for name in MODELS), *((name, "static") for name in MODELS[1:3])]
)
@torch.no_grad()
def test_generation(name: str, cache: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Compact caches on the kernel: the tokens and logits of eager attention with whole keys."""
    ids, mask = left_padded([tokens(1, length, seed=length)[0] for length in (3, 11)])
    options: dict[str, Any] = {"max_new_tokens": 3, "do_sample": False, "cache_implementation": cache}
    options |= {"attention_mask": mask, "return_dict_in_generate": True, "output_logits": True}
    results, rows = [], []
    combine = ProjectedAttention.combine
    monkeypatch.setattr(
        ProjectedAttention,
        "combine",
        lambda self, heads, *rest: (rows.append(heads.table is not None), combine(self, heads, *rest))[1],
    )
    for way, compact in (("triton", True), ("eager", False)):
        model = make_model(name, initializer_range=0.1, num_hidden_layers=1, compact_cache=compact)
        model.set_attn_implementation(way)
        results.append(model.generate(ids, **options))
    found, right = results
    assert rows == [True] * 3 + [False] * 3
    assert torch.equal(found.sequences, right.sequences)
    assert max(distance(a, b) for a, b in zip(found.logits, right.logits, strict=True)) < 1e-4

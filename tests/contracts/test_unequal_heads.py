"""Streams with different numbers of heads: grouped differential attention against its float64 oracle, everywhere."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache

from clearhead.core.attend import MIXES, attend, prepare, problem_of
from clearhead.core.dispatch import AttentionProblem, Caps, Kernel, choose, load_backend
from clearhead.core.masks import MaskSpec
from clearhead.core.streams import HeadShape, Streams, Widths
from clearhead.engines.eager import Eager
from clearhead.evals.internals.activation_outliers import visible_logits
from clearhead.evals.internals.initial_angles import measured
from clearhead.evals.probing.recorder import Recorded, recorded
from clearhead.models import ClearheadConfig, ClearheadForCausalLM
from clearhead.models.cost import forward_flops_per_token, kv_bytes_per_token
from clearhead.nn import Attention
from clearhead.registry import VARIANTS
from tests.contracts.grouped_differential import GroupedDifferential
from tests.contracts.support import distances, rand
from tests.oracles.differential import differential_map
from tests.oracles.grouped_differential import grouped_differential
from tests.oracles.layers import heads_of
from tests.oracles.rotary import rotate

NAME = "grouped"
B, L, D, WIDTH = 2, 6, 4, 10
# (signal heads, key-value heads, ratio): 6 signal heads, 2 or 6 noise heads, and one key-value head for all.
LAYOUTS = {"gqa": (6, 2, 3), "mqa": (4, 1, 4), "mha_noise": (6, 3, 2)}
OPTIONS: dict[str, dict[str, Any]] = {
    "shared": {},
    "shared_wide": {"wide": True},
    "own": {"own_keys": True},
    "own_wide": {"own_keys": True, "wide": True},
}
PADDING = torch.tensor([[False, True, True, True, True, True], [True, True, True, True, True, False]])
DOCUMENTS = torch.tensor([[0, 0, 1, 1, 1, 1], [4, 4, 4, 2, 2, 2]])
SEEN = torch.rand(L, L, generator=torch.Generator().manual_seed(3)) < 0.5
CALLS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "full": ({}, {}),
    "causal": ({"is_causal": True}, {"causal": True}),
    "padding": (
        {"is_causal": True, "key_padding_mask": PADDING},
        {"causal": True, "key_padding": PADDING},
    ),
    "documents": ({"is_causal": True, "documents": DOCUMENTS}, {"causal": True, "documents": DOCUMENTS}),
    "window": ({"is_causal": True, "window": 2}, {"causal": True, "window": 2}),
    "dense": ({"attn_mask": SEEN}, {"allowed": SEEN}),
}


@pytest.fixture(autouse=True)
def registered(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setitem(VARIANTS, NAME, f"{GroupedDifferential.__module__}:GroupedDifferential")
    yield


def make(layout: str, options: str, backend: str = "auto", **arguments: Any) -> Attention:
    heads, groups, ratio = LAYOUTS[layout]
    torch.manual_seed(5)
    layer = Attention(
        WIDTH,
        heads,
        variant=NAME,
        num_kv_heads=groups,
        head_dim=D,
        backend=backend,
        ratio=ratio,
        **OPTIONS[options],
        **arguments,
    ).double()
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.copy_(0.8 * torch.randn_like(parameter))
    return layer


def expected(
    layer: Attention, layout: str, x: Tensor, weights: dict[str, Tensor], **arguments: Any
) -> tuple[Tensor, Tensor]:
    heads, groups, ratio = LAYOUTS[layout]
    sizes = {"signal_heads": heads, "noise_heads": heads // ratio, "groups": groups, "width": D}
    return grouped_differential(weights, x, **sizes, **arguments)


def weights_digest(layer: Attention) -> dict[str, Tensor]:
    return {
        name.removeprefix("variant.").removesuffix(".weight"): p.detach().clone().requires_grad_()
        for name, p in layer.named_parameters()
    }


def compare(layer: Attention, layout: str, call: str) -> None:
    """Output, and the gradients of the input and of every parameter."""
    arguments, oracle_arguments = CALLS[call]
    x, weights = rand(B, L, WIDTH, seed=1).requires_grad_(), weights_digest(layer)
    out = layer(x, **arguments)
    wanted, _ = expected(layer, layout, x, weights, **oracle_arguments)
    cotangent = rand(*out.shape, seed=2)
    found = torch.autograd.grad(out, [x, *layer.parameters()], cotangent)
    oracle = torch.autograd.grad(wanted, [x, *weights.values()], cotangent)
    assert max(distances((out, *found), (wanted, *oracle))) < 1e-11


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("backend", ["eager", "sdpa"])
def test_layer(backend: str, options: str, call: str) -> None:
    compare(make("gqa", options, backend), "gqa", call)


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("layout", ["mqa", "mha_noise"])
def test_layouts(layout: str, options: str) -> None:
    compare(make(layout, options), layout, "causal")


def test_the_oracle_with_equal_heads_is_that_of_differential_attention() -> None:
    """With as many noise heads as signal heads the map is `differential_map`'s, which was written apart from it."""
    x = rand(B, L, WIDTH, seed=1)
    sizes = {"signal_heads": 4, "noise_heads": 4, "groups": 2, "width": D}
    weights = {n: rand(8 * D, WIDTH, seed=i) for i, n in enumerate(("q_proj", "o_proj"))}
    weights |= {"v_proj": rand(2 * D, WIDTH, seed=3), "k_proj": rand(4 * D, WIDTH, seed=4)}
    weights |= {"lam": rand(4, seed=5), "o_proj": rand(WIDTH, 4 * D, seed=6)}
    _, found = grouped_differential(weights, x, causal=True, **sizes)
    q, k = (rotate(heads_of(x, weights[n], D), torch.arange(L)) for n in ("q_proj", "k_proj"))
    q, k = q[:, [0, 4, 1, 5, 2, 6, 3, 7]], k[:, [0, 2, 1, 3]]
    assert (
        distances([found], [differential_map(q, k, 2, weights["lam"][None, :, None, None], causal=True)])[0]
        < 1e-13
    )


@pytest.mark.parametrize("options", OPTIONS)
def test_the_effective_map(options: str) -> None:
    layer, x = make("gqa", options), rand(B, L, WIDTH, seed=1)
    with torch.no_grad():
        _, wanted = expected(layer, "gqa", x, weights_digest(layer), causal=True)
        assert distances([layer.effective_map(x, is_causal=True)], [wanted])[0] < 1e-12


@pytest.mark.parametrize("options", ["shared", "own_wide"])
@torch.no_grad()
def test_decoding_from_a_padded_cache(options: str) -> None:
    layer, x, cache = make("gqa", options), rand(B, L, WIDTH, seed=1), DynamicCache()
    real = torch.tensor([[False, True, True, True, True, True], [True] * 6])
    steps = [
        layer(x[:, i : i + 1], is_causal=True, cache=cache, key_padding_mask=real[:, : i + 1])
        for i in range(L)
    ]
    wanted, _ = expected(layer, "gqa", x, weights_digest(layer), causal=True, key_padding=real)
    assert distances([torch.cat(steps, dim=1)], [wanted])[0] < 1e-12


@pytest.mark.parametrize("options", ["shared_wide", "own_wide"])
def test_a_hidden_key_that_is_not_finite_reaches_nobody(options: str) -> None:
    layer, x = make("gqa", options), rand(B, L, WIDTH, seed=1)
    broken = x.clone()
    broken[:, -1] = torch.nan
    with torch.no_grad():
        whole, found = layer(x, is_causal=True), layer(broken, is_causal=True)
        assert distances([found[:, :-1]], [whole[:, :-1]])[0] < 1e-12
        assert layer(x[:0], is_causal=True).shape == (0, L, WIDTH)
        assert layer.effective_map(x[:0]).shape == (0, 6, L, L)


@pytest.mark.parametrize("options", ["shared", "own_wide"])
@torch.no_grad()
def test_values_in_slices_and_flex(options: str) -> None:
    """What FlashAttention and FlexAttention are given: slices of the value, and a block mask on CPU."""

    class Narrow(Eager):
        name = "narrow"

        def caps(self, device: str) -> Caps:
            return Caps(wide_values="split", maps=True)

    layer, x = make("gqa", options), rand(B, L, WIDTH, seed=1)
    wanted, _ = expected(layer, "gqa", x, weights_digest(layer), causal=True)
    layer.backends, layer.automatic = (Narrow(),), False
    assert distances([layer(x, is_causal=True)], [wanted])[0] < 1e-12
    single = make("gqa", options, "flex").float()
    assert distances([single(x.float(), is_causal=True)], [wanted])[0] < 1e-4


@pytest.mark.compiles
def test_compiled_as_one_graph() -> None:
    layer, x = make("gqa", "own_wide"), rand(B, L, WIDTH, seed=1)
    compiled = torch.compile(layer, fullgraph=True, backend="eager")
    assert distances([compiled(x, is_causal=True)], [layer(x, is_causal=True)])[0] < 1e-13


class Careless(Kernel):
    """Says nothing of heads, as a kernel written before there were unequal ones."""

    name = "careless"

    def refusal(self, problem: AttentionProblem) -> str | None:
        return None

    def run(self, heads: Streams, mask: MaskSpec, scale: float) -> Tensor:
        raise AssertionError("it must not be asked")


def problem(**changes: Any) -> AttentionProblem:
    q, noise, k = torch.zeros(1, 6, 3, 4), torch.zeros(1, 2, 3, 4), torch.zeros(1, 2, 3, 4)
    heads = Streams((q, noise), (k, k) if changes.pop("own", False) else (k,), k, torch.ones(1, 1, 1, 1))
    return problem_of(heads, MaskSpec(**changes), "difference")


def test_kernels_refuse_by_a_sentence() -> None:
    asked = problem(is_causal=True)
    assert asked.stream_heads == (6, 2) and asked.heads == 6
    sentence = "it takes streams with equally many heads, not 6, 2"
    for kernel in (load_backend("cpu"), Careless()):
        assert kernel.reason_against(asked) == sentence
        with pytest.raises(ValueError, match=sentence):
            choose((kernel,), asked, automatic=False)
    assert choose((Careless(), Eager()), asked, automatic=True).backend.name == "eager"


def test_what_engines_refuse() -> None:
    by_head = "a mask or ALiBi's slopes by head need streams with equally many heads"
    for mask in ({"slopes": torch.ones(6)}, {"dense": torch.ones(1, 6, 3, 3, dtype=torch.bool)}):
        assert load_backend("eager").reason_against(problem(**mask)) == by_head
        assert load_backend("sdpa").reason_against(problem(**mask)) == by_head
    assert load_backend("sdpa").reason_against(problem(dense=torch.ones(3, 3, dtype=torch.bool))) is None

    class OneCall(Eager):
        def caps(self, device: str) -> Caps:
            return Caps(one_call=True)

    assert "one call a layer, where streams with 6 and 2 heads" in (
        OneCall().reason_against(problem(own=True)) or ""
    )
    assert OneCall().reason_against(problem()) is None


@pytest.mark.parametrize(
    ("counts", "sentence"),
    [
        ((6,), r"stream_heads has 1 numbers; expected query_streams \(2\)"),
        ((6, 3), r"3 is not a multiple of kv_heads \(2\)"),
        ((6, 0), "must be at least 1, not 0"),
    ],
)
def test_counts_that_do_not_fit(counts: tuple[int, ...], sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        Widths(32, 8, 8, 24, 6, 2, 2, 1, 4, 4, counts)


def test_a_model_of_it_and_what_it_costs() -> None:
    config = ClearheadConfig(
        vocab_size=20,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=6,
        num_key_value_heads=2,
        head_dim=4,
        attention=NAME,
        attention_options={"ratio": 3, "own_keys": True},
    )
    model, ids = ClearheadForCausalLM(config).eval(), torch.arange(1, 8)[None]
    model(ids, labels=ids).loss.backward()
    assert all(p.grad is not None for p in model.parameters())
    cached = model.generate(ids, max_new_tokens=4, do_sample=False, pad_token_id=0)
    assert torch.equal(
        cached, model.generate(ids, max_new_tokens=4, do_sample=False, pad_token_id=0, use_cache=False)
    )
    # By hand: projections of 8 query, 4 key, 2 value and 6 output heads of 4; scores of 6 + 2 query heads.
    projections = 16 * 4 * (8 + 4 + 2 + 6)
    scores = (6 + 2) * (4 + 4) * (7 + 1) / 2
    layer = 2 * (projections + 3 * 16 * 24 + scores)
    assert forward_flops_per_token(config, 7) == 2 * 16 * 20 + 2 * layer
    assert kv_bytes_per_token(config, torch.float32) == 2 * 2 * (2 * 4 + 4) * 4
    found = model.diagnostics()
    assert {name: sorted(values) for name, values in found.items()} == {
        "lambda": [0, 1],
        "lambda_spread": [0, 1],
    }
    assert model.lambdas() == pytest.approx({0: 0.3, 1: 0.3})


@torch.no_grad()
def test_what_looks_inside_a_model_sees_every_stream() -> None:
    sizes: dict[str, Any] = {"hidden_size": 24, "num_attention_heads": 6, "num_key_value_heads": 2}
    config = ClearheadConfig(
        vocab_size=20, num_hidden_layers=1, attention=NAME, attention_options={"ratio": 3}, **sizes
    )
    seen: list[Recorded] = []
    model = ClearheadForCausalLM(config).eval()
    with recorded(model, seen.append):
        model(torch.arange(1, 8)[None], use_cache=False)
    (streams,) = seen
    assert [q.shape[1] for q in streams.q] == [6, 2] and len(streams.k) == 2
    kind, angles, weights = measured(streams, torch.arange(5))
    assert kind == "Θ" and len(angles) == len(weights) == (6 + 2) * 5 * 2
    assert sum(x.numel() for x in visible_logits(streams, None)) == (6 + 2) * 7 * 8 // 2


def test_its_float32_parameters_stay_so(tmp_path: Any) -> None:
    config = ClearheadConfig(
        vocab_size=20,
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
        attention=NAME,
    )
    ClearheadForCausalLM(config).save_pretrained(tmp_path)
    model = ClearheadForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    kept = [name for name, p in model.named_parameters() if p.dtype == torch.float32]
    assert kept == ["model.layers.0.self_attn.variant.lam"]


def test_streams_that_share_keys_and_wide_values_are_one_call() -> None:
    """The grouped lowering takes heads of unequal streams apart again as they were put together."""
    rng = torch.Generator().manual_seed(0)
    q = tuple(torch.randn(2, n, 3, 4, generator=rng, dtype=torch.float64) for n in (6, 4))
    k, v = torch.randn(2, 2, 5, 4, generator=rng).double(), torch.randn(2, 2, 5, 8, generator=rng).double()
    heads, mask = Streams(q, (k,), v), MaskSpec(is_causal=True)
    prepared = prepare((load_backend("sdpa"),), problem_of(heads, mask, "other"), mask, automatic=False)
    assert str(prepared.plan) == "sdpa: grouped padded, 1 call"

    def beside(streams: tuple[Tensor, ...], gate: Tensor | None) -> Tensor:
        return torch.cat(streams, dim=1)

    found, _ = attend(heads, prepared, 0.5, beside)
    parts = []
    for stream in q:
        alone = Streams((stream,), (k,), v)
        once = prepare((Eager(),), problem_of(alone, mask, "single"), mask, automatic=False)
        parts.append(attend(alone, once, 0.5, MIXES["single"])[0])
    assert distances([found], [torch.cat(parts, dim=1)])[0] < 1e-13


def test_shape_of_heads() -> None:
    sizes = GroupedDifferential(HeadShape(16, 6, 2, 4), ratio=3).sizes
    assert sizes.query_heads == (6, 2)
    assert GroupedDifferential.mixing == "difference"

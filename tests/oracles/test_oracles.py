"""The oracles against each other, where theory says that they agree, and where it says that they must not."""

import math

import pytest
import torch
from torch import Tensor

from tests.oracles import collinear, differential, differential_collinear, rotary, softmax
from tests.oracles.layers import LayerSpec, layer

EXACT = 1e-12
ALL = ["softmax", "differential", "differential_v2", "collinear"]
ALL += ["differential_collinear", "differential_v2_collinear"]


def rand(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def distance(a: Tensor, b: Tensor) -> float:
    return float((a - b).abs().max())


# --- softmax ---


def test_softmax_agrees_with_torch() -> None:
    q, k, v = rand(2, 4, 5, 8, seed=1), rand(2, 2, 5, 8, seed=2), rand(2, 2, 5, 6, seed=3)
    expected = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    assert distance(softmax.attention(q, k, v, causal=True), expected) < EXACT


def test_fewer_queries_than_keys_are_the_last_positions() -> None:
    q, k, v = rand(1, 2, 6, 4, seed=1), rand(1, 1, 6, 4, seed=2), rand(1, 1, 6, 4, seed=3)
    full = softmax.attention(q, k, v, causal=True)
    assert distance(softmax.attention(q[:, :, 4:], k, v, causal=True), full[:, :, 4:]) < EXACT


def test_documents_and_padding_equal_separate_calls() -> None:
    q, k, v = rand(1, 2, 7, 4, seed=1), rand(1, 2, 7, 4, seed=2), rand(1, 2, 7, 4, seed=3)
    documents = torch.tensor([[0, 0, 0, 1, 1, 1, 1]])
    see = softmax.visible(1, 7, 7, causal=True, documents=documents)
    packed = softmax.attention(q, k, v, allowed=see)
    parts = [
        softmax.attention(q[:, :, p], k[:, :, p], v[:, :, p], causal=True) for p in (slice(3), slice(3, 7))
    ]
    assert distance(packed, torch.cat(parts, dim=2)) < EXACT
    padding = torch.tensor([[False, False, True, True, True, True, True]])
    padded = softmax.attention(q, k, v, allowed=softmax.visible(1, 7, 7, causal=True, key_padding=padding))
    alone = softmax.attention(q[:, :, 2:], k[:, :, 2:], v[:, :, 2:], causal=True)
    assert distance(padded[:, :, 2:], alone) < EXACT
    assert not padded[:, :, :2].any(), "a query that sees nothing gives zeros"


# --- rotary ---


def test_rotary_scores_depend_on_the_distance_only() -> None:
    q, k, here = rand(1, 2, 5, 8, seed=1), rand(1, 2, 5, 8, seed=2), torch.arange(5)
    score = torch.einsum("bhld,bhsd->bhls", rotary.rotate(q, here), rotary.rotate(k, here))
    far = torch.einsum("bhld,bhsd->bhls", rotary.rotate(q, here + 1000), rotary.rotate(k, here + 1000))
    assert distance(score, far) < 1e-11
    assert distance(rotary.rotate(q, torch.zeros(5)), q) == 0


# --- differential ---


def test_lambda_init_table() -> None:
    """The values the paper's formula gives for layers counted from 0."""
    table = {0: 0.2000, 1: 0.3555, 2: 0.4707, 3: 0.5561, 4: 0.6193, 5: 0.6661, 6: 0.7008, 8: 0.7456}
    table |= {12: 0.7836, 16: 0.7951, 23: 0.7994, 27: 0.7998}
    for index, value in table.items():
        assert differential.lambda_init(index) == pytest.approx(value, abs=5.1e-5)


@pytest.mark.parametrize("groups", [1, 2, 4])
def test_without_lambda_the_signal_stream_is_softmax_attention(groups: int) -> None:
    q, k, v = rand(2, 8, 5, 4, seed=1), rand(2, 2 * groups, 5, 4, seed=2), rand(2, groups, 5, 8, seed=3)
    plain = softmax.attention(q[:, 0::2], k[:, 0::2], v, causal=True)
    assert distance(differential.differential_attention(q, k, v, 0.0, causal=True), plain) < EXACT


def test_identical_streams_scale_by_one_minus_lambda() -> None:
    q, k, v = rand(1, 2, 5, 4, seed=1), rand(1, 2, 5, 4, seed=2), rand(1, 2, 5, 4, seed=3)
    twice = q.repeat_interleave(2, dim=1)
    out = differential.differential_attention(twice, k, v, 0.3, causal=True)
    assert distance(out, 0.7 * softmax.attention(q, k, v, causal=True)) < EXACT


def test_rows_of_the_effective_map_sum_to_one_minus_lambda() -> None:
    lam = rand(2, 3, 4, 1, seed=9)
    weights = differential.differential_map(rand(2, 6, 4, 4), rand(2, 3, 4, 4, seed=1), 3, lam, causal=True)
    assert distance(weights.sum(-1), (1 - lam)[..., 0]) < EXACT


@pytest.mark.parametrize("groups", [1, 2])
def test_flash_1_and_flash_2_are_the_definition(groups: int) -> None:
    """Two calls with wide values, or four with the values cut in two, as in the authors' code."""
    d, H = 4, 4
    q, k = rand(2, 2 * H, 5, d, seed=1), rand(2, 2 * groups, 5, d, seed=2)
    v, lam = rand(2, groups, 5, 2 * d, seed=3), 0.37
    one, two = (
        [softmax.attention(q[:, s::2], k[:, s::2], value, causal=True) for s in (0, 1)] for value in (v, v)
    )
    flash_1 = one[0] - lam * two[1]
    quarters = [
        torch.cat(
            [softmax.attention(q[:, s::2], k[:, s::2], half, causal=True) for half in v.split(d, -1)], -1
        )
        for s in (0, 1)
    ]
    flash_2 = quarters[0] - lam * quarters[1]
    expected = differential.differential_attention(q, k, v, lam, causal=True)
    assert distance(flash_1, expected) < EXACT
    assert distance(flash_2, expected) < EXACT


def test_repeating_flat_key_heads_is_not_the_definition_under_gqa() -> None:
    """The authors' naive file pairs wrongly as soon as groups are fewer than heads; the oracle must not."""
    q, k, v = rand(1, 4, 5, 4, seed=1), rand(1, 2, 5, 4, seed=2), rand(1, 1, 5, 8, seed=3)
    naive = differential.differential_attention(
        q, k.repeat_interleave(2, dim=1), v.repeat_interleave(2, dim=1), 0.4, causal=True
    )
    assert distance(naive, differential.differential_attention(q, k, v, 0.4, causal=True)) > 0.1


def test_v2_is_one_attention_call_and_a_subtraction() -> None:
    q, k, v = rand(2, 8, 5, 4, seed=1), rand(2, 2, 5, 4, seed=2), rand(2, 2, 5, 4, seed=3)
    lam = torch.sigmoid(rand(2, 4, 5, 1, seed=4))
    streams = softmax.attention(q, k, v, causal=True)
    expected = streams[:, 0::2] - lam * streams[:, 1::2]
    assert distance(differential.differential_attention(q, k, v, lam, causal=True), expected) < EXACT


def test_head_norm_is_per_head_with_one_weight_and_a_constant_factor() -> None:
    out, weight = rand(2, 3, 5, 8, seed=1), rand(8, seed=2)
    normed = differential.finish(out, weight, 0.2)
    assert distance(normed, 0.8 * torch.nn.functional.rms_norm(out, (8,), weight, 1e-5)) < EXACT


# --- collinear ---


@pytest.fixture
def one_head() -> tuple[Tensor, Tensor, Tensor]:
    return rand(6, 8, seed=1), collinear.collinear_t(rand(6, 8, seed=2)), torch.arange(6)


def test_exact_is_its_expansion(one_head: tuple[Tensor, Tensor, Tensor]) -> None:
    q, t, here = one_head
    assert (
        distance(collinear.exact_scores(q, t, here, here), collinear.expanded_scores(q, t, here, here))
        < EXACT
    )


def test_exact_is_rope_on_squares_and_t(one_head: tuple[Tensor, Tensor, Tensor]) -> None:
    """Theorem 1's practical form: q' = (|q_j|², 0) and k' = (t_j, 0), rotated as any other query and key."""
    q, t, here = one_head
    zero = torch.zeros(6, 4, dtype=torch.float64)
    square = torch.cat((q[:, :4] ** 2 + q[:, 4:] ** 2, zero), dim=-1)
    key = torch.cat((t[:, :4], zero), dim=-1)
    rotated = [rotary.rotate(x[None, None], here)[0, 0] for x in (square, key)]
    assert distance(rotated[0] @ rotated[1].T, collinear.exact_scores(q, t, here, here)) < EXACT


def test_exact_equals_strict_and_slack_when_q_is_tied(one_head: tuple[Tensor, Tensor, Tensor]) -> None:
    q, t, here = one_head
    tied = collinear.tie(q)
    exact = collinear.exact_scores(tied, t, here, here)
    assert distance(exact, collinear.strict_scores(q, t, here, here)) < EXACT
    assert distance(exact, collinear.slack_scores(tied, t, here, here)) < EXACT


def test_exact_and_slack_differ_by_the_published_term(one_head: tuple[Tensor, Tensor, Tensor]) -> None:
    """Equation 13 against the rotated query: Σ_j t (q0 − q1) sin(nθ) [q0 (c_m + s_m) + q1 (c_m − s_m)]."""
    q, t, here = one_head
    gap = collinear.exact_scores(q, t, here, here) - collinear.slack_scores(q, t, here, here)
    angle = rotary.angles(8, here)
    q0, q1, cos, sin = q[:, :4], q[:, 4:], angle.cos(), angle.sin()
    left = (q0 - q1) * (q0 * (cos + sin) + q1 * (cos - sin))
    assert distance(gap, torch.einsum("mj,nj->mn", left, t[:, :4] * sin)) < EXACT
    assert float(gap.abs().max()) > 0.1


def test_slack_is_the_released_dot_product(one_head: tuple[Tensor, Tensor, Tensor]) -> None:
    q, t, here = one_head
    rotated_q, rotated_t = (rotary.rotate(x[None, None], here)[0, 0] for x in (q, t))
    assert distance((q * rotated_q) @ rotated_t.T, collinear.slack_scores(q, t, here, here)) < EXACT


@pytest.mark.parametrize(("mode", "relative"), [("exact", True), ("strict", True), ("slack", False)])
def test_shift_invariance(one_head: tuple[Tensor, Tensor, Tensor], mode: str, relative: bool) -> None:
    q, t, here = one_head
    score = collinear.SCORES[mode]
    moved = distance(score(q, t, here, here), score(q, t, here + 1000, here + 1000))
    assert moved < 1e-11 if relative else moved > 0.1


@pytest.mark.parametrize("mode", ["exact", "strict"])
def test_the_initial_angle_is_zero(mode: str) -> None:
    """Per pair, the score falls with distance from the first step on; RoPE's own scores need not."""
    for seed in range(20):
        q, t = (
            rand(1, 2, seed=seed),
            collinear.collinear_t(rand(1, 2, seed=100 + seed), "softplus").expand(2, -1),
        )
        near, next_one = collinear.SCORES[mode](q, t, torch.tensor([1]), torch.tensor([1, 0]))[0]
        assert next_one < near


def test_t_is_tied_before_the_activation() -> None:
    projected = torch.tensor([3.0, -1.0, -1.0, -1.0], dtype=torch.float64)
    assert collinear.collinear_t(projected).tolist() == [1.0, 0.0, 1.0, 0.0]
    soft = collinear.collinear_t(projected, "softplus")
    assert soft.tolist() == pytest.approx([math.log1p(math.e), math.log1p(1 / math.e)] * 2)


# --- differential and collinear ---

MODES = pytest.mark.parametrize("mode", ["exact", "slack", "strict"])
OWN_KEYS = pytest.mark.parametrize("own_keys", [True, False])


def both(own_keys: bool, groups: int = 2) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """q, t, v and positions of 4 heads of two streams."""
    t = collinear.collinear_t(rand(2, 2 * groups if own_keys else groups, 5, 6, seed=2))
    return rand(2, 8, 5, 6, seed=1), t, rand(2, groups, 5, 4, seed=3), torch.arange(5).expand(2, 5)


@MODES
@OWN_KEYS
def test_without_lambda_the_signal_stream_is_collinear_attention(own_keys: bool, mode: str) -> None:
    q, t, v, here = both(own_keys)
    found = differential_collinear.differential_collinear_attention(
        q, t, v, 0.0, mode, here, here, causal=True
    )
    signal = t[:, 0::2] if own_keys else t
    expected = collinear.collinear_attention(q[:, 0::2], signal, v, mode, here, here, causal=True)
    assert distance(found, expected) < EXACT


@MODES
@OWN_KEYS
def test_the_noise_stream_is_collinear_attention_too(own_keys: bool, mode: str) -> None:
    q, t, _, here = both(own_keys)
    one, two = (
        differential_collinear.differential_collinear_map(
            q, t, 2, lam, mode, here, here, allowed=torch.ones(5, 5).bool()
        )
        for lam in (1.0, 2.0)
    )
    noise = collinear.collinear_map(q[:, 1::2], t[:, 1::2] if own_keys else t, mode, here, here)
    assert distance(one - two, noise) < EXACT


@OWN_KEYS
def test_the_exact_combination_is_differential_attention_over_squares_and_t(own_keys: bool) -> None:
    """|q_j|² and t_j as first components, rotated, are ordinary queries and keys for equation 1."""
    q, t, v, here = both(own_keys)
    zero = torch.zeros_like(q[..., :3])
    square = rotary.rotate(torch.cat((q[..., :3] ** 2 + q[..., 3:] ** 2, zero), dim=-1), here)
    key = rotary.rotate(torch.cat((t[..., :3], torch.zeros_like(t[..., :3])), dim=-1), here)
    lam = rand(2, 4, 5, 1, seed=4)
    expected = differential.differential_attention(square, key, v, lam, causal=True)
    found = differential_collinear.differential_collinear_attention(
        q, t, v, lam, "exact", here, here, causal=True
    )
    assert distance(found, expected) < EXACT


# --- layers ---


def weights_for(attention: str, heads: int, kv_heads: int, d: int, width: int) -> dict[str, Tensor]:
    q_heads = 2 * heads if attention.startswith("differential_v2") else heads
    weights = {
        "q_proj": rand(q_heads * d, width, seed=1),
        "k_proj": rand(kv_heads * d, width, seed=2),
        "v_proj": rand(kv_heads * d, width, seed=3),
        "o_proj": rand(width, heads * d, seed=4),
        "lambda_proj": rand(heads, width, seed=5),
        "head_norm": rand(2 * d, seed=6),
    }
    return weights | {f"lambda_{n}": 0.1 * rand(d, seed=i) for i, n in enumerate(("q1", "k1", "q2", "k2"))}


def test_a_v2_layer_without_gate_is_the_softmax_layer_of_its_signal_heads() -> None:
    x, weights = rand(2, 5, 12, seed=7), weights_for("differential_v2", 4, 2, 4, 12)
    weights["lambda_proj"] = torch.zeros(4, 12, dtype=torch.float64)
    half, _ = layer(LayerSpec("differential_v2", 4, 2, 4), weights, x, causal=True)
    heads = weights["q_proj"].view(8, 4, 12)
    parts = []
    for stream in (0, 1):
        twin = weights | {"q_proj": heads[stream::2].reshape(16, 12)}
        parts.append(layer(LayerSpec("softmax", 4, 2, 4), twin, x, causal=True)[0])
    assert distance(half, parts[0] - 0.5 * parts[1]) < EXACT


def test_a_v1_layer_with_equal_vectors_has_lambda_init() -> None:
    x, weights = rand(2, 5, 12, seed=7), weights_for("differential", 4, 4, 4, 12)
    weights |= {"lambda_q2": weights["lambda_q1"], "lambda_k2": weights["lambda_k1"]}
    for index in (0, 3):
        _, maps = layer(LayerSpec("differential", 4, 4, 4, layer=index), weights, x, causal=True)
        assert maps.shape == (2, 2, 5, 5)
        expected = 1 - differential.lambda_init(index)
        assert distance(maps.sum(-1), torch.full((2, 2, 5), expected, dtype=torch.float64)) < EXACT


@pytest.mark.parametrize("attention", ALL)
def test_cross_attention_over_itself_is_self_attention(attention: str) -> None:
    x, weights = rand(2, 5, 12, seed=7), weights_for(attention, 4, 2, 4, 12)
    spec = LayerSpec(attention, 4, 2, 4)
    own, cross = layer(spec, weights, x, causal=True), layer(spec, weights, x, x, causal=True)
    assert distance(own[0], cross[0]) == 0

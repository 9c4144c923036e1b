"""Arguments at the edge of what makes sense: the oracle's value, or one sentence that names the argument."""

import math
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import clearhead.nn as nn
from clearhead.functional import attention, differential_attention
from clearhead.kernels.cpu import library
from tests.contracts.support import rand
from tests.oracles import differential, softmax

BACKENDS = ["auto", "eager", "sdpa", "flex", "cpu"]
EPS = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 4e-2, torch.float16: 8e-3}


def skip_unless_possible(backend: str, dtype: torch.dtype = torch.float32) -> None:
    if backend == "cpu" and library.missing() is not None:
        pytest.skip(str(library.missing()))
    if (backend == "cpu" and dtype in (torch.float64, torch.float16)) or (
        backend == "flex" and dtype == torch.float64
    ):
        pytest.skip("not computed in this dtype")


def problem(length: int, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor]:
    return tuple(rand(2, heads, length, 8, seed=length + heads).to(dtype) for heads in (4, 2, 2))  # type: ignore[return-value]


@pytest.mark.parametrize("length", [1, 2, 31, 128])
@pytest.mark.parametrize("dtype", EPS, ids=str)
@pytest.mark.parametrize("scale", [-2.0, -0.3, 0.0])
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_scale_of_any_sign(backend: str, scale: float, dtype: torch.dtype, length: int) -> None:
    skip_unless_possible(backend, dtype)
    q, k, v = problem(length, dtype)
    expected = softmax.attention(q.double(), k.double(), v.double(), causal=True, scale=scale)
    with torch.no_grad():
        found = attention(q, k, v, is_causal=True, scale=scale, backend=backend).double()
    assert float((found - expected).abs().max()) <= EPS[dtype] * max(1.0, float(expected.abs().max()))


@pytest.mark.parametrize("scale", [-1.5, 0.0])
@pytest.mark.parametrize("backend", ["auto", "eager", "sdpa", "cpu"])
def test_its_gradients(backend: str, scale: float) -> None:
    skip_unless_possible(backend)
    inputs = problem(40)
    wide, narrow = ([x.to(t).requires_grad_() for x in inputs] for t in (torch.float64, torch.float32))
    expected = torch.autograd.grad(softmax.attention(*wide, causal=True, scale=scale).square().sum(), wide)
    out = attention(*narrow, is_causal=True, scale=scale, backend=backend)  # type: ignore[arg-type]
    for a, b in zip(torch.autograd.grad(out.square().sum(), narrow), expected, strict=True):
        assert float((a - b).abs().max()) <= 1e-4 * max(1.0, float(b.abs().max()))


@pytest.mark.parametrize("backend", ["auto", "eager", "sdpa", "cpu"])
def test_a_scale_that_is_learned(backend: str) -> None:
    skip_unless_possible(backend)
    q, k, v = problem(40)
    wide = torch.tensor(0.4, dtype=torch.float64, requires_grad=True)
    # The oracle takes numbers: the same logits with the factor on q.
    expected = torch.autograd.grad(
        softmax.attention(q * wide, k, v, causal=True, scale=1.0).square().sum(), wide
    )[0]
    scale = torch.tensor(0.4, requires_grad=True)
    out = attention(q.float(), k.float(), v.float(), is_causal=True, scale=scale, backend=backend)
    (found,) = torch.autograd.grad(out.square().sum(), scale)
    assert math.isclose(float(found), float(expected), rel_tol=1e-4)


@pytest.mark.parametrize("window", [2**61, 2**63, 2**64, 10**30])
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_window_past_every_integer_is_none(backend: str, window: int) -> None:
    skip_unless_possible(backend)
    q, k, v = problem(9, torch.float32)
    for causal in (True, False):
        with torch.no_grad():
            plain = attention(q, k, v, is_causal=causal, backend=backend)
            assert torch.equal(plain, attention(q, k, v, is_causal=causal, window=window, backend=backend))


@pytest.mark.parametrize("garbage", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("length", [5, 70])
@pytest.mark.parametrize("backend", BACKENDS)
def test_what_padding_holds_changes_nothing(
    backend: str, length: int, dtype: torch.dtype, garbage: float
) -> None:
    skip_unless_possible(backend, dtype)
    q, k, v = problem(length, dtype)
    real = torch.ones(2, length, dtype=torch.bool)
    real[0, :2] = real[1, -1] = False
    arguments: dict[str, Any] = {"is_causal": True, "key_padding_mask": real, "backend": backend}
    dirty = [x.masked_fill(~real[:, None, :, None], garbage) for x in (k, v)]
    with torch.no_grad():
        clean = attention(q, k, v, **arguments)
        assert torch.equal(attention(q, *dirty, **arguments), clean)
    seen = softmax.visible(2, length, length, causal=True, key_padding=real)[:, None]
    expected = softmax.attention(q.double(), k.double(), v.double(), allowed=seen)
    assert float((clean.double() - expected).abs().max()) <= EPS[dtype] * 4
    if backend == "flex":
        return
    leaves = [x.clone().requires_grad_() for x in (q, *dirty)]
    gradients = torch.autograd.grad(attention(*leaves, **arguments).sum(), leaves)
    assert all(bool(x.isfinite().all()) for x in gradients)
    assert not gradients[1].masked_select(~real[:, None, :, None]).any()


@pytest.mark.parametrize("backend", ["auto", "eager", "sdpa", "flex", "cpu"])
def test_an_empty_batch_under_a_mask_of_its_own(backend: str) -> None:
    skip_unless_possible(backend)
    q, k, v = (torch.zeros(0, heads, 5, 8) for heads in (4, 2, 2))
    masks = {
        "documents": torch.zeros(0, 5, dtype=torch.long),
        "key_padding_mask": torch.ones(0, 5, dtype=torch.bool),
    }
    for named in ({}, *({name: mask} for name, mask in masks.items()), masks):
        assert attention(q, k, v, is_causal=True, window=3, backend=backend, **named).shape == (0, 4, 5, 8)


@pytest.mark.parametrize("backend", ["auto", "eager", "sdpa", "cpu"])
def test_an_empty_batch(backend: str) -> None:
    skip_unless_possible(backend)
    q, k, v = (torch.zeros(0, heads, 5, 8, requires_grad=True) for heads in (4, 2, 2))
    lam = torch.tensor(0.5, requires_grad=True)
    for out in (
        attention(q, k, v, is_causal=True, backend=backend),
        differential_attention(q, k, v, lam, is_causal=True, backend=backend),
    ):
        assert out.shape[0] == 0 and out.shape[2:] == (5, 8)
        out.sum().backward()
    assert all(x.grad is not None and x.grad.shape == x.shape for x in (q, k, v))
    assert lam.grad is not None and float(lam.grad) == 0
    layer = nn.DifferentialAttention(32, 4, backend=backend)
    layer(torch.randn(0, 4, 32), is_causal=True).sum().backward()
    assert layer.q_proj.weight.grad is not None and not layer.q_proj.weight.grad.any()


Q, K, V = (x.float() for x in problem(6))
ONES = torch.ones(2, 6)
WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "scale a word": ({"scale": "x"}, "scale must be a finite number, not 'x'"),
    "scale true": ({"scale": True}, "scale must be a finite number, not True"),
    "scale nan": ({"scale": math.nan}, "scale must be a finite number, not nan"),
    "scale infinite": ({"scale": math.inf}, "scale must be a finite number, not inf"),
    "scale a vector": ({"scale": torch.ones(2)}, "scale must be one real number"),
    "scale complex": ({"scale": torch.tensor(1j)}, "scale must be one real number"),
    "λ none": ({"lam": None}, "lam must be a number or a tensor, not None"),
    "λ a word": ({"lam": "0.5"}, "lam must be a number or a tensor, not '0.5'"),
    "λ complex": ({"lam": torch.tensor(1 + 1j)}, "lam must be floating point, not torch.complex64"),
    "λ of integers": ({"lam": torch.tensor(1)}, "lam must be floating point, not torch.int64"),
    "λ elsewhere": ({"lam": torch.tensor(0.5, device="meta")}, "lam is on meta, q on cpu"),
    "backend none": ({"backend": None}, "backend must be the name of an engine or kernel"),
    "causal a number": ({"is_causal": 2}, "is_causal must be True or False, not 2"),
    "window a float": ({"window": 2.5}, "window must be an integer, not 2.5"),
    "window true": ({"window": True}, "window must be an integer, not True"),
    "documents complex": ({"documents": ONES.to(torch.complex64)}, "documents must hold integers"),
    "documents bool": ({"documents": ONES.bool()}, "documents must hold integers"),
    "documents a list": ({"documents": [[0] * 6]}, "documents must be a tensor, not list"),
    "documents elsewhere": ({"documents": ONES.long().to("meta")}, "documents is on meta, q on cpu"),
    "padding elsewhere": (
        {"key_padding_mask": ONES.bool().to("meta")},
        "key_padding_mask is on meta, q on cpu",
    ),
    "mask elsewhere": ({"attn_mask": torch.ones(6, 6, device="meta")}, "attn_mask is on meta, q on cpu"),
    "mask of integers": ({"attn_mask": torch.ones(6, 6).long()}, "attn_mask must be bool"),
    "slopes elsewhere": ({"alibi_slopes": torch.ones(2, device="meta")}, "alibi_slopes is on meta, q on cpu"),
}


@pytest.mark.parametrize("name", WRONG)
def test_one_sentence(name: str) -> None:
    changes, sentence = WRONG[name]
    with pytest.raises(ValueError, match=sentence) as caught:
        differential_attention(Q, K, V, **{"lam": 0.5, **changes})
    assert "\n" not in str(caught.value)


def test_q_k_v_that_are_no_tensors() -> None:
    with pytest.raises(ValueError, match="v must be a tensor, not NoneType"):
        attention(Q, K, None)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"k is .* on meta, q is .* on cpu"):
        attention(Q, K.to("meta"), V)


def test_the_kernel_reads_no_memory_of_another_device() -> None:
    """Whoever calls the operator itself: what lies on meta has no memory, and its address is not to be followed."""
    if library.missing() is not None:
        pytest.skip(str(library.missing()))
    q, k, v = (rand(1, 1, 4, 8, seed=i).float() for i in range(3))
    gate = torch.full((1, 1, 4, 1), 0.5)
    masks = (torch.ones(1, 4, dtype=torch.bool), torch.zeros(1, 4, dtype=torch.long), torch.tensor(0))
    tensors = [q, q, k, k, v, gate, *masks]
    for at in range(len(tensors)):
        moved = [x.to("meta") if i == at else x for i, x in enumerate(tensors)]
        assert_no_numbers(torch.ops.clearhead.fused_attention, *moved, 0, 0, True, 0.3, False)
        held = [
            moved[0],
            moved[1],
            moved[2][..., :4],
            moved[3][..., :4],
            torch.ones(1, 4, 8),
            *moved[4:7],
            moved[8],
        ]
        if at != 7:
            assert_no_numbers(torch.ops.clearhead.factored_attention, *held, 0, 0, True, 0.3)


def assert_no_numbers(operator: Callable[..., Any], *arguments: Any) -> None:
    """An error that names the device, or PyTorch's own answer for meta tensors, which has a shape and no numbers."""
    try:
        out = operator(*arguments)
    except ValueError as error:
        assert "meta" in str(error)
    else:
        assert (out[0] if isinstance(out, tuple) else out).is_meta


def test_meta_tensors_have_shapes_everywhere() -> None:
    q, k, v = (x.to("meta") for x in (Q, K, V))
    assert attention(q, k, v, is_causal=True).is_meta
    assert differential_attention(q, k, v, 0.5, window=3).shape == (2, 2, 6, 8)
    layer = nn.DifferentialAttention(32, 4).to("meta")
    assert layer(torch.ones(2, 7, 32, device="meta"), is_causal=True).shape == (2, 7, 32)


def test_hugging_face_s_functions_are_known_without_the_models() -> None:
    program = (
        "import sys, clearhead.nn as nn\n"
        "assert 'transformers' not in sys.modules\n"
        "print(nn.DifferentialAttention(32, 4, backend='flash_attention_2').backends[0].name)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.stdout.strip() == "flash_attention_2", done.stderr


def test_broken_oracle_is_noticed() -> None:
    """The comparison fails where λ's sign is turned: what these tests rest on."""
    q, k, v = problem(5)
    right = differential.differential_attention(q, k, v, 0.5, causal=True)
    assert float((differential_attention(q, k, v, -0.5, is_causal=True) - right).abs().max()) > 1e-2


@pytest.mark.parametrize(
    "backend", ["auto", "cpu", "eager", "sdpa", pytest.param("flex", marks=pytest.mark.compiles)]
)
@torch.no_grad()
def test_views_whose_sign_is_only_noted(backend: str) -> None:
    skip_unless_possible(backend, torch.float32)
    rng = torch.Generator().manual_seed(0)
    shapes = ((1, 4, 6, 16), (1, 4, 9, 16), (1, 2, 9, 32), ())
    plain = [torch.randn(shape, generator=rng) for shape in shapes]
    noted = [torch._neg_view(-x) for x in plain]
    assert all(x.is_neg() for x in noted)
    expected = differential_attention(*(x.double() for x in plain), backend="eager")
    found = differential_attention(*noted, backend=backend)
    torch.testing.assert_close(found.double(), expected, rtol=0, atol=2e-6)

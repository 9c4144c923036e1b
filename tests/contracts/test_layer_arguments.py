"""Layers say in one sentence which argument is wrong, before anything is computed."""

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

import clearhead.nn as nn
from clearhead.functional import attention, differential_attention

X = torch.zeros(2, 6, 32)
META = torch.zeros(2, 6, dtype=torch.long, device="meta")
LAYER = nn.Attention(32, 4)
Q, K, V = torch.zeros(2, 4, 6, 8), torch.zeros(2, 2, 6, 8), torch.zeros(2, 2, 6, 8)

NOT_WHOLE: tuple[Any, ...] = ("8", 8.0, True, math.nan, torch.tensor(8))
CONSTRUCTOR: list[tuple[dict[str, Any], str]] = [
    *(
        ({name: value}, f"{name} must be an integer")
        for name in (
            "embed_dim",
            "num_heads",
            "num_kv_heads",
            "head_dim",
            "layer_idx",
            "context_dim",
            "max_positions",
        )
        for value in NOT_WHOLE
    ),
    ({"embed_dim": None}, "embed_dim must be an integer, not None"),
    ({"num_heads": -1}, "num_heads must be at least 1, not -1"),
    ({"layer_idx": None}, "layer_idx must be an integer, not None"),
    ({"context_dim": -1}, "context_dim must be at least 1, not -1"),
    ({"max_positions": 0}, "max_positions must be at least 1, not 0"),
    ({"bias": "no"}, "bias must be True or False, not 'no'"),
    ({"head_norm": "no"}, "head_norm must be True or False, not 'no'"),
    ({"position": None}, "position must be the name of a registered position, not None"),
    ({"rope_parameters": "dynamic"}, "rope_parameters must be a mapping, not 'dynamic'"),
    ({"rope_theta": "x"}, "rope_theta"),
    ({"backend": None}, "backend must be the name of an engine or kernel"),
]


@pytest.mark.parametrize(("changes", "sentence"), CONSTRUCTOR, ids=str)
def test_constructor(changes: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        nn.Attention(**{"embed_dim": 32, "num_heads": 4, **changes})


@pytest.mark.parametrize("layer", [nn.DifferentialAttention, nn.DifferentialCollinearAttention])
@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"head_norm": "no"}, "head_norm must be True or False, not 'no'"),
        ({"lambda_init": None}, "lambda_init must be .* a number, not None"),
        ({"lambda_init": True}, "lambda_init must be .* a number, not True"),
        ({"lambda_init": math.nan}, "lambda_init must be at least 0 and below 1, not nan"),
    ],
    ids=str,
)
def test_those_of_one_mechanism(layer: Any, changes: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        layer(32, 4, **changes)


CALLS: dict[str, tuple[Callable[[], Any], str]] = {
    "x none": (lambda: LAYER(None), "x must be a tensor, not NoneType"),
    "x of integers": (lambda: LAYER(X.long()), "x must be floating point, not torch.int64"),
    "x complex": (lambda: LAYER(X.to(torch.complex64)), "x must be floating point, not torch.complex64"),
    "context a list": (lambda: LAYER(X, [1]), "context must be a tensor, not list"),
    "context elsewhere": (lambda: LAYER(X, X.to("meta")), "context is on meta, x on cpu"),
    "positions a list": (
        lambda: LAYER(X, positions=[0, 1]),
        "positions must be a tensor of integers, not list",
    ),
    "positions complex": (
        lambda: LAYER(X, positions=torch.zeros(2, 6, dtype=torch.complex64)),
        "positions must hold integers, not torch.complex64",
    ),
    "positions elsewhere": (lambda: LAYER(X, positions=META), "positions is on meta, x on cpu"),
    "context_positions elsewhere": (
        lambda: LAYER(X, X, context_positions=META),
        "context_positions is on meta, x on cpu",
    ),
    "documents elsewhere": (lambda: LAYER(X, documents=META), "documents is on meta, q on cpu"),
    "padding elsewhere": (
        lambda: LAYER(X, key_padding_mask=META.bool()),
        "key_padding_mask is on meta, q on cpu",
    ),
    "mask elsewhere": (
        lambda: LAYER(X, attn_mask=torch.ones(6, 6, device="meta")),
        "attn_mask is on meta, q on cpu",
    ),
    "cache a word": (lambda: LAYER(X, cache="x"), "cache must have .* which str has not"),
    "is_causal a word": (lambda: LAYER(X, is_causal="no"), "is_causal must be True or False, not 'no'"),
    "lam nan": (
        lambda: differential_attention(Q, K, V, math.nan),
        "lam must be a finite number or a tensor, not nan",
    ),
    "lam infinite": (
        lambda: differential_attention(Q, K, V, math.inf),
        "lam must be a finite number or a tensor, not inf",
    ),
    "scale elsewhere": (
        lambda: attention(Q, K, V, scale=torch.tensor(0.5, device="meta")),
        "scale is on meta, q on cpu",
    ),
    "q sparse": (lambda: attention(Q.to_sparse(), K, V), "q must be dense, not torch.sparse_coo"),
}


@pytest.mark.parametrize("name", CALLS)
def test_call(name: str) -> None:
    call, sentence = CALLS[name]
    with pytest.raises(ValueError, match=sentence) as caught:
        call()
    assert "\n" not in str(caught.value)


def test_numbers_of_numpy_are_numbers() -> None:
    q, k, v = (torch.randn(1, 2, 5, 8) for _ in range(3))
    for number in (np.float32(0.5), np.float64(0.5), np.float16(0.5)):
        assert torch.equal(attention(q, k, v, scale=number), attention(q, k, v, scale=0.5))
        found, expected = (differential_attention(q, k, v[:, :1], lam) for lam in (number, 0.5))
        assert torch.equal(found, expected)
    assert torch.equal(attention(q, k, v, scale=np.int64(1)), attention(q, k, v, scale=1.0))


@pytest.mark.parametrize("name", ["scale", "lam"])
def test_a_number_that_changes_is_compiled(name: str) -> None:
    torch._dynamo.reset()
    q, k, v = (torch.randn(1, 2, 5, 8) for _ in range(3))

    def call(number: float) -> torch.Tensor:
        numbers = {"lam": 0.5, "scale": 0.3, name: number}
        return differential_attention(q, k, v[:, :1], is_causal=True, **numbers)

    compiled = torch.compile(call, fullgraph=True, backend="eager")
    for number in (0.5, 0.25, -0.3, 0.0):
        assert torch.allclose(compiled(number), call(number), atol=1e-6)

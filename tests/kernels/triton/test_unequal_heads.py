"""Grouped differential attention on the Triton kernels: several signal heads share a noise head."""

from collections.abc import Iterator
from dataclasses import replace
from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor

from clearhead.core.dispatch import AttentionProblem, load_backend
from clearhead.registry import VARIANTS
from tests.contracts.grouped_differential import GroupedDifferential
from tests.contracts.support import rand, relative_error
from tests.contracts.test_unequal_heads import (
    CALLS,
    LAYOUTS,
    NAME,
    OPTIONS,
    WIDTH,
    B,
    L,
    expected,
    make,
    weights_digest,
)


@pytest.fixture(autouse=True)
def registered(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setitem(VARIANTS, NAME, f"{GroupedDifferential.__module__}:GroupedDifferential")
    yield


@pytest.mark.parametrize(("layout", "options"), zip((*LAYOUTS, "gqa"), OPTIONS, strict=True))
def test_a_layer_and_all_its_gradients(layout: str, options: str) -> None:
    """float32 against the float64 oracle, under every mask, at most twice as far off as eager attention is.

    All masks together: what eager attention's products round by luck, for one of them, is no bound.
    """
    found: dict[str, list[Tensor]] = {"triton": [], "eager": []}
    right: dict[str, list[Tensor]] = {"triton": [], "eager": []}
    for (arguments, oracle_arguments), backend in product(CALLS.values(), found):
        if "attn_mask" in arguments:
            continue
        layer = make(layout, options, backend).float()
        x = rand(B, L, WIDTH, seed=1).float().requires_grad_()
        out = layer(x, **arguments)
        cotangent = rand(*out.shape, seed=2)
        found[backend] += [out, *torch.autograd.grad(out, [x, *layer.parameters()], cotangent.float())]
        exact = layer.double()
        given, weights = x.detach().double().requires_grad_(), weights_digest(exact)
        wanted, _ = expected(exact, layout, given, weights, **oracle_arguments)
        right[backend] += [wanted, *torch.autograd.grad(wanted, [given, *weights.values()], cotangent)]
    error, own = (relative_error(found[backend], right[backend]) for backend in ("triton", "eager"))
    assert error <= 2 * own + torch.finfo(torch.float32).eps


PROBLEM = AttentionProblem(
    *(2, True, 6, 2, 8, 8, 4, 4, torch.float32, "cpu"), mixing="difference", stream_heads=(6, 2)
)
REFUSED: dict[str, dict[str, Any]] = {
    "it takes a second stream whose heads divide the first's, not 2 and 6": {"stream_heads": (2, 6)},
    "it takes a second stream whose heads divide the first's, not 6 and 4": {"stream_heads": (6, 4)},
    "a mask or ALiBi's slopes by head need streams with equally many heads": {
        "mask": frozenset({"alibi"}),
        "differs_by_head": True,
    },
}


@pytest.mark.parametrize("said", REFUSED)
def test_refusals(said: str) -> None:
    triton = load_backend("triton")
    assert triton.reason_against(PROBLEM) is None
    assert triton.reason_against(replace(PROBLEM, **REFUSED[said])) == said

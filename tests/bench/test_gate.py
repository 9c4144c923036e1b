"""The gate: right peers pass, broken ones do not."""

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from clearhead.bench.cases import AttentionCase
from clearhead.bench.gate import check
from clearhead.bench.peers import PEERS, Peer, PeerInputs, Unavailable
from tests.bench.tiny import attention

CASES = {
    "v1": attention("v1-1024-causal-both-float32", heads=4, groups=2, keys=40),
    "v1 bfloat16": attention("v1-1024-full-both-bfloat16", keys=40),
    "v2": attention("v2-gqa-2048-causal-both-float32", heads=4, groups=2, keys=40),
    "softmax": attention("softmax-2048-causal-both-bfloat16", heads=4, groups=4, keys=40),
    "decode": attention("v1-8192-batch1-float32", "decode", heads=4, groups=2, keys=40),
}


@pytest.mark.parametrize("name", CASES)
def test_all_peers_are_right(name: str) -> None:
    case = CASES[name]
    ready = {}
    for peer in (*case.peers, *(("stacked",) if case.variant == "differential" else ())):
        try:
            ready[peer] = PEERS[peer](case)
        except Unavailable:
            continue
    verdicts = check(ready, case)
    assert verdicts.keys() == ready.keys()
    for found in verdicts.values():
        assert [str(verdict) for verdict in found if not verdict.green] == []
        assert len(found) == (4 if case.backward else 1)


def scaled_gradient(x: Tensor) -> Tensor:
    """x itself, with a gradient that is one percent off."""
    return x * 1.01 - (x * 0.01).detach()


def raising(inputs: PeerInputs) -> Tensor:
    raise IndexError("out of its depth")


Break = Callable[[Peer, PeerInputs], Tensor]
BREAKS: dict[str, tuple[Break, str]] = {
    "output": (lambda peer, x: peer.run(x) * 1.001, "output"),
    "gradient of q": (lambda peer, x: peer.run(replace(x, q=scaled_gradient(x.q))), "dq"),
    "gradient of k": (lambda peer, x: peer.run(replace(x, k=scaled_gradient(x.k))), "dk"),
    "gradient of λ": (lambda peer, x: peer.run(replace(x, gate=scaled_gradient(x.gate))), "dv and dλ"),  # type: ignore[arg-type]
    "not a number": (lambda peer, x: peer.run(x) * float("nan"), "output"),
    "shape": (lambda peer, x: peer.run(x)[..., :-1], "output"),
    "raises": (lambda peer, x: raising(x), "it raised"),
}


@pytest.mark.parametrize("broken", BREAKS)
def test_a_broken_peer_is_red(broken: str) -> None:
    case: AttentionCase = CASES["v1"]
    change, where = BREAKS[broken]
    peer = PEERS["FlashDiffAttn_2"](case)
    wrong = replace(peer, run=lambda inputs: change(peer, inputs))
    found = check({"wrong": wrong, "right": peer}, case)
    assert all(verdict.green for verdict in found["right"])
    red = [verdict.what for verdict in found["wrong"] if not verdict.green]
    assert any(what.startswith(where) for what in red), red


def test_a_causal_peer_in_an_open_case_is_red() -> None:
    """The gate tells what a peer computes, not only how precisely."""
    case = CASES["v1 bfloat16"]
    wrong = PEERS["naive maps"](replace(case, causal=True))
    assert not all(verdict.green for verdict in check({"wrong": wrong}, case)["wrong"])
    assert torch.is_grad_enabled()

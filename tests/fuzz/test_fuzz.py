"""The fuzzer itself: its calls are right on this tree, and a broken term is found."""

import pytest
import torch

from clearhead.core import attend
from tests.fuzz.draw import Draw
from tests.fuzz.judge import judge
from tests.fuzz.operations import Operation
from tests.fuzz.run import AREAS, Found, call, calls


def test_a_few_calls_of_every_area_are_right() -> None:
    found = Found()
    for (area, seed), _ in zip(calls(1), range(24), strict=False):
        call(area, seed, found)
    assert found.findings == {}
    assert {area for area, _ in found.verdicts} == set(AREAS)


def test_a_sign_that_is_turned_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    right = attend.difference

    def turned(streams: tuple[torch.Tensor, ...], gate: torch.Tensor | None) -> torch.Tensor:
        assert gate is not None
        return right(streams, -gate)

    monkeypatch.setitem(attend.MIXES, "difference", turned)
    verdicts = [judge(Operation.draw(Draw(seed))).verdict for seed in range(1, 25)]
    assert "wrong" in verdicts

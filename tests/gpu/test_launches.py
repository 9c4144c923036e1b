"""What the host does to launch the Triton kernels on a GPU: it waits for nothing, and a decoded token is the launch of
the one before."""

from collections.abc import Iterator
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.gpu.device import OnCuda, bare, gpu, on_cuda, waiting

pytest.importorskip("triton", reason="Triton is not installed")

from clearhead.kernels.triton import backward, endings, forward, launch, ops, ranges


class Recorded:
    """In place of a compiled kernel: its grid and arguments."""

    def __init__(self, name: str, seen: list[tuple[Any, ...]]) -> None:
        self.name, self.seen = name, seen

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        def run(*arguments: Any, **constants: Any) -> None:
            described = [_told(x) for x in arguments]
            self.seen.append((self.name, grid, described, constants))

        return run


def _told(x: Any) -> Any:
    if isinstance(x, Tensor):
        # A kernel that was given a tensor of the CPU would fail on a GPU.
        assert isinstance(x, OnCuda)
        return tuple(x.shape), x.stride(), x.dtype
    return x


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[tuple[Any, ...]]]:
    seen: list[tuple[Any, ...]] = []
    kernels = (
        (forward, "forward"),
        (endings, "combine"),
        (endings, "deltas"),
        (backward, "backward"),
        (ranges, "meeting"),
    )
    for module, name in kernels:
        monkeypatch.setattr(module, name, Recorded(name, seen))
    monkeypatch.setattr(torch.cuda, "device_of", lambda _: nullcontext())
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (9, 0))
    monkeypatch.setattr(launch, "processors", lambda _: 132)
    with gpu():
        yield seen


def inputs(
    queries: int, keys: int, *, offset: int = 0, position: int | None = None, everything: bool = False
) -> launch.TritonInputs:
    """V1 with two heads of width 64 over one key-value group, in bfloat16."""
    q1, q2 = (on_cuda(torch.randn(2, 2, queries, 64).bfloat16()) for _ in range(2))
    k1, k2 = (on_cuda(torch.randn(2, 1, keys, 64).bfloat16()) for _ in range(2))
    v, gate = on_cuda(torch.randn(2, 1, keys, 128).bfloat16()), on_cuda(torch.randn(2, 2, queries, 1))
    padding = on_cuda(torch.ones(2, keys, dtype=torch.bool)) if everything else None
    documents = on_cuda(torch.zeros(2, keys, dtype=torch.long)) if everything else None
    slopes = on_cuda(torch.ones(2)) if everything else None
    place = None if position is None else on_cuda(torch.tensor(position))
    window = 100 if everything else 0
    return launch.TritonInputs(
        *(q1, q2, k1, k2, v, gate, padding, documents, place, slopes, None, None),
        *(offset, window, True, 0.125, 0.0, 1.0, False),
    )


@pytest.mark.parametrize("everything", [False, True])
def test_forward_and_backward_wait_for_nothing(launches: list[tuple[Any, ...]], everything: bool) -> None:
    made = inputs(300, 300, everything=everything)
    with waiting() as seen:
        results = ops.outputs(made.q1, made.q2, made.v, False, True)
        launch.forward(made, *results, True)
        gradients = ops.gradients(*made[:12])
        grad = torch.zeros_like(results[0])
        launch.backward(made, grad, *results[:3], gradients)
    assert seen == []
    names = [name for name, *_ in launches]
    assert names.count("forward") == 1 and "backward" in names and ("meeting" in names) == everything
    assert all(constants["BLOCK_M"] for name, _, _, constants in launches if name in ("forward", "backward"))


def test_decoding_has_one_launch_whatever_the_position(launches: list[tuple[Any, ...]]) -> None:
    """A cache of fixed size: nothing but the number in a tensor changes, so a CUDA graph can be replayed."""
    for position in (5, 900):
        made = inputs(1, 4096, position=position, everything=True)
        results = ops.outputs(made.q1, made.q2, made.v, False, False)
        with waiting() as seen:
            launch.forward(made, *results, False)
        assert seen == []
    half = len(launches) // 2
    assert launches[:half] == launches[half:]
    assert [name for name, *_ in launches[:half]] == ["meeting", "forward", "combine"]
    assert int(bare(made.position)) == 900

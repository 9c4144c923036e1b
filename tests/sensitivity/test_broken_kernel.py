"""Break the CPU kernel one term at a time: the comparison with the oracles must notice, in its own precision."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from clearhead.core.masks import MaskSpec
from clearhead.core.streams import Streams
from clearhead.kernels.cpu import library
from clearhead.kernels.cpu.kernel import Cpu
from tests.kernels.support import Case, answers, assert_right, assert_rounding_only, op_of, solve

Patch = pytest.MonkeyPatch
Change = Callable[[Streams, MaskSpec, float], tuple[Streams, MaskSpec, float]]


def asked(name: str, change: Change) -> Callable[[Patch], None]:
    """Another problem than the one that was asked for."""

    def apply(patch: Patch) -> None:
        original = Cpu.run
        patch.setattr(
            Cpu, "run", lambda self, heads, mask, scale: original(self, *change(heads, mask, scale))
        )

    apply.__name__ = name
    return apply


def computed(name: str, call: str, change: Callable[[library.CProblem], object]) -> Callable[[Patch], None]:
    """Another problem in the forward or the backward pass alone."""

    def apply(patch: Patch) -> None:
        original = getattr(library.Library, call)

        def broken(self: library.Library, problem: library.CProblem) -> None:
            change(problem)
            original(self, problem)

        patch.setattr(library.Library, call, broken)

    apply.__name__ = f"{name}_{call}"
    return apply


def with_(field: str, change: Callable[[Any], Any]) -> Callable[[library.CProblem], object]:
    return lambda problem: setattr(problem, field, change(getattr(problem, field)))


def swapped(field: str) -> Callable[[library.CProblem], object]:
    def swap(problem: library.CProblem) -> None:
        pair = getattr(problem, field)
        first, second = (library.CTensor.from_buffer_copy(x) for x in pair)
        pair[0], pair[1] = second, first

    return swap


def groups_tiled(heads: Streams, mask: MaskSpec, scale: float) -> tuple[Streams, MaskSpec, float]:
    """Head h on group h mod G instead of h // (H / G)."""
    groups, count = heads.v.shape[1], heads.q[0].shape[1]
    index = torch.arange(count) % groups
    keys = tuple(k[:, index] for k in heads.k)
    return replace(heads, k=keys, v=heads.v[:, index]), mask, scale


def rounded_once_too_often(x: Tensor) -> Tensor:
    return x.bfloat16().to(x.dtype)


BREAKS = [
    asked("gate_sign", lambda h, m, s: (replace(h, gate=-h.gate), m, s)),
    asked("no_gate_gradient", lambda h, m, s: (replace(h, gate=h.gate.detach()), m, s)),
    asked("gate_of_the_next_token", lambda h, m, s: (replace(h, gate=h.gate.roll(1, 2)), m, s)),
    asked("gate_of_the_next_head", lambda h, m, s: (replace(h, gate=h.gate.roll(1, 1)), m, s)),
    asked("queries_swapped", lambda h, m, s: (replace(h, q=h.q[::-1]), m, s)),
    asked("keys_swapped", lambda h, m, s: (replace(h, k=h.k[::-1]), m, s)),
    asked("one_key_for_both", lambda h, m, s: (replace(h, k=h.k[:1]), m, s)),
    asked("groups_tiled", groups_tiled),
    asked("scale", lambda h, m, s: (h, m, s * (1 + 2**-14))),
    asked("scale_sign", lambda h, m, s: (h, m, -s)),
    asked("not_causal", lambda h, m, s: (h, replace(m, is_causal=False), s)),
    asked("off_by_one", lambda h, m, s: (h, replace(m, offset=h.v.shape[2] - h.q[0].shape[2] + 1), s)),
    asked("top_left", lambda h, m, s: (h, replace(m, offset=0), s)),
    asked("window_wider", lambda h, m, s: (h, replace(m, window=m.window + 1), s)),
    asked("window_narrower", lambda h, m, s: (h, replace(m, window=m.window - 1), s)),
    asked("no_padding", lambda h, m, s: (h, replace(m, key_padding=None), s)),
    asked("no_documents", lambda h, m, s: (h, replace(m, documents=None), s)),
    asked(
        "keys_in_half_precision",
        lambda h, m, s: (replace(h, k=tuple(map(rounded_once_too_often, h.k))), m, s),
    ),
    asked("values_in_half_precision", lambda h, m, s: (replace(h, v=rounded_once_too_often(h.v)), m, s)),
    *(
        computed(name, call, change)
        for call in ("forward", "backward")
        for name, change in (
            ("offset", with_("offset", lambda x: x + 1)),
            ("window", with_("window", lambda x: x + 1)),
            ("scale", with_("scale", lambda x: x * (1 + 2**-14))),
            ("causal", with_("causal", lambda x: 0)),
            ("padding", with_("padding", lambda x: None)),
            ("documents", with_("documents", lambda x: None)),
            ("queries_swapped", swapped("q")),
            ("keys_swapped", swapped("k")),
            ("key_streams", with_("key_streams", lambda x: 1)),
        )
    ),
    computed("gradients_of_queries_swapped", "backward", swapped("grad_q")),
    computed("gradients_of_keys_swapped", "backward", swapped("grad_k")),
]
CASE = Case(
    own_keys=True,
    value_width=32,
    queries=40,
    keys=60,
    causal=True,
    window=25,
    hidden=("padding", "documents"),
)


@pytest.mark.skipif(library.missing() is not None, reason=str(library.missing()))
@pytest.mark.parametrize("broken", BREAKS, ids=lambda value: value.__name__)
def test_the_oracle_notices(broken: Callable[[Patch], None]) -> None:
    solution = solve(CASE, torch.float32)

    def check() -> None:
        assert_right(
            answers(op_of(CASE, "cpu"), solution.inputs, torch.float32, "model"), solution, torch.float32
        )

    check()
    with pytest.MonkeyPatch.context() as patch:
        broken(patch)
        with pytest.raises(AssertionError, match=" off"):
            check()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=("float32", "bfloat16"))
@pytest.mark.parametrize("which", range(5), ids=("output", "q", "k", "v", "lambda"))
def test_a_few_roundings_too_many_are_noticed(which: int, dtype: torch.dtype) -> None:
    """One element of one answer, off by a little more than what is allowed; and a NaN."""
    solution = solve(CASE, dtype)
    assert_rounding_only(solution.expected, solution.expected, solution.units)
    at = int(solution.units[which].argmax())
    for error in (2.5 * solution.units[which].flatten()[at], torch.tensor(float("nan"))):
        found = [x.clone(memory_format=torch.contiguous_format) for x in solution.expected]
        found[which].view(-1)[at] += error
        with pytest.raises(AssertionError, match="roundings off"):
            assert_rounding_only(found, solution.expected, solution.units)

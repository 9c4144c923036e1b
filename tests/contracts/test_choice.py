"""What the choice of a backend rests on: one description of a problem, preferences, and refusals that are asked for."""

import ast
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import clearhead.models.shared as shared
import clearhead.nn.attention as layers
from clearhead.bench import cases, peers
from clearhead.core.attend import MIXES, Mix, difference, problem_of
from clearhead.core.capability import capability_of, compute_capability, parse_device
from clearhead.core.dispatch import AttentionProblem, Backend, Kernel, Plan, choose, load_backend, plan
from clearhead.core.masks import MaskSpec
from clearhead.core.streams import HeadShape
from clearhead.engines.eager import Eager
from clearhead.engines.sdpa import Sdpa
from clearhead.models import ClearheadConfig, ClearheadForCausalLM
from clearhead.nn import Attention
from clearhead.registry import VARIANTS, resolve
from clearhead.variants.base import Variant
from clearhead.variants.differential import Differential

SOURCE = Path(__file__).parents[2] / "src" / "clearhead"
PACKED = AttentionProblem(
    2,
    False,
    4,
    2,
    64,
    64,
    32,
    64,
    torch.bfloat16,
    "cuda",
    frozenset({"causal", "documents"}),
    True,
    "difference",
)


class Liked(Eager):
    """An engine with an opinion, and a count of how often it was asked whether it can."""

    def __init__(self, name: str, preferred: bool | None, able: bool = True) -> None:
        self.name, self.opinion, self.able = name, preferred, able

    def preferred(self, problem: AttentionProblem) -> bool | None:
        return self.opinion

    def refusal(self, problem: AttentionProblem) -> str | None:
        return None if self.able else "it cannot"


ORDERS: dict[str, tuple[list[Liked], str, list[str]]] = {
    "registered order without measurements": ([Liked("a", None), Liked("b", None)], "a", []),
    "a preferred one goes before the rest": ([Liked("a", None), Liked("b", True)], "b", ["a"]),
    "the first of two preferred ones": ([Liked("a", True), Liked("b", True)], "a", []),
    "not one that cannot": ([Liked("a", None), Liked("b", True, able=False)], "a", []),
    "one spoken against goes last": ([Liked("a", False), Liked("b", None)], "b", ["a"]),
    "and is taken where nothing else can": ([Liked("a", False), Liked("b", None, able=False)], "a", []),
    "also behind a preferred one": ([Liked("a", False), Liked("b", None), Liked("c", True)], "c", ["a", "b"]),
}


@pytest.mark.parametrize("case", ORDERS)
def test_preferences(case: str) -> None:
    backends, taken, passed_over = ORDERS[case]
    found = choose(tuple(backends), PACKED, automatic=True)
    assert found.backend.name == taken
    assert [name for name, reason in found.refusals if reason != "it cannot"] == passed_over
    named = choose((backends[0],), PACKED, automatic=False)
    assert named.backend is backends[0] and named.refusals == ()


def test_a_measurement_can_prefer_flex_on_packed_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    """The mechanism; nothing was measured yet, so by itself the registered order stays."""
    windows = replace(PACKED, mask=frozenset({"causal", "window"}))
    assert [plan(asked).backend.name for asked in (PACKED, windows)] == ["sdpa", "sdpa"]

    def skips_blocks(self: Backend, problem: AttentionProblem) -> bool | None:
        return True if problem.device == "cuda" and problem.mask & {"documents", "window"} else None

    monkeypatch.setattr(type(load_backend("flex")), "preferred", skips_blocks)
    assert [plan(asked).backend.name for asked in (PACKED, windows)] == ["flex", "flex"]
    assert dict(plan(PACKED).refusals)["sdpa"] == "measured slower than another at this shape"
    for changes in (
        {"mask": frozenset({"causal"})},
        {"dtype": torch.float64},
        {"device": "cpu", "needs_grad": True},
    ):
        assert plan(replace(PACKED, **changes)).backend.name != "flex"


def test_reason_against_is_all_there_is_to_know() -> None:
    """Modes are declared by a kernel and not looked at by its `refusal`."""
    cpu = load_backend("cpu")
    asked = replace(PACKED, device="cpu", modes=frozenset({"forward"}))
    with pytest.raises(ValueError) as raised:
        choose((cpu,), asked, automatic=False)
    assert f"({cpu.name}: {cpu.reason_against(asked)})" in str(raised.value)
    assert "forward-mode" in (cpu.reason_against(asked) or "")


def test_nobody_else_describes_a_problem() -> None:
    builders = []
    for path in SOURCE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if (
                isinstance(node, ast.Call)
                and isinstance(node.func, ast.Name)
                and node.func.id == "AttentionProblem"
            ):
                builders.append(path.name)
    assert builders == []


@pytest.mark.parametrize("name", VARIANTS)
def test_layer_and_model_have_the_same_problem(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[AttentionProblem] = []
    for module in (layers, shared):
        prepare = module.prepare

        def noted(
            backends: Any, problem: AttentionProblem, *rest: Any, prepare: Callable[..., Any] = prepare
        ) -> Any:
            seen.append(problem)
            return prepare(backends, problem, *rest)

        monkeypatch.setattr(module, "prepare", noted)
    sizes: dict[str, Any] = {"hidden_size": 16, "num_attention_heads": 4, "num_key_value_heads": 2}
    config = ClearheadConfig(vocab_size=9, num_hidden_layers=1, attention=name, **sizes)
    ClearheadForCausalLM(config)(torch.arange(5)[None], use_cache=False)
    Attention(16, 4, num_kv_heads=2, variant=name)(torch.zeros(1, 5, 16), is_causal=True)
    assert len(seen) == 2 and seen[0] == seen[1]


@pytest.mark.parametrize("formula", ["variant", "softmax"])
@pytest.mark.parametrize("variant", ["softmax", "differential", "differential_v2"])
def test_a_benchmark_case_has_the_problem_of_its_inputs(variant: Any, formula: Any) -> None:
    case = cases.AttentionCase("t", variant, (), 4, 2, 8, 5, 5, True, True, "float32")
    inputs = peers.make_inputs(case)
    heads = peers._streams(peers.as_softmax(inputs) if formula == "softmax" else inputs)
    mixing: Any = "single" if len(heads.q) == 1 else "difference"
    assert peers.problem(case, formula) == problem_of(heads, MaskSpec(is_causal=True), mixing)


def test_capability(monkeypatch: pytest.MonkeyPatch) -> None:
    assert capability_of(torch.device("cpu")) is None
    assert parse_device("cpu") == (torch.device("cpu"), None)
    assert parse_device("cuda:sm_90") == (torch.device("cuda"), "sm_90")
    assert parse_device("cuda:gfx942") == (torch.device("cuda"), "gfx942")
    assert [compute_capability(c) for c in ("sm_75", "sm_120", "gfx942", None)] == [
        (7, 5),
        (12, 0),
        None,
        None,
    ]
    for wrong in ("cuda:sm_9", "gpu", "", "cpu:sm_90"):
        with pytest.raises(ValueError, match="is no device: give one such as cpu, cuda"):
            parse_device(wrong)

    class Card:
        major, minor = 9, 0

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: Card)
    monkeypatch.setattr("clearhead.core.capability._known", {})
    assert capability_of(torch.device("cuda:3")) == "sm_90"
    elsewhere = replace(PACKED, device="cpu").on(torch.device("cuda:3"))
    assert (elsewhere.device, elsewhere.capability) == ("cuda", "sm_90")
    assert elsewhere.on(torch.device("cpu")).capability is None


def wrapped() -> Mix:
    def mix(streams: tuple[Tensor, ...], gate: Tensor | None) -> Tensor:
        return difference(streams, gate)

    return mix


class Declared(Differential):
    mixing = "difference"

    @property
    def mix(self) -> Mix:
        return wrapped()


class Undeclared(Differential):
    @property
    def mix(self) -> Mix:
        return lambda streams, gate: 2 * difference(streams, gate)


def plan_of(variant: type[Variant]) -> Plan:
    made = variant(HeadShape(512, 8, 8, 64))
    asked = AttentionProblem.of_widths(
        made.sizes,
        queries=256,
        keys=256,
        mask=MaskSpec(is_causal=True),
        mixing=made.mixing,
        dtype=torch.float32,
        device=torch.device("cpu"),
        needs_grad=True,
    )
    return plan(asked)


def test_a_wrapped_difference_keeps_its_kernel() -> None:
    assert str(plan_of(Declared)) == str(plan_of(Differential))
    assert plan_of(Undeclared).backend.name == "sdpa"
    assert (Declared.mixing, Undeclared.mixing) == ("difference", "other")


class Heir(Undeclared):
    """What its parent computes is still nothing that a kernel knows."""


class Contradiction(Differential):
    mixing = "single"


class Empty(Differential):
    mixing = "other"


def test_a_mixing_that_cannot_be_is_an_error() -> None:
    shape = HeadShape(32, 4, 4, 8)
    assert Heir(shape).mixing == "other"
    with pytest.raises(ValueError, match="mixing is 'single' for 2 query streams; it must be"):
        Contradiction(shape)
    with pytest.raises(ValueError, match="has mixing 'other', so it must have a mix of its own"):
        Empty(shape)


@pytest.mark.parametrize("name", VARIANTS)
def test_registered_variants_mix_as_they_say(name: str) -> None:
    variant = resolve("variants", name)(HeadShape(32, 4, 4, 8))
    assert variant.mix is MIXES[variant.mixing]


def test_every_backend_can_be_asked_for_its_preference() -> None:
    """Also for a problem that it refuses."""
    for name in ("cpu", "triton", "sdpa", "flex", "eager"):
        backend = load_backend(name)
        for asked in (PACKED, replace(PACKED, device="mps", mixing="other", dtype=torch.float64)):
            expected = (bool,) if isinstance(backend, Kernel) else (type(None),)
            assert isinstance(backend.preferred(asked), expected)
    assert Sdpa().preferred(PACKED) is None

"""`Attention(variant=...)`: every registered variant is a layer, and the named layers are no others."""

from importlib.metadata import EntryPoint
from typing import Any

import pytest
import torch

import clearhead.nn as nn
import clearhead.registry as registry
from clearhead.nn import Attention
from clearhead.registry import VARIANTS
from clearhead.variants.differential import Differential
from clearhead.variants.softmax import Softmax
from tests.contracts.layer_cases import CLASSES
from tests.contracts.support import rand

OPTIONS: dict[str, dict[str, Any]] = {
    "softmax": {"head_norm": True},
    "differential": {"lambda_init": 0.5, "head_norm": False},
    "differential_v2": {},
    "collinear": {"mode": "slack", "activation": "softplus"},
    "differential_collinear": {"mode": "strict", "lambda_init": 0.3},
    "differential_v2_collinear": {"mode": "slack"},
    "dex": {"heads": [2], "anneal": 4},
    "diff_lora": {"rank": 3, "both": True, "lambda_warmup": 5},
}
# What a checkpoint of each layer holds beside the four projections.
OWN_WEIGHTS: dict[str, list[str]] = {
    "softmax": [],
    "differential": ["lambda_q1", "lambda_k1", "lambda_q2", "lambda_k2", "head_norm.weight"],
    "differential_v2": ["lambda_proj.weight"],
    "collinear": [],
    "differential_collinear": ["lambda_q1", "lambda_k1", "lambda_q2", "lambda_k2", "head_norm.weight"],
    "differential_v2_collinear": ["lambda_proj.weight"],
    "dex": ["dex.weight", "dex.factor.lambda_learn", "dex.factor.schedule.progress"],
    "diff_lora": [
        *("lambda_q1", "lambda_k1", "lambda_q2", "lambda_k2"),
        *("query_up.weight", "key_up.weight"),
    ],
}


@pytest.mark.parametrize("name", VARIANTS)
@pytest.mark.parametrize("given", [False, True])
def test_it_is_the_named_layer_to_the_bit(name: str, given: bool) -> None:
    options = OPTIONS[name] if given else {}
    made = []
    for build in (CLASSES[name], lambda *a, **o: Attention(*a, variant=name, **o)):
        torch.manual_seed(3)
        made.append(build(16, 4, num_kv_heads=2, layer_idx=2, bias=True, **options))
    named, general = made
    assert list(named.state_dict()) == list(general.state_dict())
    assert all(map(torch.equal, named.state_dict().values(), general.state_dict().values()))
    x = torch.randn(2, 5, 16)
    assert torch.equal(named(x, is_causal=True), general(x, is_causal=True))
    assert type(named.variant) is type(general.variant)


@pytest.mark.parametrize("name", VARIANTS)
def test_names_of_weights(name: str) -> None:
    projections = [f"{part}_proj.weight" for part in "qkvo"]
    own = [f"variant.{part}" for part in OWN_WEIGHTS[name]]
    assert list(Attention(16, 4, variant=name).state_dict()) == [*own, *projections]


@pytest.mark.compiles
@pytest.mark.parametrize("name", VARIANTS)
def test_compiled_as_one_graph(name: str) -> None:
    layer, x = Attention(16, 4, variant=name, **OPTIONS[name]).double(), rand(2, 5, 16)
    compiled = torch.compile(layer, fullgraph=True, backend="eager")
    assert torch.equal(compiled(x, is_causal=True), layer(x, is_causal=True))


class Halved(Softmax):
    """A third party's."""

    def __init__(self, shape: Any, *, factor: float = 0.5) -> None:
        super().__init__(shape)
        self.factor = factor

    def finish(self, o: torch.Tensor) -> torch.Tensor:
        return o * self.factor


def test_a_third_party_s_entry_point_is_a_layer(monkeypatch: pytest.MonkeyPatch) -> None:
    point = EntryPoint("halved", f"{__name__}:Halved", "clearhead.variants")
    monkeypatch.setattr(registry, "entry_points", lambda group: [point] if group == point.group else [])
    monkeypatch.setattr(registry, "_installed", {})
    torch.manual_seed(0)
    layer, x = Attention(16, 4, variant="halved", factor=0.25), torch.randn(1, 3, 16)
    torch.manual_seed(0)
    assert torch.allclose(layer(x), 0.25 * Attention(16, 4)(x), atol=1e-6)


WRONG: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"variant": "diferential"}, ValueError, "unknown variant 'diferential': did you mean 'differential'?"),
    ({"variant": Differential}, ValueError, "variant must be the name of a registered variant, not <class"),
    (
        {"variant": "collinear", "lambda_init": 0.5},
        TypeError,
        "Attention with variant 'collinear' has no argument 'lambda_init'",
    ),
    ({"num_kv_head": 2}, TypeError, "has no argument 'num_kv_head': did you mean 'num_kv_heads'?"),
    ({"variant": "collinear", "mod": "slack"}, TypeError, "has no argument 'mod': did you mean 'mode'?"),
    ({"variant": "softmax", "head_norm": "no"}, ValueError, "head_norm must be True or False, not 'no'"),
    ({"variant": "collinear", "position": "nope"}, ValueError, "position must be one that rotates"),
]


@pytest.mark.parametrize(("arguments", "error", "sentence"), WRONG, ids=str)
def test_what_is_wrong_is_said(arguments: dict[str, Any], error: type[Exception], sentence: str) -> None:
    with pytest.raises(error) as raised:
        Attention(16, 4, **arguments)
    assert sentence in str(raised.value)


def test_a_named_layer_is_of_one_variant() -> None:
    assert isinstance(nn.DifferentialAttention(16, 4, variant="differential").variant, Differential)
    with pytest.raises(
        ValueError, match="'collinear' was asked of DifferentialAttention, which is 'differential'"
    ):
        nn.DifferentialAttention(16, 4, variant="collinear")


def test_options_of_the_released_code_reach_the_layer() -> None:
    """norm_eps and lambda_std were options of models alone."""
    layer = nn.DifferentialAttention(16, 4, norm_eps=1e-3, lambda_std=0.2)
    assert layer.variant.lambda_std == 0.2 and layer.variant.head_norm.eps == 1e-3

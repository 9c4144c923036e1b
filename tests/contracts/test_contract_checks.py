"""`clearhead.testing`: everything registered keeps its contracts, and a term broken on purpose is noticed."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from clearhead.core.dispatch import AttentionProblem, Caps, load_backend
from clearhead.core.masks import MaskSpec
from clearhead.core.streams import HeadShape, Streams, repeat_kv
from clearhead.engines.eager import Eager
from clearhead.kernels.cpu import library
from clearhead.positions.base import PlaneRotation
from clearhead.positions.rope import Rope
from clearhead.registry import names, resolve
from clearhead.testing import check_engine, check_kernel, check_position, check_variant
from clearhead.testing.variants import PROGRESS
from clearhead.variants.differential import Differential
from clearhead.variants.softmax import Softmax
from tests.oracles.layers import LayerSpec, layer
from tests.oracles.rotary import rotate


def oracle_of(name: str) -> Callable[..., Tensor]:
    def oracle(x: Tensor, weights: dict[str, Tensor], see: Tensor) -> Tensor:
        groups = weights["v_proj"].shape[0] // 8
        told = {"progress": PROGRESS} if name == "dex" else {}
        spec = LayerSpec(name, heads=4, kv_heads=groups, head_dim=8, layer=1, options=told)
        return layer(spec, weights, x, allowed=see)[0]

    return oracle


@pytest.mark.parametrize("name", names("variants"))
def test_variants(name: str) -> None:
    check_variant(resolve("variants", name), engines=("eager",), oracle=oracle_of(name))


@pytest.mark.parametrize("name", names("positions"))
def test_positions(name: str) -> None:
    oracle = (lambda q, positions: rotate(q, positions)) if name == "rope" else None
    check_position(resolve("positions", name), oracle=oracle)


FEW = ("causal", "blind_rows")


@pytest.mark.parametrize("name", ["eager", "sdpa"])
def test_engines(name: str) -> None:
    assert len(check_engine(load_backend(name), masks=FEW).ran) == 2 * 4 * 3 * 3 * 2  # type: ignore[arg-type]


@pytest.mark.skipif(library.missing() is not None, reason=str(library.missing()))
def test_kernels() -> None:
    checked = check_kernel(load_backend("cpu"), masks=FEW)  # type: ignore[arg-type]
    assert len(checked.ran) == 4 * 3 * 2 * 2
    assert "it computes in bfloat16, float32, not in float64" in checked.refused


class ForgetsFactor(Differential):
    """(1 − λ_init) is left out."""

    def finish(self, o: Tensor) -> Tensor:
        return super().finish(o) / (1 - self.lambda_init)


class Peeks(Softmax):
    """A query is moved by the last token's."""

    def split_queries(self, q: Tensor) -> tuple[Tensor, ...]:
        return super().split_queries(q + q[:, -1:])


class Idle(Softmax):
    """Has a parameter that nothing uses."""

    def __init__(self, shape: HeadShape) -> None:
        super().__init__(shape)
        self.unused = torch.nn.Parameter(torch.zeros(1))


class Bent(Softmax):
    """Mixes outputs in a way that is not linear."""

    @property
    def mix(self) -> Any:
        return lambda streams, gate: streams[0].tanh()


@pytest.mark.parametrize(
    ("broken", "sentence"),
    [
        (ForgetsFactor, "not what its oracle says"),
        (Peeks, "a later token changes an earlier output"),
        (Idle, "no finite gradient reaches variant.unused"),
        (Bent, "mix is not linear"),
    ],
)
def test_a_broken_variant_is_noticed(broken: Any, sentence: str) -> None:
    oracle = oracle_of("differential") if broken is ForgetsFactor else None
    with pytest.raises(AssertionError, match=sentence):
        check_variant(broken, kv_heads=(4,), engines=("eager",), oracle=oracle)


class Rounded(Rope):
    """Angles are taken in the dtype of the queries."""

    def forward(self, positions: Tensor, *more: Any) -> Any:
        return super().forward(positions.to(more[-1]).long(), *more)


class Lopsided(Rope):
    """Keys are not turned."""

    def rotation(self, *arguments: Any, **more: Any) -> PlaneRotation:
        turn = super().rotation(*arguments, **more)
        still = torch.ones_like(turn.key_cos), torch.zeros_like(turn.key_sin)
        return PlaneRotation(turn.query_cos, turn.query_sin, *still, turn.layout)


@pytest.mark.parametrize(
    ("broken", "sentence"),
    [(Rounded, "position 4096 in torch.bfloat16"), (Lopsided, "shifted together")],
)
def test_a_broken_position_is_noticed(broken: type[Rope], sentence: str) -> None:
    with pytest.raises(AssertionError, match=sentence):
        check_position(broken)


class Blind(Eager):
    """Rows that see nothing are the mean of all values."""

    def __call__(self, call: Any, mask: Any, scale: float) -> tuple[Tensor, Tensor | None]:
        output, maps = super().__call__(call, mask, scale)
        mean = repeat_kv(call.v, output.shape[1]).mean(2, keepdim=True)
        return torch.where((output == 0).all(-1, keepdim=True), mean, output), maps


class Silent(Eager):
    """Refuses everything and says nothing."""

    def refusal(self, problem: AttentionProblem) -> str | None:
        return ""


class Boasts(Eager):
    """Promises maps and returns none."""

    def caps(self, device: str) -> Caps:
        return Caps(maps=True)

    def __call__(self, call: Any, mask: Any, scale: float) -> tuple[Tensor, Tensor | None]:
        return super().__call__(call, mask, scale)[0], None


@pytest.mark.parametrize(
    ("broken", "masks", "sentence"),
    [
        (Blind(), ("blind_rows",), "mask 'blind_rows'.*the output is .* off"),
        (Silent(), ("none",), "refuses without a reason"),
        (Boasts(), ("none",), "promise maps"),
    ],
)
def test_a_broken_engine_is_noticed(broken: Eager, masks: tuple[str, ...], sentence: str) -> None:
    with pytest.raises(AssertionError, match=sentence):
        check_engine(broken, masks=masks)


def test_a_broken_kernel_is_noticed() -> None:
    real = type(load_backend("eager"))

    class Doubles(real):  # type: ignore[misc, valid-type]
        name = "doubles"

        def __call__(self, call: Any, mask: Any, scale: float) -> tuple[Tensor, Tensor | None]:
            return super().__call__(call, mask, 2 * scale)

    with pytest.raises(AssertionError, match="doubles: softmax, mha, mask 'none', float64: the output is"):
        check_engine(Doubles(), masks=("none",))


def test_what_runs_nothing_has_shown_nothing() -> None:
    from clearhead.core.dispatch import Kernel

    class Never(Kernel):
        name = "never"

        def refusal(self, problem: AttentionProblem) -> str | None:
            return "it is not built"

        def run(self, heads: Streams, mask: MaskSpec, scale: float) -> Tensor:
            raise AssertionError

    with pytest.raises(AssertionError, match="never ran none of the cases; it says: it is not built"):
        check_kernel(Never(), masks=("none",))

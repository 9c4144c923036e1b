"""Which backend runs a problem, decided once and explained.

A backend is an engine (runs softmax calls; the legaliser and the variant's `mix` do the rest) or a kernel (runs a
whole variant). `plan`
is pure: it looks at sizes and kinds, never at tensor values, and every refusal carries its reason.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field
from importlib import import_module
from typing import Any, ClassVar

import torch
from torch import Tensor

from clearhead.core.heads import Heads
from clearhead.core.legalise import Call, Lowering, WideValues, legalise
from clearhead.core.masks import MaskSpec
from clearhead.core.modes import MODES
from clearhead.registry import BACKEND_FACTORIES, did_you_mean, names, resolve

MASK_FEATURES = frozenset({"causal", "window", "padding", "documents", "dense", "bias", "alibi", "places"})
FLOATS = frozenset({torch.float32, torch.float64, torch.bfloat16, torch.float16})


@dataclass(frozen=True, slots=True)
class Problem:
    """One attention as the choice of a backend sees it.

    `ends_aligned`: the last query is the last key, see `MaskSpec`.
    `mixing` is "single" (one stream), "difference" (o1 − gate·o2) or "other", which no fused kernel knows.
    `modes`: what `active_modes` says.
    """

    streams: int
    shares_keys: bool
    heads: int
    kv_heads: int
    queries: int
    keys: int
    key_width: int
    value_width: int
    dtype: torch.dtype
    device: str
    mask: frozenset[str] = frozenset()
    ends_aligned: bool = True
    mixing: str = "single"
    needs_grad: bool = False
    needs_maps: bool = False
    modes: frozenset[str] = frozenset()


@dataclass(frozen=True, slots=True)
class Caps:
    """What an engine can do, as data.

    wide_values: how it takes values wider than keys: as they are, with keys padded, or only in slices.
    one_call:    it keeps state by layer and must be called once.
    max_width:   widest key or value it takes, None for any.
    modes:       which of `MODES` it is right in.
    """

    wide_values: WideValues = "native"
    one_call: bool = False
    masks: frozenset[str] = MASK_FEATURES
    dtypes: frozenset[torch.dtype] = FLOATS
    devices: frozenset[str] | None = None
    max_width: int | None = None
    grads: bool = True
    maps: bool = False
    modes: frozenset[str] = frozenset()


class Engine(ABC):
    """Runs grouped-query softmax attention calls."""

    name: str

    @abstractmethod
    def caps(self, device: str) -> Caps:
        """Capabilities on `device` ("cpu", "cuda", ...)."""

    @abstractmethod
    def prepare(self, mask: MaskSpec, problem: Problem, lowering: Lowering) -> Any:
        """The mask in this engine's own form, made once for all layers of a forward pass."""

    @abstractmethod
    def __call__(self, call: Call, mask: Any, scale: float) -> tuple[Tensor, Tensor | None]:
        """Outputs (B, H, L, E) of one call, and its maps (B, H, L, S) from an engine whose caps promise them."""

    def refusal(self, problem: Problem) -> str | None:
        """Why this engine cannot run `problem`, or None."""
        caps = self.caps(problem.device)
        if caps.devices is not None and problem.device not in caps.devices:
            return f"it runs on {', '.join(sorted(caps.devices))}, not on {problem.device}"
        if problem.dtype not in caps.dtypes:
            able = ", ".join(sorted(dtype_name(dtype) for dtype in caps.dtypes))
            return f"it computes in {able}, not in {dtype_name(problem.dtype)}"
        if problem.needs_maps and not caps.maps:
            return "it does not return attention maps"
        if problem.needs_grad and not caps.grads:
            return f"it has no backward pass on {problem.device}"
        missing = refused_modes(problem, caps.modes)
        if missing is not None:
            return missing
        if problem.mask - caps.masks:
            return f"it cannot express a mask with {', '.join(sorted(problem.mask - caps.masks))}"
        lowering = self.lowering(problem)
        if isinstance(lowering, str):
            return lowering
        width = problem.key_width if lowering.slices > 1 else max(problem.key_width, problem.value_width)
        if caps.max_width is not None and width > caps.max_width:
            return f"it takes heads up to {caps.max_width} wide, not {width}"
        return None

    def lowering(self, problem: Problem) -> Lowering | str:
        """The rewriting that makes `problem` legal here, or the reason why there is none."""
        caps = self.caps(problem.device)
        return legalise(
            problem.streams,
            problem.shares_keys,
            problem.key_width,
            problem.value_width,
            caps.wide_values,
            caps.one_call,
        )


def refused_modes(problem: Problem, known: frozenset[str]) -> str | None:
    """The sentence for what is going on around `problem` and is not `known`; None if all is."""
    unknown = [text for name, text in MODES.items() if name in problem.modes - known]
    return f"it has no {unknown[0]}" if unknown else None


class Kernel(ABC):
    """Runs a whole variant: the streams, their masks and their mixing, in one fused pass.

    takes_tables: it takes `Heads` with a table; others get them expanded.
    modes:        which of `MODES` it is right in; the choice of a backend refuses it in the others.
    passed_over:  why "auto" leaves it out where it is not `preferred`.
    """

    name: str
    passed_over: ClassVar[str] = "measured slower than what follows at this shape"
    takes_tables: ClassVar[bool] = False
    modes: ClassVar[frozenset[str]] = frozenset()

    @abstractmethod
    def refusal(self, problem: Problem) -> str | None:
        """Why this kernel cannot run `problem`, or None."""

    @abstractmethod
    def run(self, heads: Heads, mask: MaskSpec, scale: float) -> Tensor:
        """(B, H, L, E): the mixed output."""

    def preferred(self, problem: Problem) -> bool:
        """Whether `backend="auto"` should take it for `problem`, from measurements."""
        return True


Backend = Engine | Kernel


@dataclass(frozen=True, slots=True)
class Plan:
    """The chosen backend, how the streams reach it, and why the ones before it were passed over."""

    backend: Backend
    lowering: Lowering | None
    refusals: tuple[tuple[str, str], ...] = field(default=())

    def __str__(self) -> str:
        if self.lowering is None:
            return f"{self.backend.name}: fused"
        calls = self.lowering.calls
        return f"{self.backend.name}: {self.lowering.name}, {calls} call{'s' * (calls > 1)}"


_loaded: dict[str, Backend] = {}
_factories: list[Callable[[str], Backend | None]] = []


def register_factory(factory: Callable[[str], Backend | None]) -> None:
    """Let `factory` make backends for names outside the registry; it returns None for names that are not its own."""
    _factories.append(factory)


def load_backend(name: str) -> Backend:
    """The backend called `name`; ValueError with the nearest name if there is none."""
    if not isinstance(name, str):
        raise ValueError(f"backend must be the name of an engine or kernel, or 'auto', not {name!r}")
    if name not in _loaded:
        _loaded[name] = _make(name)
    return _loaded[name]


def _make(name: str) -> Backend:
    for table in ("kernels", "engines"):
        if name in names(table):
            backend: Backend = resolve(table, name)()
            return backend
    for module in BACKEND_FACTORIES:
        import_module(module)
    for factory in _factories:
        made = factory(name)
        if made is not None:
            return made
    known = (*names("kernels"), *names("engines"))
    raise ValueError(f"unknown backend {name!r}: {did_you_mean(name, (*known, 'auto'))}")


def automatic_backends() -> tuple[Backend, ...]:
    """What `backend="auto"` tries, in order: kernels, then engines, as registered."""
    return tuple(load_backend(name) for name in (*names("kernels"), *names("engines")))


def plan(problem: Problem, request: str = "auto") -> Plan:
    """Choose the backend for `problem`.

    "auto" takes the first that does not refuse; a name is taken or raises ValueError with its reason, never replaced.
    """
    if request != "auto":
        return choose((load_backend(request),), problem, automatic=False)
    return choose(automatic_backends(), problem, automatic=True)


def choose(backends: tuple[Backend, ...], problem: Problem, automatic: bool) -> Plan:
    """`plan` over backends already loaded, which is what a compiled forward pass can trace."""
    refusals: list[tuple[str, str]] = []
    for backend in backends:
        reason = refused_modes(problem, backend.modes) if isinstance(backend, Kernel) else None
        reason = backend.refusal(problem) if reason is None else reason
        if reason is not None:
            refusals.append((backend.name, reason))
        elif isinstance(backend, Kernel):
            if not automatic or backend.preferred(problem):
                return Plan(backend, None, tuple(refusals))
            refusals.append((backend.name, backend.passed_over))
        else:
            lowering = backend.lowering(problem)
            assert isinstance(lowering, Lowering)  # an engine that does not refuse has one
            return Plan(backend, lowering, tuple(refusals))
    reasons = "; ".join(f"{name}: {reason}" for name, reason in refusals)
    subject = (
        "no backend can run this attention"
        if automatic
        else f"backend {backends[0].name!r} cannot run this attention"
    )
    raise ValueError(f"{subject} ({reasons})")


def dtype_name(dtype: torch.dtype) -> str:
    """Its name without the "torch."."""
    return str(dtype).removeprefix("torch.")

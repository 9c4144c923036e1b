"""Which backend runs a problem, decided once and explained.

A backend is an engine (runs softmax calls; the lowering and the variant's `mix` do the rest) or a kernel (runs a
whole variant). `plan` is pure: it looks at sizes and kinds, never at tensor values, and every refusal carries its
reason.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from importlib import import_module
from typing import Any, ClassVar

import torch
from torch import Tensor

from clearhead.core.capability import against_gpu, capability_of
from clearhead.core.lowering import Lowering, SoftmaxCall, WideValues, lower_for
from clearhead.core.masks import MaskSpec
from clearhead.core.modes import active_modes, refused_modes
from clearhead.core.norm import HeadNorm
from clearhead.core.parts import rows_are_shared
from clearhead.core.refusals import LEAVES_NOTHING_OUT, SEES_ITS_PART, TAKES_NUMBERS
from clearhead.core.streams import Streams, Widths
from clearhead.core.values import dtype_name
from clearhead.registry import BACKEND_FACTORIES, did_you_mean, names, resolve

MASK_FEATURES = frozenset({"causal", "window", "padding", "documents", "dense", "bias", "alibi", "places"})
FLOATS = frozenset({torch.float32, torch.float64, torch.bfloat16, torch.float16})


@dataclass(frozen=True, slots=True)
class AttentionProblem:
    """One attention as the choice of a backend sees it; `of` makes it, from sizes and a mask.

    heads:           of the output, and of every stream unless `stream_heads` says otherwise.
    ends_aligned:    the last query is the last key, see `MaskSpec`.
    mixing:          "single" (one stream), "difference" (o1 − gate·o2) or "other", which no fused kernel knows.
    modes:           what `active_modes` says.
    capability:      the device's, for example "sm_90"; None where there is none to ask.
    stream_heads:    query heads of each stream where they are not equally many.
    differs_by_head: whether the mask says something else for each head.
    held_bits:       of the codes that the first keys and values are held as; None where all are numbers.
    shared_rows:     what `rows_are_shared` says.
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
    capability: str | None = None
    stream_heads: tuple[int, ...] | None = None
    differs_by_head: bool = False
    held_bits: int | None = None
    shared_rows: bool = False

    @classmethod
    def of(
        cls,
        heads: Sequence[int],
        kv_heads: int,
        key_streams: int,
        key_width: int,
        value_width: int,
        *,
        queries: int,
        keys: int,
        mask: MaskSpec,
        mixing: str,
        dtype: torch.dtype,
        device: torch.device,
        needs_grad: bool,
        needs_maps: bool = False,
        held_bits: int | None = None,
    ) -> "AttentionProblem":
        """The problem of streams with `heads` query heads each; every other way to make one comes here."""
        return cls(
            streams=len(heads),
            shares_keys=key_streams == 1,
            heads=max(heads),
            kv_heads=kv_heads,
            queries=queries,
            keys=keys,
            key_width=key_width,
            value_width=value_width,
            dtype=dtype,
            device=device.type,
            mask=mask.features,
            ends_aligned=mask.ends_aligned(queries, keys),
            mixing=mixing,
            needs_grad=needs_grad,
            needs_maps=needs_maps,
            modes=active_modes(),
            capability=capability_of(device),
            stream_heads=None if min(heads) == max(heads) else tuple(heads),
            differs_by_head=mask.differs_by_head,
            held_bits=held_bits,
            shared_rows=rows_are_shared(),
        )

    @classmethod
    def of_widths(cls, sizes: Widths, **rest: Any) -> "AttentionProblem":
        """`of` for what a variant says of its streams."""
        streams = (sizes.query_heads, sizes.kv_heads, sizes.key_streams, sizes.key_width, sizes.value_width)
        return cls.of(*streams, **rest)

    def on(self, device: torch.device) -> "AttentionProblem":
        """The same on another device."""
        return replace(self, device=device.type, capability=capability_of(device))


@dataclass(frozen=True, slots=True)
class Caps:
    """What an engine can do, as data.

    wide_values: how it takes values wider than keys: as they are, with keys padded, or only in slices.
    one_call:    it keeps state by layer and must be called once.
    max_width:   widest key or value it takes, None for any.
    modes:       which of `MODES` it is right in.
    capability:  the least compute capability of an NVIDIA GPU, None for any; amd: whether it runs on AMD's.
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
    capability: tuple[int, int] | None = None
    amd: bool = True


class Backend(ABC):
    """An engine or a kernel: what it cannot run, and what it is known to run fastest.

    passed_over: why "auto" leaves it out where `preferred` says no, or where another is preferred.
    takes_logits: it takes `Streams` with the gate's logit in place of the gate; others are given the gate.
    takes_shared_rows: it sees the whole row where processes share rows out; the choice refuses that to the others.
    """

    name: str
    takes_logits: ClassVar[bool] = False
    passed_over: ClassVar[str] = "measured slower than another at this shape"
    takes_shared_rows: ClassVar[bool] = False

    @property
    def drops_padded_queries(self) -> bool:
        """Whether it takes padding for what neither keys nor queries have, as functions do that are told lengths."""
        return False

    @abstractmethod
    def refusal(self, problem: AttentionProblem) -> str | None:
        """Why it cannot run `problem`, or None. `reason_against` asks, after what the backend declares as data."""

    def reason_against(self, problem: AttentionProblem) -> str | None:
        """Why it cannot run `problem`, or None: all that there is to know, for whoever asks."""
        return self.refusal(problem)

    def preferred(self, problem: AttentionProblem) -> bool | None:
        """What measurements say of "auto" taking it for `problem`; it may be asked of one that it refuses.

        True puts it before all backends without a True, False behind all others. None, where nothing was measured,
        leaves it its place in the registry.
        """
        return None


class Engine(Backend):
    """Runs grouped-query softmax attention calls."""

    @abstractmethod
    def caps(self, device: str) -> Caps:
        """Capabilities on `device` ("cpu", "cuda", ...)."""

    @abstractmethod
    def prepare(self, mask: MaskSpec, problem: AttentionProblem, lowering: Lowering) -> Any:
        """The mask in this engine's own form, made once for all layers of a forward pass."""

    @abstractmethod
    def __call__(self, call: SoftmaxCall, mask: Any, scale: float) -> tuple[Tensor, Tensor | None]:
        """Outputs (B, H, L, E) of one call, and its maps (B, H, L, S) from an engine whose caps promise them."""

    def reason_against(self, problem: AttentionProblem) -> str | None:
        if "block_sparse" in problem.mask:
            return LEAVES_NOTHING_OUT
        if problem.shared_rows and not self.takes_shared_rows:
            return SEES_ITS_PART
        return TAKES_NUMBERS if problem.held_bits is not None else self.refusal(problem)

    def refusal(self, problem: AttentionProblem) -> str | None:
        caps = self.caps(problem.device)
        if caps.devices is not None and problem.device not in caps.devices:
            return f"it runs on {', '.join(sorted(caps.devices))}, not on {problem.device}"
        too_old = against_gpu(problem.capability, caps.capability, caps.amd)
        if too_old is not None:
            return too_old
        if problem.dtype not in caps.dtypes:
            able = ", ".join(sorted(dtype_name(dtype) for dtype in caps.dtypes))
            return f"it computes in {able}, not in {dtype_name(problem.dtype)}"
        if problem.needs_maps and not caps.maps:
            return "it does not return attention maps"
        if problem.needs_grad and not caps.grads:
            return f"it has no backward pass on {problem.device}"
        missing = refused_modes(problem.modes, caps.modes)
        if missing is not None:
            return missing
        if problem.mask - caps.masks:
            return f"it cannot express a mask with {', '.join(sorted(problem.mask - caps.masks))}"
        if problem.stream_heads is not None and problem.differs_by_head:
            return "a mask or ALiBi's slopes by head need streams with equally many heads"
        lowering = self.lowering(problem)
        if isinstance(lowering, str):
            return lowering
        width = problem.key_width if lowering.slices > 1 else max(problem.key_width, problem.value_width)
        if caps.max_width is not None and width > caps.max_width:
            return f"it takes heads up to {caps.max_width} wide, not {width}"
        return None

    def remark(self, problem: AttentionProblem, lowering: Lowering) -> str | None:
        """What else there is to know of how it would run `problem`, for a reader of the plan; None for nothing."""
        return None

    def lowering(self, problem: AttentionProblem) -> Lowering | str:
        """The rewriting that makes `problem` legal here, or the reason why there is none."""
        caps = self.caps(problem.device)
        return lower_for(
            problem.streams,
            problem.shares_keys,
            problem.key_width,
            problem.value_width,
            caps.wide_values,
            caps.one_call,
            problem.stream_heads,
        )


class Kernel(Backend):
    """Runs a whole variant: the streams, their masks and their mixing, in one fused pass.

    takes_tables:  it takes `Streams` with a table; others get them expanded.
    takes_held:    it takes `Streams` whose first keys and values are codes; the choice refuses them to the others.
    leaves_out:    it can leave out blocks of keys, see `MaskSpec.sparse`; the choice refuses that to the others.
    modes:         which of `MODES` it is right in; the choice of a backend refuses it in the others.
    unequal_heads: it takes streams with different numbers of heads; the choice refuses them to the others.
    """

    passed_over: ClassVar[str] = "measured slower than what follows at this shape"
    takes_tables: ClassVar[bool] = False
    takes_held: ClassVar[bool] = False
    leaves_out: ClassVar[bool] = False
    modes: ClassVar[frozenset[str]] = frozenset()
    unequal_heads: ClassVar[bool] = False

    def reason_against(self, problem: AttentionProblem) -> str | None:
        if problem.held_bits is not None and not self.takes_held:
            return TAKES_NUMBERS
        if "block_sparse" in problem.mask and not self.leaves_out:
            return LEAVES_NOTHING_OUT
        if problem.shared_rows and not self.takes_shared_rows:
            return SEES_ITS_PART
        missing = refused_modes(problem.modes, self.modes)
        if missing is not None:
            return missing
        if problem.stream_heads is not None and not self.unequal_heads:
            counts = ", ".join(map(str, problem.stream_heads))
            return f"it takes streams with equally many heads, not {counts}"
        return self.refusal(problem)

    @abstractmethod
    def run(self, heads: Streams, mask: MaskSpec, scale: float) -> Tensor:
        """(B, H, L, E): the mixed output."""

    def norms(self, norm: HeadNorm, heads: Streams) -> bool:
        """Whether `run` norms its output where the streams say `norm`; by default it does not look at that."""
        return False

    def preferred(self, problem: AttentionProblem) -> bool | None:
        return True


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


def plan(problem: AttentionProblem, request: str = "auto") -> Plan:
    """Choose the backend for `problem`.

    "auto" takes the first that does not refuse, a `preferred` one before the others; a name is taken or raises
    ValueError with its reason, never replaced.
    """
    if request != "auto":
        return choose((load_backend(request),), problem, automatic=False)
    return choose(automatic_backends(), problem, automatic=True)


def choose(backends: tuple[Backend, ...], problem: AttentionProblem, automatic: bool) -> Plan:
    """`plan` over backends already loaded, which is what a compiled forward pass can trace."""
    refusals: list[tuple[str, str]] = []
    waiting: Plan | None = None  # the first that can and has no measurement
    spare: Plan | None = None  # the first that can and measurements speak against
    for backend in backends:
        if waiting is not None and not backend.preferred(problem):
            continue
        reason = backend.reason_against(problem)
        if reason is not None:
            refusals.append((backend.name, reason))
            continue
        preferred = backend.preferred(problem) if automatic else True
        if preferred:
            if waiting is not None:
                refusals.append((waiting.backend.name, waiting.backend.passed_over))
            return _plan(backend, problem, refusals)
        if preferred is None:
            waiting = _plan(backend, problem, refusals)
            continue
        spare = spare or _plan(backend, problem, refusals)
        refusals.append((backend.name, backend.passed_over))
    chosen = waiting or spare
    if chosen is not None:
        return chosen
    reasons = "; ".join(f"{name}: {reason}" for name, reason in refusals)
    subject = "no backend can" if automatic else f"backend {backends[0].name!r} cannot"
    raise ValueError(f"{subject} run this attention ({reasons})")


def _plan(backend: Backend, problem: AttentionProblem, refusals: list[tuple[str, str]]) -> Plan:
    if not isinstance(backend, Engine):
        return Plan(backend, None, tuple(refusals))
    lowering = backend.lowering(problem)
    assert isinstance(lowering, Lowering)  # an engine that does not refuse has one
    return Plan(backend, lowering, tuple(refusals))

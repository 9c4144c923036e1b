"""The ways to compute one attention, each ready to be checked and timed.

Legend: B batch, H output heads, G key-value heads, L queries, S keys, D key width, E value width.
"""

from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.backends import cuda as sdp

from clearhead.bench.cases import (
    KERNEL,
    KERNEL_ONE,
    NAIVE,
    SAME_QUERIES,
    TWIN,
    AttentionCase,
    Case,
    Formula,
)
from clearhead.bench.gpu_cases import (
    FLASH,
    FLEX,
    FLEX_ONE,
    TRITON,
    TRITON_ONE,
    TWIN_CUDNN,
    TWIN_FLASH,
    WIDE_3,
    WIDE_4,
)
from clearhead.bench.measure import reason_of
from clearhead.core.attend import Prepared, attend, difference
from clearhead.core.dispatch import AttentionProblem, Engine, Plan, load_backend
from clearhead.core.lowering import Lowering
from clearhead.core.masks import MaskSpec
from clearhead.core.streams import Streams
from clearhead.functional import attention, differential_attention
from clearhead.registry import names


class Unavailable(Exception):
    """A peer that cannot run here; the message is its reason."""


@dataclass(frozen=True, slots=True)
class PeerInputs:
    """Arguments as `clearhead.functional` takes them; `gate` is λ, or None for softmax attention.

    q (B, 2H, L, D) with the streams of a head next to each other, k (B, 2G, S, D) or (B, G, S, D), v (B, G, S, E),
    gate (1, 1, 1, 1) for V1, which has one λ a layer, and (B, H, L, 1) for V2.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    gate: Tensor | None = None

    def tensors(self) -> tuple[Tensor, ...]:
        return (self.q, self.k, self.v) if self.gate is None else (self.q, self.k, self.v, self.gate)

    def map(self, change: Callable[[Tensor], Tensor]) -> "PeerInputs":
        return PeerInputs(*(change(x) for x in self.tensors()))


Run = Callable[[PeerInputs], Tensor]


def _unchanged(inputs: PeerInputs) -> PeerInputs:
    return inputs


@dataclass(frozen=True, slots=True)
class Peer:
    """run is what is timed; arrange, which puts the case's inputs in this peer's own layout, is not.

    tokens_first: the output is (B, L, heads, width), not (B, heads, L, width).
    """

    run: Run
    formula: Formula = "variant"
    arrange: Callable[[PeerInputs], PeerInputs] = _unchanged
    tokens_first: bool = False

    def present(self, output: Tensor) -> Tensor:
        """The output as (B, heads, L, width)."""
        return output.transpose(1, 2) if self.tokens_first else output


def dtype_of(case: Case) -> torch.dtype:
    found = getattr(torch, case.dtype)
    assert isinstance(found, torch.dtype)
    return found


def shapes(case: AttentionCase) -> tuple[tuple[int, ...], ...]:
    """Of q, k and v."""
    return (
        (case.batch, case.streams * case.heads, case.queries, case.width),
        (case.batch, case.key_streams * case.groups, case.keys, case.width),
        (case.batch, case.groups, case.keys, case.value_width),
    )


def make_inputs(case: AttentionCase, seed: int = 0) -> PeerInputs:
    """Random inputs of the case, ready for gradients if it has a backward pass."""
    rng = torch.Generator().manual_seed(seed)
    q, k, v = (torch.randn(shape, generator=rng).to(dtype_of(case)) for shape in shapes(case))
    gate = None
    if case.variant == "differential":
        gate = torch.full((1, 1, 1, 1), 0.4)
    elif case.variant == "differential_v2":
        gate = torch.randn(case.batch, case.heads, case.queries, 1, generator=rng).sigmoid()
    return PeerInputs(q, k, v, gate).map(lambda x: x.to(case.device).requires_grad_(case.backward))


def timed_call(peer: Peer, case: AttentionCase) -> Callable[[], object]:
    """One call of `peer`, its inputs made, arranged and contiguous: the output, and the gradients if asked."""
    calls = [_timed_layer(peer, case, seed) for seed in range(case.layers)]
    return calls[0] if len(calls) == 1 else lambda: [call() for call in calls]


def _timed_layer(peer: Peer, case: AttentionCase, seed: int) -> Callable[[], object]:
    arranged = peer.arrange(make_inputs(case, seed))
    leaves = arranged.map(lambda x: x.detach().contiguous().requires_grad_(case.backward))
    if not case.backward:
        return torch.no_grad()(lambda: peer.run(leaves))
    softmax = peer.formula == "softmax"
    heads, width = (case.streams * case.heads, case.width) if softmax else (case.heads, case.value_width)
    size = (case.batch, heads, case.queries, width)
    cotangent = torch.randn(size, dtype=dtype_of(case), device=case.device)
    cotangent = peer.present(cotangent).contiguous()
    return lambda: torch.autograd.grad(peer.run(leaves), leaves.tensors(), cotangent)


def build(name: str, case: AttentionCase) -> Peer:
    """The peer of that name for `case`; `Unavailable` with the reason if it cannot run."""
    return PEERS[name](case)


def as_softmax(inputs: PeerInputs) -> PeerInputs:
    """The same numbers as softmax attention alone: the wide value of V1 becomes a value head for each stream."""
    width, value = inputs.q.shape[-1], inputs.v
    if value.shape[-1] != width:
        value = value.unflatten(-1, (-1, width)).permute(0, 1, 3, 2, 4).flatten(1, 2)
    return PeerInputs(inputs.q, inputs.k, value)


def _as_halves(inputs: PeerInputs) -> PeerInputs:
    """DiffLlama's order: the signal of every head, then the noise of every head; values and keys alike."""

    def sides(x: Tensor) -> Tensor:
        return x.unflatten(1, (-1, 2)).transpose(1, 2).flatten(1, 2)

    value = sides(as_softmax(inputs).v)
    return PeerInputs(sides(inputs.q), sides(inputs.k), value, inputs.gate)


def _streams(inputs: PeerInputs) -> Streams:
    if inputs.gate is None:
        return Streams((inputs.q,), (inputs.k,), inputs.v)
    q = inputs.q.unflatten(1, (-1, 2)).unbind(2)
    shared = inputs.k.shape[1] == inputs.v.shape[1]
    return Streams(
        q, (inputs.k,) if shared else inputs.k.unflatten(1, (-1, 2)).unbind(2), inputs.v, inputs.gate
    )


def problem(case: AttentionCase, formula: Formula = "variant") -> AttentionProblem:
    """The case as the choice of a backend sees it."""
    heads, kv_heads, key_streams, value_width = (
        (case.heads,) * case.streams,
        case.groups,
        case.key_streams,
        case.value_width,
    )
    if formula == "softmax":  # as `as_softmax` arranges it
        heads = (case.streams * case.heads,)
        kv_heads, key_streams, value_width = case.key_streams * case.groups, 1, case.width
    return AttentionProblem.of(
        heads,
        kv_heads,
        key_streams,
        case.width,
        value_width,
        queries=case.queries,
        keys=case.keys,
        mask=MaskSpec(is_causal=case.causal),
        mixing="single" if len(heads) == 1 else "difference",
        dtype=dtype_of(case),
        device=torch.device(case.device),
        needs_grad=case.backward,
    )


def missing_flash(name: str) -> str | None:
    """Why transformers has no package for one of its flash implementations, or None. Nothing is fetched for it."""
    from transformers.modeling_flash_attention_utils import FLASH_ATTENTION_COMPATIBILITY_MATRIX as KNOWN

    known = KNOWN[int(name.rpartition("_")[2])]
    return None if known["general_availability_check"]() else "transformers finds no package for it here"


def refusal(backend: str, problem: AttentionProblem) -> str | None:
    """Why `backend` cannot run `problem`, or None."""
    if backend.startswith("flash_attention"):
        missing = missing_flash(backend)
        if missing is not None:
            return missing
    elif backend not in (*names("kernels"), *names("engines")):
        return f"there is no kernel {backend!r} in this installation"
    return load_backend(backend).reason_against(problem)


def _through(backend: str, formula: Formula = "variant") -> Callable[[AttentionCase], Peer]:
    """The public function with an explicit backend."""

    def made(case: AttentionCase) -> Peer:
        reason = refusal(backend, problem(case, formula))
        if reason is not None:
            raise Unavailable(reason)

        def run(inputs: PeerInputs) -> Tensor:
            q, k, v, gate = inputs.q, inputs.k, inputs.v, inputs.gate
            if gate is None:
                return attention(q, k, v, is_causal=case.causal, backend=backend)
            return differential_attention(q, k, v, gate, is_causal=case.causal, backend=backend)

        return Peer(run, formula, as_softmax if formula == "softmax" else _unchanged)

    return made


def _lowered(lowering: Lowering, backend: str = "sdpa") -> Callable[[AttentionCase], Peer]:
    """PyTorch's SDPA, or another engine, with the streams rewritten in a given way, the library's choice or not."""

    def made(case: AttentionCase) -> Peer:
        if backend != "sdpa" and (reason := refusal(backend, problem(case))) is not None:
            raise Unavailable(reason)
        mask, engine = MaskSpec(is_causal=case.causal), load_backend(backend)
        assert isinstance(engine, Engine)
        form = engine.prepare(mask, problem(case), lowering)
        prepared = Prepared(Plan(engine, lowering), form)
        return Peer(lambda inputs: attend(_streams(inputs), prepared, case.width**-0.5, difference)[0])

    return made


def _sdpa(case: AttentionCase) -> Peer:
    def run(inputs: PeerInputs) -> Tensor:
        q, k, v = inputs.q, inputs.k, inputs.v
        return F.scaled_dot_product_attention(
            q, k, v, is_causal=case.causal, enable_gqa=q.shape[1] != k.shape[1]
        )

    return Peer(run, "softmax", as_softmax)


class _Layer(nn.Module):
    """What transformers' SDPA function reads of the layer that calls it."""

    def __init__(self, num_key_value_groups: int) -> None:
        super().__init__()
        self.num_key_value_groups = num_key_value_groups


def _diff_llama(case: AttentionCase) -> Peer:
    """What DiffLlamaAttention of transformers does between its rotation and its norm, on transformers' own SDPA.

    Its projections, rotation and norm are left out, as everyone else's are.
    """
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    layer = _Layer(case.heads // case.groups)

    def run(inputs: PeerInputs) -> Tensor:
        assert inputs.gate is not None
        outputs = []
        for value in torch.chunk(inputs.v, 2, dim=1):
            wide = value.repeat(1, 2, 1, 1)
            found, _ = sdpa_attention_forward(
                layer, inputs.q, inputs.k, wide, None, scaling=case.width**-0.5, is_causal=case.causal
            )
            outputs.append(found)
        signal, noise = torch.chunk(torch.cat(outputs, dim=-1), 2, dim=2)
        return signal - inputs.gate.to(inputs.q.dtype) * noise

    return Peer(run, arrange=_as_halves, tokens_first=True)


def _sdpa_only(name: str) -> Callable[[AttentionCase], Peer]:
    """PyTorch's SDPA with one of its kernels, where that takes the case."""

    def made(case: AttentionCase) -> Peer:
        from torch.nn.attention import SDPBackend, sdpa_kernel

        known = {"flash": SDPBackend.FLASH_ATTENTION, "cudnn": SDPBackend.CUDNN_ATTENTION}
        can = {"flash": sdp.can_use_flash_attention, "cudnn": sdp.can_use_cudnn_attention}[name]
        q, k, v = as_softmax(make_inputs(case.of_length(256))).tensors()[:3]
        if not can(sdp.SDPAParams(q, k, v, None, 0.0, case.causal, q.shape[1] != k.shape[1])):
            raise Unavailable(f"PyTorch's {name} kernel does not take it here")
        plain = _sdpa(case)

        def run(inputs: PeerInputs) -> Tensor:
            with sdpa_kernel([known[name]]):
                return plain.run(inputs)

        return Peer(run, "softmax", as_softmax)

    return made


def _flash_itself(module: str) -> Callable[[AttentionCase], Peer]:
    """Two calls of FlashAttention's own function with values twice as wide as keys, which versions 3 and 4 take."""

    def made(case: AttentionCase) -> Peer:
        try:
            flash = import_module(module).flash_attn_func
        except (ImportError, AttributeError) as error:
            raise Unavailable(f"{module}.flash_attn_func cannot be imported: {error}") from None

        def run(inputs: PeerInputs) -> Tensor:
            heads = _streams(inputs)
            outputs = []
            for q, k in zip(heads.q, heads.own_keys, strict=True):
                # Tokens first; some versions return the sums of the rows too.
                arguments = (x.transpose(1, 2) for x in (q, k, heads.v))
                found = flash(*arguments, softmax_scale=case.width**-0.5, causal=case.causal)
                outputs.append((found[0] if isinstance(found, tuple) else found).transpose(1, 2))
            return difference(tuple(outputs), heads.gate)

        try:
            with torch.no_grad():
                run(make_inputs(case.of_length(256)))
        except Exception as error:  # whatever it refuses these widths with
            raise Unavailable(reason_of(error)) from None
        return Peer(run)

    return made


_LOWERINGS = {
    "FlashDiffAttn_1": Lowering("FlashDiffAttn_1", 2),
    "FlashDiffAttn_1 padded": Lowering("FlashDiffAttn_1 padded", 2, pad=True),
    "FlashDiffAttn_2": Lowering("FlashDiffAttn_2", 2, slices=2),
    "stacked": Lowering("stacked", 2, stack=True, slices=2),
    "grouped (SDPA)": Lowering("grouped", 2, stack=True, shares_keys=True),
}


def _through_flash(name: str) -> Callable[[AttentionCase], Peer]:
    lowering, _, backend = name.partition(" (")
    return _lowered(_LOWERINGS[lowering], backend.rstrip(")"))


PEERS: dict[str, Callable[[AttentionCase], Peer]] = {
    TWIN: _sdpa,
    SAME_QUERIES: _sdpa,
    KERNEL: _through("cpu"),
    KERNEL_ONE: _through("cpu", "softmax"),
    NAIVE: _through("eager"),
    "DiffLlama": _diff_llama,
    **{name: _lowered(lowering) for name, lowering in _LOWERINGS.items()},
    TRITON: _through("triton"),
    TRITON_ONE: _through("triton", "softmax"),
    FLEX: _through("flex"),
    FLEX_ONE: _through("flex", "softmax"),
    TWIN_FLASH: _sdpa_only("flash"),
    TWIN_CUDNN: _sdpa_only("cudnn"),
    WIDE_3: _flash_itself("flash_attn_interface"),
    WIDE_4: _flash_itself("flash_attn.cute.interface"),
    **{name: _through_flash(name) for name in FLASH},
}

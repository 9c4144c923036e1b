"""No time without a right answer: every peer against the formula in float64, before anything is measured."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from clearhead.bench.cases import AttentionCase, Formula
from clearhead.bench.measure import reason_of
from clearhead.bench.peers import Peer, PeerInputs, as_softmax, dtype_of, make_inputs

# One length of several tiles and one that ends inside a tile. A single query is checked over all its keys.
LENGTHS = (384, 193)
Results = Mapping[str, Tensor]


@dataclass(frozen=True, slots=True)
class GateVerdict:
    """How far one result of a peer is from float64, and how far it may be. `error` is None where there is none."""

    what: str
    error: float | None
    bar: float = 0.0
    note: str = ""

    @property
    def green(self) -> bool:
        return self.error is not None and self.error <= self.bar

    def __str__(self) -> str:
        if self.error is None:
            return f"{self.what}: {self.note}"
        return f"{self.what}: off by {self.error:.1e}, allowed {self.bar:.1e}"


@dataclass(frozen=True, slots=True)
class Exam:
    """Inputs of a reduced case, the right answers to them, and those of the formula in the case's own precision."""

    inputs: PeerInputs
    cotangent: Tensor
    exact: Results
    plain: Results


def check(peers: Mapping[str, Peer], case: AttentionCase) -> dict[str, list[GateVerdict]]:
    """Verdicts by peer on the output and the gradients, at reduced lengths of `case`."""
    lengths = (case.keys,) if case.queries == 1 else LENGTHS
    verdicts: dict[str, list[GateVerdict]] = {name: [] for name in peers}
    for reduced in dict.fromkeys(case.of_length(length) for length in lengths):
        exams = {formula: _exam(reduced, formula) for formula in {peer.formula for peer in peers.values()}}
        for name, peer in peers.items():
            for verdict in _graded(peer, exams[peer.formula], dtype_of(case)):
                verdicts[name].append(replace(verdict, what=f"{verdict.what} at {reduced.keys} keys"))
    return verdicts


def _exam(case: AttentionCase, formula: Formula) -> Exam:
    made = make_inputs(case)
    made = (as_softmax(made) if formula == "softmax" else made).map(torch.Tensor.detach)
    inputs = made.map(lambda x: x.clone().requires_grad_(case.backward))
    double = made.map(lambda x: x.double().requires_grad_(case.backward))
    right = naive(double, case.causal)
    cotangent = torch.randn(right.shape, generator=torch.Generator().manual_seed(1))
    cotangent = cotangent.to(case.device, dtype_of(case))
    plain = results(naive(inputs, case.causal), inputs, cotangent)
    return Exam(inputs, cotangent, results(right, double, cotangent), plain)


def _graded(peer: Peer, exam: Exam, dtype: torch.dtype) -> list[GateVerdict]:
    try:
        # What is softmax input already, a softmax peer's arrangement leaves as it is.
        output = peer.present(peer.run(peer.arrange(exam.inputs)))
        expected = exam.exact["output"].shape
        if output.shape != expected:
            note = f"its shape is {tuple(output.shape)}, not {tuple(expected)}"
            return [GateVerdict("output", None, note=note)]
        found = results(output, exam.inputs, exam.cotangent)
    except Exception as error:  # whatever a peer raises is its answer
        return [GateVerdict("it raised", None, note=reason_of(error))]
    return judge(found, exam.exact, exam.plain, dtype)


def naive(inputs: PeerInputs, causal: bool) -> Tensor:
    """softmax(q kᵀ / √D) v, or the difference of two such maps times v, the maps written out.

    In the precision of the inputs; the softmax and the difference in float32 (float64 in float64).
    """
    if inputs.gate is None:
        return _stream(inputs.q, inputs.k, inputs.v, causal)
    own = inputs.k.shape[1] != inputs.v.shape[1]
    keys = (inputs.k[:, 0::2], inputs.k[:, 1::2]) if own else (inputs.k, inputs.k)
    signal = _stream(inputs.q[:, 0::2], keys[0], inputs.v, causal)
    noise = _stream(inputs.q[:, 1::2], keys[1], inputs.v, causal)
    return (signal - inputs.gate.to(_statistics(signal)) * noise).to(signal.dtype)


def _stream(q: Tensor, k: Tensor, v: Tensor, causal: bool) -> Tensor:
    repeats = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(repeats, 1), v.repeat_interleave(repeats, 1)
    scores = (q @ k.transpose(-1, -2)).to(_statistics(q)) * q.shape[-1] ** -0.5
    if causal:
        hidden = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).triu(1)
        scores = scores.masked_fill(hidden, float("-inf"))
    return scores.softmax(dim=-1).to(v.dtype) @ v


def _statistics(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def results(output: Tensor, inputs: PeerInputs, cotangent: Tensor) -> dict[str, Tensor]:
    """The output and the gradients by name."""
    if not inputs.q.requires_grad:
        return {"output": output}
    dq, dk, *rest = torch.autograd.grad(output, inputs.tensors(), cotangent.to(output.dtype))
    # λ may be a single number, whose plain gradient is exact by luck now and then: it is judged with dv.
    name = "dv" if len(rest) == 1 else "dv and dλ"
    return {"output": output.detach(), "dq": dq, "dk": dk, name: flat(rest)}


def judge(found: Results, exact: Results, plain: Results, dtype: torch.dtype) -> list[GateVerdict]:
    """Relative errors: at most twice that of the plain computation in the same precision, plus a rounding floor."""
    floor = torch.finfo(dtype).eps
    return [
        GateVerdict(what, _relative(found[what], right), 2 * _relative(plain[what], right) + floor)
        for what, right in exact.items()
    ]


def _relative(found: Tensor, exact: Tensor) -> float:
    return float((found.double() - exact.double()).norm() / exact.double().norm())


def flat(tensors: Sequence[Tensor]) -> Tensor:
    """All numbers as one vector: one small gradient may be accurate by luck."""
    return torch.cat([x.double().flatten() for x in tensors])

"""One case from the gate to its numbers."""

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import partial

import torch

from clearhead.bench import gate, generating, peers, training
from clearhead.bench.cases import AttentionCase, Case, GenerateCase, TrainCase
from clearhead.bench.cuda import EventTimer, peak_memory
from clearhead.bench.generate_run import GenerateRun
from clearhead.bench.machine import limited_memory, matrix_rate
from clearhead.bench.measure import (
    Call,
    Round,
    Timed,
    WallTimer,
    interleaved,
    ratios,
    reason_of,
    spread,
    warm_up,
)
from clearhead.bench.memory import extra_memory
from clearhead.bench.outcome import MeasuredCase, MeasuredPeer
from clearhead.bench.peers import dtype_of

Progress = Callable[[str], None]
# In the rounds beside the peers: as many bytes as keys and values have, copied. Half of its time is what reading takes.
COPY = "copying K and V"
# Makes the inputs of a peer; returns its call and the FLOPs that it needs.
Start = Callable[[], tuple[Call, float]]


@dataclass
class _Field:
    """The peers of a case: who may start, why the others may not, and what the gate found wrong."""

    starts: dict[str, Start] = field(default_factory=dict)
    reasons: dict[str, str] = field(default_factory=dict)
    red: list[str] = field(default_factory=list)


def run_case(case: Case, rounds: int, progress: Progress) -> MeasuredCase:
    """Check every peer of `case`, and time them if all are right. Ctrl-C ends it with the rounds that are complete."""
    progress(f"{case.name}: checking")
    if isinstance(case, GenerateCase):
        return _generated(case, rounds, progress)
    entered = _attention_field(case) if isinstance(case, AttentionCase) else _training_field(case)
    if entered.red:
        return MeasuredCase(case, red=tuple(entered.red))
    if isinstance(case, AttentionCase) and case.memory:
        return _memory(case, entered, progress)
    # A GPU's driver reserves addresses without end.
    with limited_memory() if case.device == "cpu" else nullcontext():
        return _timed(case, entered, rounds, progress)


def _generated(case: GenerateCase, rounds: int, progress: Progress) -> MeasuredCase:
    red = []
    for name in case.peers:
        progress(f"{case.name}: checking {name}")
        verdicts = generating.check(generating.ARMS[name], case)
        red += [f"{name}: {verdict}" for verdict in verdicts if not verdict.green]
    if red:
        return MeasuredCase(case, red=tuple(red))
    run = GenerateRun(case, case.peers, rounds, progress)
    rows = run.measure()
    return MeasuredCase(case, rows, rounds, interrupted=run.interrupted)


def _attention_field(case: AttentionCase) -> _Field:
    entered = _Field()
    ready: dict[str, peers.Peer] = {}
    for name in case.peers:
        try:
            ready[name] = peers.build(name, case)
        except peers.Unavailable as error:
            entered.reasons[name] = str(error)
    for name, verdicts in gate.check(ready, case).items():
        entered.red += [f"{name}: {verdict}" for verdict in verdicts if not verdict.green]
        entered.starts[name] = partial(_start_attention, ready[name], case)
    return entered


def _start_attention(peer: peers.Peer, case: AttentionCase) -> tuple[Call, float]:
    return peers.timed_call(peer, case), case.flops(peer.formula)


def _training_field(case: TrainCase) -> _Field:
    entered = _Field()
    for name in case.peers:
        arm = training.ARMS[name]
        try:
            entered.red += [
                f"{name}: {verdict}" for verdict in training.check(arm, case) if not verdict.green
            ]
        except peers.Unavailable as error:
            entered.reasons[name] = str(error)
        else:
            entered.starts[name] = partial(_start_training, arm, case)
    return entered


def _start_training(arm: training.BenchArm, case: TrainCase) -> tuple[Call, float]:
    model = training.build(arm, case)
    return training.timed_step(model, case), training.step_flops(arm, model, case)


def _timed(case: Case, entered: _Field, rounds: int, progress: Progress) -> MeasuredCase:
    progress(f"{case.name}: measuring the machine")
    timed = _timer(case)
    matrix = matrix_rate(dtype_of(case), case.device, timed)
    calls: dict[str, Call] = {}
    flops: dict[str, float] = {}
    for name, start in entered.starts.items():
        progress(f"{case.name}: warming up {name}")
        try:
            calls[name], flops[name] = start()
        except (RuntimeError, MemoryError) as error:
            entered.reasons[name] = reason_of(error)
        else:
            entered.reasons |= warm_up({name: calls[name]})
    calls = {name: call for name, call in calls.items() if name not in entered.reasons}
    read = _bytes_read(case)
    if read is not None:
        calls[COPY] = _copying(read, case.device)
    done: list[Round] = []
    interrupted = False
    try:
        for found in interleaved(calls, rounds, timed):
            done.append(found)
            progress(f"{case.name}: round {len(done)} of {rounds}")
    except KeyboardInterrupt:
        interrupted = True
    rows = tuple(
        MeasuredPeer(name, entered.reasons.get(name, "interrupted before the first round was complete"))
        if name in entered.reasons or not done
        else _row(name, case, done, flops[name])
        for name in case.peers
    )
    copy = 2 * read / spread([found[COPY] for found in done]).median if read is not None and done else None
    return MeasuredCase(case, rows, len(done), matrix, copy, interrupted=interrupted)


def _memory(case: AttentionCase, entered: _Field, progress: Progress) -> MeasuredCase:
    found: dict[str, int] = {}
    interrupted = False
    try:
        for name in entered.starts:
            progress(f"{case.name}: {name}")
            count, reason = _extra_memory(case, name, entered.starts[name])
            if count is None:
                entered.reasons[name] = reason or "unknown"
            else:
                found[name] = count
    except KeyboardInterrupt:
        interrupted = True
    base = found.get(case.peers[0])
    rows = []
    for name in case.peers:
        count = found.get(name)
        reason = entered.reasons.get(name, "interrupted before its turn") if count is None else None
        ratio = spread([count / base]) if count is not None and base else None
        rows.append(MeasuredPeer(name, reason, ratio=ratio, extra_bytes=count))
    return MeasuredCase(case, tuple(rows), 1, interrupted=interrupted)


def _row(name: str, case: Case, done: Sequence[Round], flops: float) -> MeasuredPeer:
    seconds = spread([found[name] for found in done])
    reference = case.peers[0]
    return MeasuredPeer(
        name,
        seconds=seconds,
        ratio=ratios(done, name, reference) if reference in done[0] else None,
        rate=flops / seconds.median,
        reads=spread([2 * found[name] / found[COPY] for found in done]) if COPY in done[0] else None,
    )


def _timer(case: Case) -> Timed:
    """By this machine's clock, or by the GPU's events: attention with a cold cache, training steps as they come."""
    if case.device == "cpu":
        return WallTimer()
    return EventTimer(cold=isinstance(case, AttentionCase))


def _extra_memory(case: AttentionCase, name: str, start: Start) -> tuple[int | None, str | None]:
    if case.device == "cpu":
        return extra_memory(case, name, torch.get_num_threads())
    try:
        call, _ = start()
    except (RuntimeError, MemoryError) as error:
        return None, reason_of(error)
    return peak_memory(call)


def _copying(size: int, device: str) -> Call:
    source = torch.ones(size // 4, device=device)
    target = torch.empty_like(source)
    return lambda: target.copy_(source)


def _bytes_read(case: Case) -> int | None:
    """Bytes of the keys and values of a case with one query, whose time is that of reading them."""
    return case.key_value_bytes if isinstance(case, AttentionCase) and case.queries == 1 else None

"""Whole models that write: time to the first token, of every further one, and memory.

Every peer's prompt is read in turn, `prefills` times over. Then each writes beside the reference, a token of one and a
token of the other in every round; only their two caches are in memory at a time, and the reference's is cut back to the
prompt for the next peer. Beside the clock on the wall stands the process's own time.
"""

import contextlib
import ctypes
import ctypes.util
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from torch import Tensor
from transformers import Cache, PreTrainedModel

from clearhead.bench.cases import GenerateCase
from clearhead.bench.generating import (
    ARMS,
    GenerateArm,
    build,
    cache_bytes,
    forward,
    new_cache,
    prompt_of,
)
from clearhead.bench.machine import limited_memory, memory_kilobytes
from clearhead.bench.measure import Round, Spread, interleaved, ratios, reason_of, spread
from clearhead.bench.outcome import MeasuredGeneration, MeasuredPeer

Progress = Callable[[str], None]
# Tokens that a peer writes before it is timed.
WARM_STEPS = 2
# What Linux resets a process's peak with.
RESET, PEAK = Path("/proc/self/clear_refs"), "VmHWM"


class Clocks:
    """Seconds of a call by the wall's clock, and those of this process by its name, kept in `own`."""

    def __init__(self) -> None:
        self.own: dict[str, list[float]] = {}

    def watching(self, name: str, call: Callable[[], object]) -> Callable[[], None]:
        """`call`, its processor time noted under `name`."""
        seconds = self.own.setdefault(name, [])

        def run() -> None:
            began = time.process_time()
            call()
            seconds.append(time.process_time() - began)

        return run

    def rounds(self, whole: int) -> list[Round]:
        """Processor time by round, of the rounds that are complete."""
        return [{name: seconds[i] for name, seconds in self.own.items()} for i in range(whole)]


@dataclass
class Writer:
    """A model behind its prompt. token (B, 1): the last one that it wrote; `steps` of them since the prompt."""

    model: PreTrainedModel
    cache: Cache
    token: Tensor
    steps: int = 0

    def __post_init__(self) -> None:
        self._first = self.token

    def step(self) -> None:
        """One more token of every row."""
        self.token = forward(self.model, self.cache, self.token).argmax(-1, keepdim=True)
        self.steps += 1

    def cut_back(self) -> None:
        """Forget what was written."""
        if self.steps:
            self.cache.crop(-self.steps)
        self.token, self.steps = self._first, 0


@dataclass
class _Found:
    """What was measured of one peer."""

    writing: list[Round] = field(default_factory=list)
    writing_own: list[Round] = field(default_factory=list)
    cache_bytes: int = 0
    peak_bytes: int | None = None


class GenerateRun:
    """The peers of a case that may start. `reasons`: why others have no numbers, filled as they fail."""

    def __init__(self, case: GenerateCase, names: Sequence[str], rounds: int, progress: Progress) -> None:
        self.case, self.rounds, self.progress = case, rounds, progress
        self.names = list(names)
        self.reasons: dict[str, str] = {}
        self.found: dict[str, _Found] = {}
        self.reading: list[Round] = []
        self.reading_own: list[Round] = []
        self.interrupted = False
        self._models: dict[tuple[str, ...], PreTrainedModel] = {}
        self._ids = prompt_of(case)

    def measure(self) -> tuple[MeasuredPeer, ...]:
        """A row for every peer of the case. Ctrl-C ends it with what is complete."""
        with limited_memory():
            try:
                self._write()
                self._read()
            except KeyboardInterrupt:
                self.interrupted = True
        return tuple(self._row(name) for name in self.case.peers)

    def _model(self, arm: GenerateArm) -> PreTrainedModel:
        if arm.model not in self._models:
            self._models[arm.model] = build(arm, self.case)
            self._models[arm.model].set_attn_implementation(arm.backend)
        return self._models[arm.model]

    def _begin(self, name: str) -> Writer:
        """A peer that has read the prompts."""
        arm = ARMS[name]
        model = self._model(arm)
        # A round more than is timed, for whoever is interrupted in one.
        cache = new_cache(arm, model, self.case.context + WARM_STEPS + self.rounds + 1)
        return Writer(model, cache, forward(model, cache, self._ids).argmax(-1, keepdim=True))

    def _ready(self, name: str) -> Writer | None:
        """As `_begin`, warmed up, its memory noted; None where it cannot, with the reason."""
        self.progress(f"{self.case.name}: reading the prompt, {name}")
        self._model(ARMS[name])
        found = _Found()
        try:
            with peak_of_process() as peak:
                writer = self._begin(name)
                found.cache_bytes = cache_bytes(writer.cache)
                for _ in range(WARM_STEPS):
                    writer.step()
        except (RuntimeError, MemoryError) as error:
            self.reasons[name] = reason_of(error)
            return None
        found.peak_bytes = peak()
        self.found[name] = found
        return writer

    def _write(self) -> None:
        reference, *others = self.names
        first = self._ready(reference)
        for name in others:
            writer = self._ready(name)
            if writer is None:
                continue
            self.progress(f"{self.case.name}: writing, {name}")
            if first is None:
                self._rounds({name: writer})
                continue
            self._rounds({reference: first, name: writer})
            first.cut_back()
        if first is not None and not self.found[reference].writing:
            self._rounds({reference: first})

    def _rounds(self, writers: dict[str, Writer]) -> None:
        clocks, done = Clocks(), []
        calls = {name: clocks.watching(name, writer.step) for name, writer in writers.items()}
        try:
            for found in interleaved(calls, self.rounds):
                done.append(found)
        finally:
            for name in writers:
                self.found[name].writing += done
                self.found[name].writing_own += clocks.rounds(len(done))

    def _read(self) -> None:
        clocks = Clocks()
        calls = {name: clocks.watching(name, partial(self._begin, name)) for name in self.found}
        for found in interleaved(calls, self.case.prefills):
            self.reading.append(found)
            self.reading_own = clocks.rounds(len(self.reading))
            self.progress(f"{self.case.name}: prompts, round {len(self.reading)} of {self.case.prefills}")

    def _row(self, name: str) -> MeasuredPeer:
        found = self.found.get(name)
        if found is None or not found.writing:
            return MeasuredPeer(name, self.reasons.get(name, "interrupted before its turn was over"))
        reference = self.names[0]
        seconds = _own(found.writing, name)
        generation = MeasuredGeneration(
            tokens_a_second=self.case.batch / seconds.median,
            processor=_own(found.writing_own, name),
            processor_ratio=_over(found.writing_own, name, reference),
            first=_own(self.reading, name) if self.reading else None,
            first_ratio=_over(self.reading, name, reference),
            first_processor=_own(self.reading_own, name) if self.reading_own else None,
            first_processor_ratio=_over(self.reading_own, name, reference),
            cache_bytes=found.cache_bytes,
            peak_bytes=found.peak_bytes,
        )
        ratio = _over(found.writing, name, reference)
        return MeasuredPeer(name, seconds=seconds, ratio=ratio, generation=generation)


def _own(rounds: Sequence[Round], name: str) -> Spread:
    return spread([found[name] for found in rounds])


def _over(rounds: Sequence[Round], name: str, reference: str) -> Spread | None:
    if not rounds or reference not in rounds[0]:
        return None
    return ratios(rounds, name, reference)


@contextmanager
def peak_of_process() -> Iterator[Callable[[], int | None]]:
    """What the process needed at most inside, beyond what it held before: bytes, asked afterwards.

    None where the system does not tell: it is Linux's own count of resident pages. What was freed before is given back
    to the system first, so that using it again counts.
    """
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(ctypes.util.find_library("c")).malloc_trim(0)
    before = memory_kilobytes("VmRSS")
    try:
        RESET.write_text("5", encoding="ascii")
    except OSError:
        before = None
    most: int | None = None
    yield lambda: most
    peak = memory_kilobytes(PEAK)
    if before is not None and peak is not None:
        most = 1024 * max(0, peak - before)

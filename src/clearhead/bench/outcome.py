"""What a measured case came to."""

from dataclasses import dataclass

from clearhead.bench.cases import Case
from clearhead.bench.measure import Spread


@dataclass(frozen=True, slots=True)
class MeasuredGeneration:
    """A model's text: what `MeasuredPeer.seconds`, the time of a step that gives every row a token, does not say.

    first: seconds to the first token of every row.   processor, first_processor: of the process's own time, which other
        work on the machine leaves alone.   Ratios are over the reference in the same round.
    tokens_a_second: of all rows, after the first.
    cache_bytes: what the cache holds behind the prompt.   peak_bytes: what the process needed at most beyond the model
        while it read the prompt and took the first steps; None where the system does not tell.
    """

    tokens_a_second: float
    processor: Spread
    processor_ratio: Spread | None
    first: Spread | None
    first_ratio: Spread | None
    first_processor: Spread | None
    first_processor_ratio: Spread | None
    cache_bytes: int
    peak_bytes: int | None


@dataclass(frozen=True, slots=True)
class MeasuredPeer:
    """What is known of one peer: its numbers, or the reason why there are none.

    seconds: of a call.   ratio: over the reference in the same round, or of memory.   rate: needed FLOPs a second.
    reads:   over reading keys and values once at the speed at which a copy of them moves its bytes in the same round.
    extra_bytes: peak memory of a call beyond its inputs.
    """

    peer: str
    reason: str | None = None
    seconds: Spread | None = None
    ratio: Spread | None = None
    rate: float | None = None
    reads: Spread | None = None
    extra_bytes: int | None = None
    generation: MeasuredGeneration | None = None


@dataclass(frozen=True, slots=True)
class MeasuredCase:
    """A case that was measured, as far as it came, or that failed its gate and has no rows.

    matrix: floating-point operations per second of torch.mm in the case's dtype.
    copy:   bytes read and written per second while copying keys and values, of a case that decodes.
    """

    case: Case
    rows: tuple[MeasuredPeer, ...] = ()
    rounds: int = 0
    matrix: float | None = None
    copy: float | None = None
    red: tuple[str, ...] = ()
    interrupted: bool = False

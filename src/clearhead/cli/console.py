"""What all verbs share: messages, exit codes, and the progress of jobs."""

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, NoReturn

if TYPE_CHECKING:
    from clearhead.train.pool import ProgressRow


class Interrupted(Exception):
    """The person, or the system, stopped the command; the message says how to go on."""


def say(text: str) -> None:
    """A line for the person at the terminal, on standard error: standard output is for results."""
    print(text, file=sys.stderr, flush=True)


def fail(text: str, *, code: int) -> NoReturn:
    """Say `text` in red and end with `code`."""
    from rich.console import Console
    from rich.text import Text

    Console(stderr=True, soft_wrap=True, highlight=False).print(Text(text, style="red"))
    raise SystemExit(code)


@contextmanager
def interruptible(message: str) -> Iterator[None]:
    """Turn Ctrl-C, SIGTERM and SIGHUP inside the block into `Interrupted(message)`, all stopped in order first.

    A SIGHUP that is ignored, as under nohup, stays so.
    """
    import signal
    from types import FrameType

    def stop(number: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    earlier = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGHUP)}
    for number, handler in earlier.items():
        if handler is not signal.SIG_IGN:
            signal.signal(number, stop)
    try:
        yield
    except KeyboardInterrupt:
        raise Interrupted(message) from None
    finally:
        for number, handler in earlier.items():
            signal.signal(number, handler)


def duration(seconds: float | None) -> str:
    """`1:02:03`, `2:03`, or a dash."""
    if seconds is None:
        return "–"
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def seconds_left(rows: "Sequence[ProgressRow]") -> float | None:
    """Training time left over all jobs at the present speed of those that run; None when none has a speed yet."""
    speed = sum(row.status.tokens_per_second or 0.0 for row in rows if row.running)
    left = sum(
        max(0, row.status.steps * row.task.job.train.batch_tokens - row.status.tokens)
        for row in rows
        if row.status.state in ("queued", "training")
    )
    if left == 0:
        return 0.0
    return left / speed if speed else None

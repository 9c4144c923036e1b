"""What all verbs share: messages, exit codes, and the progress of jobs."""

import json
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from threading import Timer
from typing import Annotated, Any, NoReturn

import typer

AsJson = Annotated[
    bool, typer.Option("--json", help="Results as one JSON value on standard output, for programs.")
]


AGAIN_SECONDS = 0.05


class Interrupted(Exception):
    """The person, or the system, stopped the command; the message says how to go on."""


def say(text: str) -> None:
    """A line for the person at the terminal, on standard error: standard output is for results."""
    print(text, file=sys.stderr, flush=True)


def print_json(value: Any) -> None:
    """`value` on standard output; NaN and infinities, which are no JSON, as null."""
    from clearhead.runs.files import plain

    print(json.dumps(plain(value), indent=2, ensure_ascii=False, allow_nan=False, default=str), flush=True)


def fail(text: str, *, code: int) -> NoReturn:
    """Say `text` in red and end with `code`."""
    from rich.console import Console
    from rich.text import Text

    Console(stderr=True, soft_wrap=True, highlight=False).print(Text(text, style="red"))
    raise SystemExit(code)


@contextmanager
def interruptible(message: str) -> Iterator[None]:
    """Turn Ctrl-C, SIGTERM and SIGHUP inside the block into `Interrupted(message)`, all stopped in order first.

    The KeyboardInterrupt of a signal other than Ctrl-C has the signal's number as its argument.

    A SIGHUP that is ignored, as under nohup, stays so. A signal that comes while Python runs something whose exceptions
    it drops, such as a finaliser, is sent once more a moment later, or at the end of the block if that comes first.
    """
    import signal
    from types import FrameType

    def stop(number: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt(number)

    waiting: list[Timer] = []
    report = sys.unraisablehook

    def again(dropped: "sys.UnraisableHookArgs") -> None:
        if not isinstance(dropped.exc_value, KeyboardInterrupt):
            report(dropped)
            return
        number = next((one for one in dropped.exc_value.args if isinstance(one, int)), signal.SIGINT)
        timer = Timer(AGAIN_SECONDS, os.kill, (os.getpid(), number))
        timer.daemon = True
        waiting.append(timer)
        timer.start()

    earlier = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGHUP)}
    for number, handler in earlier.items():
        # None: set by something that is not Python, which could not be put back.
        if handler is not signal.SIG_IGN and handler is not None:
            signal.signal(number, stop)
    sys.unraisablehook = again
    try:
        yield
        # Not sent yet: another block around this one would never hear of it.
        if any(timer.is_alive() for timer in waiting):
            raise KeyboardInterrupt
    except KeyboardInterrupt:
        raise Interrupted(message) from None
    finally:
        late = _end(waiting)
        sys.unraisablehook = report
        for number, handler in earlier.items():
            if handler is not None:
                signal.signal(number, handler)
        if late:
            raise Interrupted(message)


def _end(waiting: list[Timer]) -> bool:
    """Stop what is still to be sent; whether a signal came at this very moment, while the handlers still hear it."""
    try:
        for timer in waiting:
            timer.cancel()
            timer.join()
    except KeyboardInterrupt:
        return True
    return False


def duration(seconds: float | None) -> str:
    """`1:02:03`, `2:03`, or a dash."""
    if seconds is None:
        return "–"
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"

"""One process at a time in a directory that is written to."""

import fcntl
import os
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import IO

from clearhead.data.writing import writing


class RunError(ValueError):
    """A run directory that cannot be used. The message is one sentence that says what to do instead."""


@contextmanager
def exclusive(directory: Path, what: str, wait: float = 0.0) -> Iterator[None]:
    """Hold `directory` for this process; RunError when another one does, after `wait` seconds of trying.

    The lock is the operating system's, so it ends with its holder however that ends.
    """
    directory.mkdir(parents=True, exist_ok=True)
    path = directory / ".lock"
    ours = not path.exists()
    with ExitStack() as held:
        file = held.enter_context(path.open("a+", encoding="utf-8"))
        deadline = time.monotonic() + wait
        while not _locked(file, path):
            if not _is(file, path):
                # Its holder removed it: there may be another one by now.
                file = held.enter_context(path.open("a+", encoding="utf-8"))
            elif time.monotonic() >= deadline:
                file.seek(0)
                holder = file.read().strip() or "unknown"
                raise RunError(
                    f"{what} is in use by another clearhead process (pid {holder}); wait for it or stop it"
                ) from None
            else:
                time.sleep(0.1)
        try:
            with writing(path):
                file.truncate(0)
                file.write(str(os.getpid()))
                file.flush()
            yield
        except BaseException:
            # Whoever refuses a directory leaves nothing of ours in it.
            if ours and _is(file, path):
                path.unlink()
            raise
        finally:
            file.truncate(0)


def _locked(file: IO[str], path: Path) -> bool:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return _is(file, path)


def _is(file: IO[str], path: Path) -> bool:
    """Whether the open file is still the one at `path`."""
    try:
        return os.path.samestat(os.fstat(file.fileno()), path.stat())
    except FileNotFoundError:
        return False

"""Files written in one step, and the error of a full disk, whose file neither Python nor the writers in Rust name."""

import errno
import itertools
import os
import re
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

# A file that was being written could not go on: full, over a quota or a limit, failing, or mounted anew for reading.
FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EROFS}
# safetensors and tokenizers tell the number in their text alone.
_IN_RUST = re.compile(r"\(os error (\d+)\)")


class Unwritten(OSError):
    """A file that could not be written: one sentence that names it."""

    def __str__(self) -> str:
        return (
            f"{self.filename} cannot be written ({self.strerror}); make room and give the same command again"
        )


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Raise Unwritten, which names `path`, when the disk takes no more of what is written inside."""
    try:
        yield
    except Unwritten:
        raise
    except Exception as error:
        number = _number(error)
        if number not in FULL:
            raise
        name = getattr(error, "filename", None)
        raise Unwritten(number, os.strerror(number), str(path if name is None else name)) from error


def _number(error: Exception) -> int:
    if isinstance(error, OSError):
        return error.errno or 0
    found = _IN_RUST.search(str(error))
    return int(found[1]) if found else 0


_NUMBERS = itertools.count()


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A file beside `path` to write; at the end it takes the place of `path` in one step.

    After a crash `path` is the old or the new file. Several processes may write the same path at once: each has a file
    of its own, the last one stays. Raises Unwritten on a full disk.
    """
    part = path.with_name(f"{_start(path)}{os.getpid()}-{next(_NUMBERS)}.part")
    _remove_abandoned(path)
    with writing(path):
        try:
            yield part
            handle = os.open(part, os.O_RDONLY)
            try:
                os.fsync(handle)
            finally:
                os.close(handle)
            part.replace(path)
        finally:
            part.unlink(missing_ok=True)


def _start(path: Path) -> str:
    """How the names of the files begin that processes of this machine write for `path`."""
    return f".{path.name}.{socket.gethostname().partition('.')[0]}-"


def _remove_abandoned(path: Path) -> None:
    """Remove what processes of this machine that were killed left of `path`."""
    start = _start(path)
    try:
        names = [one.name for one in os.scandir(path.parent) if one.name.startswith(start)]
    except OSError:  # The error of writing says more.
        return
    for name in names:
        pid = name.removeprefix(start).partition("-")[0]
        if name.endswith(".part") and pid.isdecimal() and not _alive(int(pid)):
            path.with_name(name).unlink(missing_ok=True)


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except OSError:  # Another user's.
        pass
    return True

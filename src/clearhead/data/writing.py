"""The error of a full or failing disk, which neither Python nor the writers in Rust name a file in."""

import errno
import os
import re
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

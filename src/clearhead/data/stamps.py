"""Fingerprints of files that have not been touched since they were made are not made again.

A training on a large text begins with a look at each file, in every process. As git's index does, a table on disk
keeps what the system said of a file (size, times of content and of entry, number) beside its fingerprint.
"""

from __future__ import annotations

import errno
import json
import os
import time
from pathlib import Path

from clearhead.data.cache import digest_json
from clearhead.data.corpora import Corpus, FileCorpus, SourceFile, unreadable
from clearhead.data.readers import CorpusError
from clearhead.data.writing import replacing

State = list[int]
# A file that changed this short a time ago may change again without a later time being written.
UNSETTLED_NANOSECONDS = 2 * 10**9
# What the system says of a place where nobody, or not this user, may write.
NOT_WRITABLE = {errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOENT, errno.ENOTDIR, errno.EEXIST}


def state_of(file: SourceFile) -> State:
    """What the system says of a file: any change of its content changes this. CorpusError if it cannot be read."""
    try:
        found = file.path.stat()
    except FileNotFoundError as error:
        raise CorpusError(f"'{file.path}' is missing: restore it or correct corpus.sources") from error
    except OSError as error:
        raise unreadable(file.path, error) from error
    return [found.st_size, found.st_mtime_ns, found.st_ctime_ns, found.st_ino]


def quick_sources(corpus: Corpus, folder: Path) -> dict[str, str]:
    """`corpus.sources()`, with a table in `folder` of what is known already."""
    if not isinstance(corpus, FileCorpus):
        return corpus.sources()
    table = folder / f"{digest_json(os.path.abspath(corpus.source))[:32]}.json"
    known = _read(table)
    found: dict[str, str] = {}
    kept: dict[str, tuple[State, str]] = {}
    for file in corpus.used():
        state = state_of(file)
        before = known.get(file.name)
        stamp = before[1] if before is not None and before[0] == state else corpus.stamp(file)
        found[file.name] = stamp
        if state[2] < time.time_ns() - UNSETTLED_NANOSECONDS:
            kept[file.name] = state, stamp
    if kept != known:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            with replacing(table) as part:
                part.write_text(json.dumps(kept), encoding="utf-8")
        except OSError as error:
            # Tokens may be read where nothing can be written; the table only spares the next look.
            if error.errno not in NOT_WRITABLE:
                raise
    return found


def _read(table: Path) -> dict[str, tuple[State, str]]:
    try:
        found = json.loads(table.read_bytes())
        return {str(name): (list(state), str(stamp)) for name, (state, stamp) in found.items()}
    except (OSError, ValueError, TypeError, AttributeError):
        return {}


def states(corpus: Corpus) -> dict[str, State]:
    """The state of each file of the corpus, by its name."""
    return {file.name: state_of(file) for file in corpus.used()} if isinstance(corpus, FileCorpus) else {}


def check_states(corpus: Corpus, before: dict[str, State], first: int, last: int) -> None:
    """CorpusError that names a file, of those numbered `first` to `last`, which changed while it was read."""
    if not isinstance(corpus, FileCorpus):
        return
    for file in corpus.files[first : last + 1]:
        if file.name in before and state_of(file) != before[file.name]:
            raise CorpusError(f"'{file.path}' has changed while it was read: give the same command again")

"""Real text in: one interface over the standard library, files, directories, globs and Hugging Face datasets.

Documents come one at a time and in an order that depends only on the corpus, so a corpus may be larger than memory.
Every fault of the text is a `CorpusError` whose one sentence names the file and what to change.
"""

from __future__ import annotations

import glob
import hashlib
import os
import platform
import re
import sysconfig
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from clearhead.data.cache import WHOLE_FILE_LIMIT, fingerprint
from clearhead.data.hub_corpus import HubCorpus
from clearhead.data.readers import (
    PLAIN,
    START,
    SUFFIXES,
    Corpus,
    CorpusError,
    Document,
    Place,
    read_file,
    suffix_of,
)

__all__ = ["START", "Corpus", "CorpusError", "Document", "Place", "open_corpus"]

# Library sources are what a reader of the library would read: no installed packages, no tests, no build record.
STDLIB_SKIPPED = frozenset({"site-packages", "dist-packages", "__pycache__", "test", "tests", "idle_test"})
HUB_ID = re.compile(r"[\w.-]+/[\w.-]+(:[\w.-]+){0,2}")
LONE_FILE_PARTS = 32
SMALLEST_PART = 16 * 2**10
LARGEST_PART = 2**20
LARGE_FILE = 4 * 2**20
KINDS_NAMED = 5


@dataclass(frozen=True)
class SourceFile:
    """A file of a corpus and the name it has inside it."""

    name: str
    path: Path
    size: int


class FileCorpus(Corpus):
    """Files read in the order of their names.

    With `max_bytes` the order is that of a hash of the names instead, so that a limit takes a sample of the files and
    not the alphabetically first ones; reading stops after the document that reaches the limit.
    """

    def __init__(
        self,
        source: str,
        files: list[SourceFile],
        text_field: str,
        max_bytes: int | None,
        about: dict[str, Any],
        left: Mapping[str, int] | None = None,
    ) -> None:
        """left: how many files of each other kind lie beside the ones that are read."""
        key = name_hash if max_bytes is not None else (lambda file: file.name)
        self.source = source
        self.files = sorted(files, key=key)
        self.text_field = text_field
        self.max_bytes = max_bytes
        self.about = about
        self.left = dict(left or {})

    def account(self) -> str | None:
        used = self.used()
        kinds_read = Counter(suffix_of(file.path) for file in used)
        found = f"reading {counted(kinds_read)}, {sum(file.size for file in used) / 1e6:.1f} MB"
        if passed := len(self.files) - len(used):
            found += f"; corpus.max_bytes leaves {passed:,} more of these kinds unread"
        if self.left:
            found += f"; left unread, of no supported kind ({kinds()}): {counted(self.left)}"
        return found

    def sources(self) -> dict[str, str]:
        return {file.name: self.stamp(file) for file in self.used()}

    def stamp(self, file: SourceFile) -> str:
        """Size and fingerprint of a file; of one that is fingerprinted in samples also when it was changed."""
        try:
            late = f" {file.path.stat().st_mtime_ns}" if file.size > WHOLE_FILE_LIMIT else ""
            return f"{file.size} {fingerprint(file.path)}{late}"
        except OSError as error:
            raise unreadable(file.path, error) from error

    def identity(self, sources: Mapping[str, str] | None = None) -> dict[str, Any]:
        sources = self.sources() if sources is None else sources
        digest = hashlib.sha256()
        used = self.used()
        for file in used:
            size, _, content = sources[file.name].partition(" ")
            digest.update(f"{file.name}\0{size}\0{content}\n".encode("utf-8", "surrogateescape"))
        return {
            "source": self.source,
            **self.about,
            "text_field": self.text_field,
            "max_bytes": self.max_bytes,
            "files": len(used),
            "bytes": sum(file.size for file in used),
            "sha256": digest.hexdigest(),
        }

    def used(self) -> list[SourceFile]:
        """The files that reading can reach; how much text a structured file holds is unknown, so it counts as none."""
        left = self.max_bytes
        if left is None:
            return self.files
        reached = []
        for file in self.files:
            reached.append(file)
            left -= file.size if suffix_of(file.path) in PLAIN else 0
            if left <= 0:
                break
        return reached

    def read(self, begin: Place = START) -> Iterator[tuple[Document, Place]]:
        read = begin.read
        if self.max_bytes is not None and read >= self.max_bytes:
            return
        for number, file in enumerate(self.files[begin.file :], start=begin.file):
            part = self._part_bytes(file)
            # Of the file that is gone on with, `read` has counted what came before.
            skipped = begin.document if number == begin.file else 0
            whole = begin.before if skipped else read
            documents = read_file(file.path, file.name, text_field=self.text_field, part_bytes=part)
            for count, document in enumerate(documents, start=1):
                if count <= skipped:
                    continue
                read += len(document.text.encode())
                yield document, Place(number, count, read, whole)
                if self.max_bytes is not None and read >= self.max_bytes:
                    return
            # Marks and blank parts count too, so that the files that are read can be told from their sizes.
            read = whole + file.size if suffix_of(file.path) in PLAIN else read
            if self.max_bytes is not None and read >= self.max_bytes:
                return

    def _part_bytes(self, file: SourceFile) -> int | None:
        """Size of the parts a plain-text file is cut into; None keeps it one document.

        A lone file is cut so that there is something to hold out, a large one so that it need not fit in memory.
        """
        if len(self.files) == 1:
            return min(max(file.size // LONE_FILE_PARTS, SMALLEST_PART), LARGEST_PART)
        return LARGEST_PART if file.size > LARGE_FILE else None


def open_corpus(source: str, *, text_field: str = "text", max_bytes: int | None = None) -> Corpus:
    """Open `source`; nothing but names and sizes is read before `Corpus.documents`.

    * `"stdlib"`: the running interpreter's own library sources, without tests (about 12 MB).
    * a file, a directory (searched to the bottom, hidden entries skipped) or a glob (`**` allowed) of
      .txt .md .rst .py (a document a file), .jsonl .jsonl.gz .parquet (a document a record, its text in `text_field`).
      A plain-text file given alone is cut at paragraphs into up to 32 documents, and one above 4 MiB into parts of
      1 MiB.
    * `"hf:owner/name[:config][:split]"`, or `owner/name` when no such path and no directory `owner`
      exists: a Hugging Face dataset, streamed; split `train` unless named, `config` may be empty
      (`hf:owner/name::test`).

    `max_bytes` ends reading after the document that reaches that many bytes of text; of several files it takes a
    sample by the hash of their names, of one file or dataset the beginning.
    A record whose text is missing (null) or blank is passed over, in every kind of file and in datasets.

    Raises CorpusError when the source is missing, matches nothing or holds no supported file; reading raises it for
    a file that is empty, binary, not UTF-8, not JSON or without `text_field`.
    """
    if not source.strip():
        raise CorpusError("the corpus source is empty: set corpus.source to 'stdlib', a path or a dataset id")
    if max_bytes is not None and max_bytes <= 0:
        raise CorpusError(f"corpus.max_bytes is {max_bytes}: it must be positive, or left out for no limit")
    if source == "stdlib":
        return stdlib_corpus(text_field, max_bytes)
    if source.startswith("hf:"):
        return hub_corpus(source, source.removeprefix("hf:"), text_field, max_bytes)
    path = Path(source).expanduser()
    left: Counter[str] = Counter()
    if path.is_dir():
        files = listed(path, walk(path, left=left))
        if not files:
            raise CorpusError(f"the directory '{source}' holds no file of a supported kind ({kinds()})")
    elif path.is_file():
        if suffix_of(path) not in SUFFIXES:
            raise CorpusError(f"'{source}' is of no supported kind: rename or convert it to one of {kinds()}")
        files = listed(path.parent, [path])
    elif glob.has_magic(source):
        files = globbed(source, left)
    elif HUB_ID.fullmatch(source) and suffix_of(path) not in SUFFIXES and not path.parent.is_dir():
        return hub_corpus(source, source, text_field, max_bytes)
    else:
        raise CorpusError(
            f"there is no file or directory '{source}': set corpus.source to an existing path (a Hugging Face dataset "
            "is written hf:owner/name)"
        )
    return FileCorpus(source, files, text_field, max_bytes, {"kind": "files"}, left)


def stdlib_corpus(text_field: str, max_bytes: int | None) -> Corpus:
    root = Path(sysconfig.get_path("stdlib"))
    paths = [
        path
        for path in walk(root, skipped=STDLIB_SKIPPED)
        # _sysconfigdata records how this machine built the interpreter; empty __init__ files hold nothing to read.
        if path.suffix == ".py" and not path.name.startswith("_sysconfigdata") and path.stat().st_size > 0
    ]
    if not paths:
        raise CorpusError(
            f"this interpreter has no library sources at '{root}': set corpus.source to a file or directory of text"
        )
    about = {
        "kind": "stdlib",
        "interpreter": platform.python_implementation(),
        "version": platform.python_version(),
    }
    return FileCorpus("stdlib", listed(root, paths), text_field, max_bytes, about)


def hub_corpus(source: str, name: str, text_field: str, max_bytes: int | None) -> Corpus:
    path, *rest = name.split(":")
    if not path or len(rest) > 2:
        raise CorpusError(
            f"'{source}' is not a dataset id: write hf:owner/name, optionally :config and :split"
        )
    config = rest[0] or None if rest else None
    split = rest[1] or "train" if len(rest) == 2 else "train"
    return HubCorpus(source, path, config, split, text_field, max_bytes)


def globbed(pattern: str, left: Counter[str]) -> list[SourceFile]:
    matches = [Path(match) for match in glob.glob(os.path.expanduser(pattern), recursive=True)]
    matches = [path for path in matches if path.is_file()]
    if not matches:
        raise CorpusError(f"the pattern '{pattern}' matches no file: correct corpus.source")
    supported = [path for path in matches if suffix_of(path) in SUFFIXES]
    left.update(suffix_of(path) for path in matches if suffix_of(path) not in SUFFIXES)
    if not supported:
        raise CorpusError(f"the pattern '{pattern}' matches no file of a supported kind ({kinds()})")
    return listed(Path(os.path.commonpath([path.parent for path in supported])), supported)


def walk(
    root: Path, skipped: frozenset[str] = frozenset({"__pycache__"}), left: Counter[str] | None = None
) -> Iterator[Path]:
    """Files of a supported kind below `root`; `left` counts the others by kind. Hidden ones are neither."""
    for directory, below, names in os.walk(root):
        below[:] = sorted(name for name in below if name not in skipped and not name.startswith("."))
        for name in sorted(names):
            if name.startswith("."):
                continue
            if (suffix := suffix_of(Path(name))) in SUFFIXES:
                yield Path(directory, name)
            elif left is not None:
                left[suffix] += 1


def listed(root: Path, paths: Iterator[Path] | list[Path]) -> list[SourceFile]:
    files = []
    for path in paths:
        try:
            size = path.stat().st_size
        except OSError as error:
            raise unreadable(path, error) from error
        files.append(SourceFile(path.relative_to(root).as_posix(), path, size))
    return files


def name_hash(file: SourceFile) -> str:
    return hashlib.sha256(file.name.encode("utf-8", "surrogateescape")).hexdigest()


def counted(found: Mapping[str, int]) -> str:
    """`1,962 files (1,917 .rst, 45 .txt)`: the commonest kinds by name, the rest together."""
    total = sum(found.values())
    ranked = sorted(found.items(), key=lambda item: (-item[1], item[0]))
    parts = [f"{number:,} {suffix or 'without a suffix'}" for suffix, number in ranked[:KINDS_NAMED]]
    if rest := sum(number for _, number in ranked[KINDS_NAMED:]):
        parts.append(f"{rest:,} others")
    return f"{total:,} file{'' if total == 1 else 's'} ({', '.join(parts)})"


def kinds() -> str:
    return " ".join(SUFFIXES)


def unreadable(path: Path, error: OSError) -> CorpusError:
    return CorpusError(f"'{path}' cannot be read ({error.strerror}): correct its permissions or leave it out")

"""What a run began with, and whether what is there now is still the same text, tokens and evaluation sets."""

from __future__ import annotations

import glob
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from clearhead.data.cache import digest_json, fingerprint
from clearhead.data.corpora import listed, open_corpus, walk
from clearhead.data.readers import CorpusError

SET_KEYS = ("data", "sets", "texts", "haystack")
"""Options of an evaluation that name what it reads: a path or a list of them."""
NAMED = 3
BACK = "put it back, or begin again in another run directory (--fresh sets the old one aside)"


def check_text(
    began: Mapping[str, Any], now: Mapping[str, Any], sources: tuple[Mapping[str, str], Mapping[str, str]]
) -> None:
    """Raise CorpusError, naming what differs, unless text and tokenizer are those that the run began with.

    began, now: identities of prepared data; sources: the stamps of their files, empty where they are not known.
    """
    before, after = sources
    found = [_difference(name, before, after) for name in _unequal(before, after)] if before else []
    for key in ("corpus", "tokenizer_files"):
        if key in began and key in now and began[key] != now[key] and not (found and key == "corpus"):
            found += _lines(key, began[key], now[key])
    if found:
        raise CorpusError(f"the text has changed since the run began ({_some(found)}); {BACK}")


def check_tokens(began: Mapping[str, Any], now: Mapping[str, Any], folder: Path) -> None:
    """Raise CorpusError unless the stored tokens and the tokenizer are those that the run began with."""
    before, after = ({k: v for k, v in i.get("files", {}).items() if _decides(k)} for i in (began, now))
    if before and (found := _unequal(before, after)):
        raise CorpusError(
            f"the prepared data in {str(folder)!r} is not what the run began with ({_some(found)} differs): the source "
            f"or the tokenizer's library gives other tokens now; {BACK}"
        )


def set_stamps(options: Mapping[str, Any]) -> dict[str, str]:
    """Path -> fingerprint of every local file that an evaluation with these `options` reads; of stdlib as a whole."""
    found: dict[str, str] = {}
    for key in SET_KEYS:
        value = options.get(key)
        for source in value if isinstance(value, list) else [value]:
            if source == "stdlib":
                found[source] = str(open_corpus(source).identity()["sha256"])
            elif isinstance(source, str):
                found |= {str(path): fingerprint(path) for path in _local(source)}
    return found


def check_sets(began: Mapping[str, str], now: Mapping[str, str], what: str = "evaluation set") -> None:
    """Raise CorpusError that names a file, a `what`, which differs from the one the run began with."""
    if found := [name for name in _unequal(began, now) if name in began and name in now]:
        raise CorpusError(f"the {what} {_some(found)!r} has changed since the run began; {BACK}")


def _local(source: str) -> list[Path]:
    path = Path(source).expanduser()
    if path.is_file():
        return [path]
    if path.is_dir():
        return [file.path for file in listed(path, walk(path))]
    if glob.has_magic(source):
        return [
            p for p in map(Path, sorted(glob.glob(os.path.expanduser(source), recursive=True))) if p.is_file()
        ]
    return []


def data_fingerprint(identity: Mapping[str, Any]) -> str:
    """One number for text, tokenizer, tokens and mixture: what must not differ between two parts of a training."""
    decisive = {name: found for name, found in identity.get("files", {}).items() if _decides(name)}
    return digest_json([identity.get("corpus"), identity.get("tokenizer_files"), decisive])


def _decides(name: str) -> bool:
    return name.startswith(("train/", "validation/")) or name == "tokenizer/tokenizer.json"


def _unequal(before: Mapping[str, str], after: Mapping[str, str]) -> list[str]:
    return sorted(name for name in {*before, *after} if before.get(name) != after.get(name))


def _difference(name: str, before: Mapping[str, str], after: Mapping[str, str]) -> str:
    if name not in after:
        return f"{name!r} is gone"
    return f"{name!r} {'differs' if name in before else 'is new'}"


def _lines(key: str, before: Any, after: Any) -> list[str]:
    if isinstance(before, Mapping) and isinstance(after, Mapping):
        names = [name for name in sorted({*before, *after}) if before.get(name) != after.get(name)]
        return [line for name in names for line in _lines(f"{key}.{name}", before.get(name), after.get(name))]
    return [f'{key}: "{before}" -> "{after}"']


def _some(found: Sequence[str]) -> str:
    more = f" and {len(found) - NAMED} more" if len(found) > NAMED else ""
    return f"{', '.join(found[:NAMED])}{more}"

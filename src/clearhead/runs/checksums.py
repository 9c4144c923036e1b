"""Checksums of a folder's files, and files that are on the disk before the folder counts as whole."""

import hashlib
import json
import os
from pathlib import Path

from clearhead.data.writing import replacing
from clearhead.runs.files import BrokenFile

CHECKSUMS = "checksums.json"  # of a finished model
# What PyTorch writes with pickle. Nothing of it is ever read.
PICKLES = (".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt")
_BLOCK = 2**20


def digest(path: Path) -> str:
    """sha256 of a whole file."""
    found = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(_BLOCK):
            found.update(block)
    return found.hexdigest()


def seal(folder: Path, name: str) -> None:
    """Bring every file of `folder` to the disk, then write their checksums to `name` in it, in one step."""
    files = [path for path in sorted(folder.rglob("*")) if path.is_file() and path.name != name]
    sums = {path.relative_to(folder).as_posix(): digest(path) for path in files}
    for path in (*files, *(path.parent for path in files), folder):
        sync(path)
    with replacing(folder / name) as part:
        part.write_text(json.dumps(sums, indent=1), encoding="utf-8")
    sync(folder)
    sync(folder.parent)


def sync(path: Path) -> None:
    """Bring a file, or a directory's list of files, to the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def fault(folder: Path, name: str) -> str | None:
    """What is wrong with a sealed folder, in a clause; None when every file is as it was written.

    A folder without checksums, or with an empty `name`, was written before they were: nothing is found wrong with it.
    """
    try:
        text = (folder / name).read_text(encoding="utf-8")
        sums = json.loads(text) if text else {}
        if not isinstance(sums, dict):
            return f"{name} is not a table of checksums"
        for file, expected in sums.items():
            if not (folder / file).is_file():
                return f"{file} is missing"
            if digest(folder / file) != expected:
                return f"{file} is not what was written"
        planted = [p.name for p in sorted(folder.iterdir()) if p.suffix in PICKLES and p.name not in sums]
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        return f"{name} cannot be read: {error}"
    return f"{planted[0]} was put there by something else, and nothing is unpickled" if planted else None


def check_model(folder: Path) -> None:
    """Raise BrokenFile, naming the file, unless the model in `folder` is as it was written, and of safetensors."""
    if (reason := fault(folder, CHECKSUMS)) is not None:
        raise BrokenFile(f"the model in {str(folder)!r} is damaged ({reason}); restore it or train it again")
    names = ("model.safetensors", "model.safetensors.index.json")
    if not any((folder / name).is_file() for name in names):
        beside = [path.name for path in sorted(folder.iterdir()) if path.suffix in PICKLES]
        also = f" ({beside[0]} is not read: nothing is unpickled)" if beside else ""
        raise BrokenFile(f"the model in {str(folder)!r} has no {names[0]}{also}; save it as safetensors")

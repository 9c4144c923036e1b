"""Named weights that are read one at a time: from safetensors files, from memory, or made of other weights.

Files are read with plain `read`, not mapped into memory: a tensor costs its own size, and only while it is held.
Nothing is ever unpickled.
"""

import json
import math
import struct
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from mmap import mmap
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
HEADER_LIMIT = 100 * 2**20
BLOCK = 1 * 2**20
"""Bytes that are read at a time where a tensor need not be whole."""


class ConversionError(ValueError):
    """A conversion that cannot be done. The message is one sentence; no output is left."""


def reason(error: BaseException) -> str:
    """What went wrong, in one line: validation of configurations says it in the last of several."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return lines[-1].strip().removeprefix("ValueError: ").removeprefix("TypeError: ")


class Weights(ABC):
    """Tensors by name."""

    @abstractmethod
    def names(self) -> Sequence[str]:
        """All of them."""

    @abstractmethod
    def dtype(self, name: str) -> torch.dtype:
        """Without reading it."""

    @abstractmethod
    def read(self, name: str) -> Tensor:
        """A tensor of one's own."""

    def rows(self, name: str, start: int, stop: int) -> Tensor:
        """Rows start..stop of a matrix; only they are read where that is possible."""
        return self.read(name)[start:stop]

    def blocks(self, name: str) -> Iterator[Tensor]:
        """The tensor in pieces along its first axis, small ones where they can be read alone."""
        yield self.read(name)

    def take(self, name: str, rows: Sequence[int]) -> Tensor:
        """Single rows of a matrix."""
        return torch.cat([self.rows(name, row, row + 1) for row in rows])

    def __contains__(self, name: object) -> bool:
        return name in self.names()


class Stored(NamedTuple):
    """Where a tensor lies."""

    file: Path
    dtype: torch.dtype
    shape: tuple[int, ...]
    begin: int
    size: int


class FileWeights(Weights):
    """Tensors in safetensors files."""

    def __init__(self, files: Sequence[Path]) -> None:
        self.entries: dict[str, Stored] = {}
        for file in files:
            for name, entry in read_header(file).items():
                if name in self.entries:
                    raise ConversionError(
                        f"the tensor {name!r} is in {self.entries[name].file.name!r} and in {file.name!r}; "
                        "leave the files of one checkpoint only"
                    )
                self.entries[name] = entry

    def names(self) -> Sequence[str]:
        return tuple(self.entries)

    def __contains__(self, name: object) -> bool:
        return name in self.entries

    def dtype(self, name: str) -> torch.dtype:
        return self.entries[name].dtype

    def shape(self, name: str) -> tuple[int, ...]:
        """Without reading it."""
        return self.entries[name].shape

    def read(self, name: str) -> Tensor:
        entry = self.entries[name]
        return _read(entry, entry.begin, entry.size).view(entry.shape)

    def rows(self, name: str, start: int, stop: int) -> Tensor:
        entry = self.entries[name]
        stop = min(stop, entry.shape[0])
        width = entry.size // max(1, entry.shape[0])
        read = _read(entry, entry.begin + start * width, (stop - start) * width)
        return read.view(stop - start, *entry.shape[1:])

    def blocks(self, name: str) -> Iterator[Tensor]:
        entry = self.entries[name]
        if not entry.shape or entry.size <= BLOCK:
            yield self.read(name)
            return
        step = max(1, BLOCK * entry.shape[0] // entry.size)
        for start in range(0, entry.shape[0], step):
            yield self.rows(name, start, start + step)


class MemoryWeights(Weights):
    """Tensors that are in memory already."""

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        self.tensors = tensors

    def names(self) -> Sequence[str]:
        return tuple(self.tensors)

    def dtype(self, name: str) -> torch.dtype:
        return self.tensors[name].dtype

    def shape(self, name: str) -> tuple[int, ...]:
        """Its sizes."""
        return tuple(self.tensors[name].shape)

    def read(self, name: str) -> Tensor:
        return self.tensors[name]


@dataclass(frozen=True)
class TensorRecipe:
    """How a tensor is made: `make` of the tensors `takes`, which keeps shape and bits but for their order.

    dtype:   what it is stored in, by default that of the first tensor taken.
    rounded: whether `make` computes, so that the result is rounded.
    """

    takes: tuple[str, ...]
    make: Callable[..., Tensor]
    dtype: torch.dtype | None = None
    rounded: bool = False


def same(tensor: Tensor) -> Tensor:
    """The tensor as it is."""
    return tensor


class MadeWeights(Weights):
    """Tensors made of other weights when they are read."""

    def __init__(self, source: Weights, recipes: Mapping[str, TensorRecipe]) -> None:
        self.source = source
        self.recipes = recipes

    def names(self) -> Sequence[str]:
        return tuple(self.recipes)

    def __contains__(self, name: object) -> bool:
        return name in self.recipes

    def dtype(self, name: str) -> torch.dtype:
        recipe = self.recipes[name]
        if recipe.dtype is not None:
            return recipe.dtype
        return self.source.dtype(recipe.takes[0]) if recipe.takes else torch.float32

    def read(self, name: str) -> Tensor:
        recipe = self.recipes[name]
        made = recipe.make(*(self.source.read(taken) for taken in recipe.takes))
        return made.to(self.dtype(name))

    def blocks(self, name: str) -> Iterator[Tensor]:
        recipe = self.recipes[name]
        if recipe.make is not same:
            yield self.read(name)
            return
        for block in self.source.blocks(recipe.takes[0]):
            yield block.to(self.dtype(name))

    @property
    def rounded(self) -> bool:
        """Whether any of them is not the bits of its source."""
        return any(recipe.rounded for recipe in self.recipes.values())


def read_header(file: Path) -> dict[str, Stored]:
    """The table of a safetensors file; ConversionError for one that is damaged, cut off or not there."""
    try:
        total = file.stat().st_size
        with file.open("rb") as stream:
            (size,) = struct.unpack("<Q", stream.read(8))
            if size > min(total, HEADER_LIMIT):
                raise ValueError("no table of tensors")
            table = json.loads(stream.read(size))
        begin = 8 + size
        found = {name: _stored(file, begin, name, e) for name, e in table.items() if name != "__metadata__"}
        end = begin
        for name, entry in sorted(found.items(), key=lambda item: item[1][3:]):
            if entry.begin != end:
                raise ValueError(f"{name!r} does not begin where the tensor before it ends")
            end += entry.size
    except ConversionError:
        raise
    except OSError as error:
        raise ConversionError(
            f"{str(file)!r} cannot be read ({error.strerror or error}); get it again"
        ) from None
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError, struct.error) as error:
        raise ConversionError(
            f"{str(file)!r} is not a safetensors file, or damaged ({error}); get it again"
        ) from None
    if end != total:
        raise ConversionError(
            f"{str(file)!r} has {total:,} bytes where its table says {end:,}: it is incomplete; get it again"
        )
    return found


def _stored(file: Path, begin: int, name: str, entry: Mapping[str, Any]) -> Stored:
    """One row of the table of a file whose tensors begin at `begin`; ValueError for one that cannot be."""
    (first, last), shape = entry["data_offsets"], tuple(entry["shape"])
    if any(type(number) is not int or number < 0 for number in (first, last, *shape)):
        raise ValueError(f"the place or the shape of {name!r} is not made of natural numbers")
    if entry["dtype"] not in DTYPES:
        raise ConversionError(
            f"{str(file)!r} has {name!r} in {entry['dtype']}, which is not converted: take the model it was made from"
        )
    dtype = DTYPES[entry["dtype"]]
    if last - first != math.prod(shape) * dtype.itemsize:
        raise ValueError(f"the size of {name!r} is not that of its shape")
    return Stored(file, dtype, shape, begin + first, last - first)


def _read(entry: Stored, begin: int, size: int) -> Tensor:
    if size == 0:
        return torch.empty(0, dtype=entry.dtype)
    # Pages of their own, which go back to the system at once; the heap would keep them.
    buffer = bytearray(size) if size < BLOCK // 4 else mmap(-1, size)
    with entry.file.open("rb", buffering=0) as stream:
        stream.seek(begin)
        view, done = memoryview(buffer), 0
        while done < size:
            got = stream.readinto(view[done:])
            if not got:
                raise ConversionError(f"{str(entry.file)!r} ends before its tensors do; get it again")
            done += got
    return torch.frombuffer(buffer, dtype=entry.dtype)


Blocks = Callable[[str], Iterable[Tensor]]
"""A tensor by its name, in pieces along its first axis."""


class Sheet(NamedTuple):
    """A tensor to be written."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def size(self) -> int:
        """In bytes."""
        numbers = 1
        for length in self.shape:
            numbers *= length
        return numbers * self.dtype.itemsize


def write_weights(folder: Path, sheets: Sequence[Sheet], blocks: Blocks, shard_bytes: int) -> Iterator[Path]:
    """Write tensors piece by piece into safetensors files of at most `shard_bytes` (or one tensor); yields each file.

    Several files get transformers' index. ConversionError for a tensor that is not what its sheet says.
    """
    shards: list[list[Sheet]] = [[]]
    for sheet in sheets:
        if shards[-1] and sum(other.size for other in shards[-1]) + sheet.size > shard_bytes:
            shards.append([])
        shards[-1].append(sheet)
    places: dict[str, str] = {}
    for number, shard in enumerate(shards, start=1):
        file = SINGLE if len(shards) == 1 else f"model-{number:05}-of-{len(shards):05}.safetensors"
        places |= {sheet.name: file for sheet in shard}
        _write(folder / file, shard, blocks)
        yield folder / file
    if len(shards) > 1:
        index = {"metadata": {"total_size": sum(sheet.size for sheet in sheets)}, "weight_map": places}
        (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def _write(file: Path, shard: Sequence[Sheet], blocks: Blocks) -> None:
    called = {dtype: name for name, dtype in DTYPES.items()}
    # Wide numbers first, so that every tensor is aligned.
    ordered = sorted(shard, key=lambda sheet: -sheet.dtype.itemsize)
    table: dict[str, object] = {"__metadata__": {"format": "pt"}}
    at = 0
    for sheet in ordered:
        table[sheet.name] = {
            "dtype": called[sheet.dtype],
            "shape": list(sheet.shape),
            "data_offsets": [at, at + sheet.size],
        }
        at += sheet.size
    header = json.dumps(table, separators=(",", ":")).encode()
    header += b" " * (-len(header) % 8)
    with file.open("wb") as stream:
        stream.write(struct.pack("<Q", len(header)) + header)
        for sheet in ordered:
            rows: list[int] = []
            for block in blocks(sheet.name):
                rows.append(block.shape[0] if block.ndim else 1)
                plain = block.detach().contiguous().reshape(-1)
                stream.write(plain.view(torch.uint8).numpy().data)
            found = (sum(rows), *block.shape[1:]) if block.ndim else ()
            if found != sheet.shape or block.dtype != sheet.dtype:
                raise ConversionError(
                    f"the source's {sheet.name!r} has the shape {list(found)}, but the configuration asks for "
                    f"{list(sheet.shape)}: they do not belong together"
                )

"""Two small texts that become a mixture of many small shards."""

import gzip
import json
from pathlib import Path
from typing import Any

import pytest

from clearhead.data import streams, tokenizing
from clearhead.data.prepare import DataSpec
from clearhead.data.spec import TextSource

SHARD, BATCH = 3000, 500


def small_shards(patch: pytest.MonkeyPatch | None = None) -> None:
    """Shards of a few documents, for the rest of the process or of a test."""
    for module, name, value in (
        (tokenizing, "SHARD_BYTES", SHARD),
        (streams, "SHARD_BYTES", SHARD),
        (tokenizing, "BATCH_BYTES", BATCH),
    ):
        if patch is None:
            setattr(module, name, value)
        else:
            patch.setattr(module, name, value)


def sentences(count: int, what: str) -> list[str]:
    return [
        f"{what} {i}: " + " ".join(f"word{(i * 31 + j * 7) % 97}" for j in range(20 + i % 13))
        for i in range(count)
    ]


def write_texts(folder: Path) -> Path:
    """web.jsonl.gz and the folder books."""
    (folder / "books").mkdir(parents=True)
    with gzip.GzipFile(folder / "web.jsonl.gz", "wb", mtime=0) as file:
        file.write("".join(json.dumps({"text": one}) + "\n" for one in sentences(150, "page")).encode())
    for number, text in enumerate(sentences(60, "book")):
        (folder / "books" / f"{number:02}.txt").write_text(text)
    return folder


def spec_in(folder: Path, **options: Any) -> DataSpec:
    """Seven tenths web, three tenths books."""
    sources = (TextSource(str(folder / "web.jsonl.gz"), 0.7), TextSource(str(folder / "books"), 0.3))
    return DataSpec(**{"sources": sources, "vocab_size": 300, "validation_fraction": 0.1, **options})

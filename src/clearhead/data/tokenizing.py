"""From a text of any size to shards of tokens, in memory that does not grow with it; what is finished is kept."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from clearhead.data.corpora import START, Corpus, Document, FileCorpus, Place, open_corpus
from clearhead.data.readers import PLAIN, CorpusError, suffix_of
from clearhead.data.shards import FORMAT, MANIFEST, Shard, ShardContent, read_shard, token_type, write_shard
from clearhead.data.spec import DataSpec, Progress, TextSource
from clearhead.data.stamps import State, check_states, states
from clearhead.data.tokenizer import encode_texts
from clearhead.data.writing import replacing

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

# Text of the training side in a shard.
SHARD_BYTES = 32 * 2**20
BATCH_BYTES = 2**20
SECONDS_BETWEEN = 10.0


def share(seed: int, digest: bytes) -> float:
    """A number in [0, 1) that depends on the seed and the text alone."""
    mixed = hashlib.sha256(f"{seed}:".encode() + digest).digest()
    return int.from_bytes(mixed[:6], "big") / 2**48


def open_text(text: TextSource) -> Corpus:
    """The corpus of one source of a mixture."""
    return open_corpus(text.source, text_field=text.text_field, max_bytes=text.max_bytes)


@dataclass
class Tokenizing:
    """The tokenizing of one text: which documents are held out, with which tokenizer, into which folder.

    Documents whose share is below `spec.validation_fraction` are held out. before: the state of the text's files when
    the work began; a shard with text of a file that changed since is not kept.
    """

    spec: DataSpec
    text: TextSource
    corpus: Corpus
    tokenizer: PreTrainedTokenizerFast
    folder: Path
    say: Progress

    def __post_init__(self) -> None:
        self.before: dict[str, State] = states(self.corpus)
        self.dtype = token_type(len(self.tokenizer))
        self._begun, self._made, self._said = time.monotonic(), 0, 0.0

    def run(self, *, verify: bool = False) -> None:
        """Write every shard that is not there, then the manifest.

        The same text gives the same shards however often the work is interrupted: one begins where the header of the
        one before it says. verify: a shard whose files have other checksums is made again.
        Raises CorpusError for faults of the text, Unwritten on a full disk.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        found: list[Shard] = []
        place = START
        documents: Iterator[tuple[Document, Place]] | None = None
        while True:
            number = len(found)
            shard = read_shard(self.folder, number, verify=verify)
            if shard is None:
                if documents is None:
                    if place != START:
                        self.say(
                            f"{self.text.source}: {number:,} finished shards are kept, going on behind them"
                        )
                    documents = self.corpus.read(place)
                content, end = self._fill(documents, place)
                if not content:
                    break
                check_states(self.corpus, self.before, place.file, end.file)
                shard = write_shard(
                    self.folder,
                    number,
                    content,
                    end,
                    bos=int(self.tokenizer.bos_token_id),
                    seed=self.spec.seed,
                    dtype=self.dtype,
                )
                self._tell(found, shard)
            else:
                documents = None
            found.append(shard)
            place = shard.place
        check_states(self.corpus, self.before, 0, len(self.before))
        self._finish(found)

    def _fill(self, documents: Iterator[tuple[Document, Place]], place: Place) -> tuple[ShardContent, Place]:
        """The next shard's documents, and where the one behind it begins."""
        content = ShardContent()
        batch: list[Document] = []
        size = 0
        for document, place in documents:
            batch.append(document)
            size += len(document.text)
            if size >= BATCH_BYTES:
                self._add(content, batch)
                batch, size = [], 0
                if content.text_bytes >= SHARD_BYTES:
                    return content, place
        self._add(content, batch)
        return content, place

    def _add(self, content: ShardContent, batch: list[Document]) -> None:
        texts = [document.text for document in batch]
        for document, ids in zip(batch, encode_texts(self.tokenizer, texts), strict=True):
            raw = document.text.encode()
            hashed = share(self.spec.seed, hashlib.sha256(raw).digest())
            tokens = np.array(ids, dtype=self.dtype)
            if hashed < self.spec.validation_fraction:
                content.held.append((document.id, hashed, len(raw), tokens))
            else:
                content.trained.append(tokens)
                content.text_bytes += len(raw)

    def _tell(self, found: list[Shard], shard: Shard) -> None:
        self._made += shard.text_bytes + shard.held_bytes
        now = time.monotonic()
        if now - self._said < SECONDS_BETWEEN and found:
            return
        self._said = now
        done = sum(one.text_bytes + one.held_bytes for one in (*found, shard))
        speed = self._made / max(1e-3, now - self._begun)
        total = text_size(self.corpus)
        told = (
            f"{done / 1e6:,.0f} MB"
            if total is None
            else f"{done / 1e6:,.0f} of at most {total / 1e6:,.0f} MB"
        )
        self.say(f"tokenizing {self.text.source}: {told}, {speed / 1e6:.1f} MB/s")

    def _finish(self, found: list[Shard]) -> None:
        """Write the manifest; one that is the same already stays."""
        about: dict[str, Any] = {
            "format": FORMAT,
            "dtype": self.dtype.str,
            "bos_token_id": int(self.tokenizer.bos_token_id),
            "shards": [asdict(one) for one in found],
        }
        if not sum(one.tokens for one in found):
            raise CorpusError(
                f"every document of '{self.text.source}' is held out: lower corpus.validation_fraction or add documents"
            )
        target = self.folder / MANIFEST
        content = json.dumps(about)
        if target.exists() and target.read_text(encoding="utf-8") == content:
            return
        with replacing(target) as part:
            part.write_text(content, encoding="utf-8")


def whole(folder: Path) -> bool:
    """Whether a folder has its manifest and, by their sizes, every shard in it."""
    try:
        shards = json.loads((folder / MANIFEST).read_bytes())["shards"]
        return all(read_shard(folder, number) is not None for number in range(len(shards)))
    except (OSError, ValueError, KeyError, TypeError):
        return False


def text_size(corpus: Corpus) -> int | None:
    """The most bytes of text that reading can give; None where files are packed or there are none."""
    if not isinstance(corpus, FileCorpus):
        return None
    used = corpus.used()
    if any(suffix_of(file.path) not in (*PLAIN, ".jsonl") for file in used):
        return corpus.max_bytes
    total = sum(file.size for file in used)
    return total if corpus.max_bytes is None else min(total, corpus.max_bytes)


def sample(spec: DataSpec, shares: list[float], most: int) -> Iterator[str]:
    """Texts of the training side for the tokenizer: of each source its share of `most` bytes, from its beginning.

    Of several files the beginning is a sample, by the hash of their names.
    """
    for text, part in zip(spec.texts, shares, strict=True):
        wanted = int(most * part)
        # A little more is read than wanted, as some of it is held out.
        room = int(wanted / (1 - spec.validation_fraction) * 1.1) + BATCH_BYTES
        limit = room if text.max_bytes is None else min(room, text.max_bytes)
        corpus = open_corpus(text.source, text_field=text.text_field, max_bytes=limit)
        taken = 0
        for document in corpus.documents():
            raw = document.text.encode()
            if share(spec.seed, hashlib.sha256(raw).digest()) < spec.validation_fraction:
                continue
            yield document.text
            taken += len(raw)
            if taken >= wanted:
                break

"""A corpus becomes two token stores and a tokenizer, once: later calls open what the cache holds."""

from __future__ import annotations

import errno
import hashlib
import json
import shutil
from array import array
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from filelock import FileLock, Timeout

from clearhead.data.began import check_text, check_tokens
from clearhead.data.cache import cache_dir, digest_json, fingerprint
from clearhead.data.corpora import Corpus, FileCorpus, open_corpus
from clearhead.data.readers import CorpusError
from clearhead.data.spec import DataSpec as DataSpec
from clearhead.data.spec import PreparedData as PreparedData
from clearhead.data.spec import Progress
from clearhead.data.store import DamagedStore, TokenStore, TokenWriter
from clearhead.data.streams import prepare_stream
from clearhead.data.tokenizer import encode_texts, get_tokenizer, load_pretrained, tokenizer_files
from clearhead.data.tokenizing import share
from clearhead.data.writing import writing

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

FORMAT = 1
SOURCES = "sources.json"
BATCH_BYTES = 2**20
# Text that whoever has little memory should rather have in shards.
LARGE_TEXT = 2 * 2**30
TOKENIZER_BYTES = 64 * 2**20
DISK_ERRORS = {errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EFBIG}


def prepare(
    spec: DataSpec,
    *,
    progress: Progress | None = None,
    began: Mapping[str, Any] | None = None,
    verify: bool = False,
) -> PreparedData:
    """Read, split, tokenize and store the corpus of `spec`, or open what an earlier call stored.

    The split is by document: a document is validation when the hash of (seed, its text) falls below
    `validation_fraction`, whatever its name, its place and the other documents; equal texts therefore never lie on
    both sides. Only when that leaves a side empty does the nearest text change sides. The tokenizer is trained on the
    training side alone (a sample of 64 MiB of it at most).

    Several processes may prepare at once: one works, the others wait for it. A killed one leaves nothing behind that
    is taken for whole, and damaged data is made again. While it works the disk holds the text once more.

    began: the identity of the data that a run began with. Text, tokenizer and tokens that are not those any more are
    refused, the file that differs named; so is a text that changes while it is read.

    Several sources, and one that is to be tokenized in shards (`DataSpec.streamed`), are prepared by `streams`; verify:
    read every shard that is there and make a damaged one again.

    Raises CorpusError for any fault of the corpus (see `corpora.open_corpus`), when it has fewer
    than two different documents, and when the cache directory cannot be written.
    """
    say = progress or (lambda message: None)
    if spec.streamed:
        return prepare_stream(spec, say, began, verify=verify)
    corpus = open_corpus(spec.source, text_field=spec.text_field, max_bytes=spec.max_bytes)
    say(f"checking {spec.source}")
    if (account := corpus.account()) is not None:
        say(account)
    if isinstance(corpus, FileCorpus) and (size := sum(file.size for file in corpus.used())) > LARGE_TEXT:
        say(
            f'{size / 1e9:.1f} GB in one store need much memory: corpus.tokenized = "FOLDER" streams them instead'
        )
    sources = corpus.sources()
    made_from = {
        "format": FORMAT,
        "spec": spec.identity(),
        "corpus": corpus.identity(sources),
        "tokenizer_files": tokenizer_files(spec.tokenizer),
    }
    folder = folder_of(made_from)
    if began is not None:
        check_text(began, made_from, (known_sources(began), sources))
    prepared = stored(corpus, spec, made_from, sources, folder, say)
    if began is not None:
        check_tokens(began, prepared.identity, folder)
    return prepared


def folder_of(made_from: Mapping[str, Any]) -> Path:
    """Where data made from this lies; `made_from` may say more."""
    key = {name: made_from.get(name) for name in ("format", "spec", "corpus", "tokenizer_files")}
    return cache_dir() / "prepared" / digest_json(key)[:32]


def known_sources(identity: Mapping[str, Any]) -> dict[str, str]:
    """The stamps of the files that data was made from; empty when the cache does not have them any more."""
    try:
        found = json.loads((folder_of(identity) / SOURCES).read_bytes())
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def stored(
    corpus: Corpus,
    spec: DataSpec,
    made_from: dict[str, Any],
    sources: dict[str, str],
    folder: Path,
    say: Progress,
) -> PreparedData:
    """What `folder` holds, made first if it is not there."""
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise unwritable(folder.parent, error) from error
    try:
        lock = FileLock(folder.with_suffix(".lock"))
        try:
            lock.acquire(timeout=0)
        except Timeout:
            say("waiting for another process that prepares the same data")
            lock.acquire()
        try:
            if (found := load(folder)) is not None:
                return found
            shutil.rmtree(folder, ignore_errors=True)
            work = folder.with_suffix(".part")
            shutil.rmtree(work, ignore_errors=True)
            try:
                with writing(work):
                    build(corpus, spec, made_from, work, say)
                again = open_corpus(spec.source, text_field=spec.text_field, max_bytes=spec.max_bytes)
                now = again.sources()
                check_text(made_from, {"corpus": again.identity(now)}, (sources, now))
                (work / SOURCES).write_text(json.dumps(sources))
                work.rename(folder)
            finally:
                shutil.rmtree(work, ignore_errors=True)
        finally:
            lock.release()
    except OSError as error:
        if error.errno not in DISK_ERRORS:
            raise
        raise unwritable(folder.parent, error) from error
    prepared = load(folder)
    if prepared is None:
        raise CorpusError(f"the data just written to '{folder}' cannot be read back: check the disk")
    return prepared


def unwritable(folder: Path, error: OSError) -> CorpusError:
    return CorpusError(
        f"the prepared data cannot be written under '{folder}' ({error.strerror}): free space there or set "
        "CLEARHEAD_CACHE to another directory"
    )


def load(folder: Path) -> PreparedData | None:
    """What `build` left in `folder`; None when nothing or something damaged is there."""
    from transformers import PreTrainedTokenizerFast

    try:
        identity = json.loads((folder / "identity.json").read_text())
        for name, expected in identity["files"].items():
            if fingerprint(folder / name) != expected:
                return None
        tokenizer = PreTrainedTokenizerFast.from_pretrained(folder / "tokenizer")
        train, validation = TokenStore.load(folder / "train"), TokenStore.load(folder / "validation")
    except (OSError, ValueError, KeyError, TypeError, AttributeError, DamagedStore):
        return None
    return PreparedData(tokenizer, train, validation, identity)


@dataclass
class Spool:
    """The text of the corpus on disk and, per document, its place, name and share (where its hash lies in [0, 1))."""

    file: IO[bytes]
    offsets: array[int]
    shares: array[float]
    ids: list[str]
    digests: set[bytes]

    def text(self, i: int) -> str:
        self.file.seek(self.offsets[i])
        return self.file.read(self.offsets[i + 1] - self.offsets[i]).decode()

    def size(self, i: int) -> int:
        return self.offsets[i + 1] - self.offsets[i]


def build(corpus: Corpus, spec: DataSpec, made_from: dict[str, Any], folder: Path, say: Progress) -> None:
    """Write the stores, the tokenizer and, last, identity.json with the fingerprints of all of them."""
    folder.mkdir(parents=True)
    # A tokenizer that cannot be loaded should not cost a pass over the corpus.
    given = None if spec.tokenizer == "bpe" else load_pretrained(spec.tokenizer, mask=spec.mask)
    spooled = folder / "text"
    with spooled.open("w+b") as file:
        spool = read_corpus(corpus, spec, file, say)
        train, validation = split(spool, spec)
        tokenizer = given or trained_tokenizer(spool, train, spec, say)
        counts = {}
        for name, documents in (("train", train), ("validation", validation)):
            counts[name] = tokenize(spool, documents, tokenizer, folder / name, say)
    spooled.unlink()
    tokenizer.save_pretrained(folder / "tokenizer")
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    identity = {
        **made_from,
        "vocab_size": len(tokenizer),
        "duplicates": len(spool.ids) - len(spool.digests),
        **counts,
        "files": {path.relative_to(folder).as_posix(): fingerprint(path) for path in files},
    }
    (folder / "identity.json").write_text(json.dumps(identity, indent=1))


def read_corpus(corpus: Corpus, spec: DataSpec, file: IO[bytes], say: Progress) -> Spool:
    """One pass over the corpus: its text goes to `file`, so that a remote or packed source is read once."""
    spool = Spool(file, array("q", [0]), array("d"), [], set())
    reported = 0
    for document in corpus.documents():
        raw = document.text.encode()
        digest = hashlib.sha256(raw).digest()
        file.write(raw)
        spool.offsets.append(spool.offsets[-1] + len(raw))
        spool.shares.append(share(spec.seed, digest))
        spool.ids.append(document.id)
        spool.digests.add(digest[:16])
        if spool.offsets[-1] - reported >= 16 * BATCH_BYTES:
            reported = spool.offsets[-1]
            say(f"reading {spec.source}: {reported / 1e6:.0f} MB")
    file.flush()
    return spool


def split(spool: Spool, spec: DataSpec) -> tuple[list[int], list[int]]:
    """Documents of the training side in the order of the corpus, and of the validation side in the order of shares.

    Hash order makes the first documents of the validation side a random sample.
    """
    if len(spool.digests) < 2:
        raise CorpusError(
            f"the corpus '{spec.source}' has {len(spool.digests)} different document(s), and training and validation "
            "need at least one each: add documents or raise corpus.max_bytes"
        )
    border = spec.validation_fraction
    lowest, highest = min(spool.shares), max(spool.shares)
    if lowest >= border:
        border = min(share for share in spool.shares if share > lowest)
    elif highest < border:
        border = highest
    train = [i for i, value in enumerate(spool.shares) if value >= border]
    validation = [i for i, value in enumerate(spool.shares) if value < border]
    return train, sorted(validation, key=lambda i: (spool.shares[i], spool.ids[i]))


def trained_tokenizer(
    spool: Spool, train: list[int], spec: DataSpec, say: Progress
) -> PreTrainedTokenizerFast:
    """A tokenizer trained on the training side: all of it, or 64 MiB chosen by hash."""
    say("training the tokenizer")
    total = sum(spool.size(i) for i in train)
    chosen = train
    if total > TOKENIZER_BYTES:
        chosen, taken = [], 0
        for i in sorted(train, key=lambda i: spool.shares[i]):
            chosen.append(i)
            taken += spool.size(i)
            if taken >= TOKENIZER_BYTES:
                break
    # A share is a hash of the text, so the sorted shares name the set of texts.
    key = digest_json(sorted((spool.shares[i], spool.size(i)) for i in chosen))
    texts = (spool.text(i) for i in chosen)
    return get_tokenizer(
        spec.tokenizer, vocab_size=spec.vocab_size, texts=texts, cache_key=key, mask=spec.mask
    )


def tokenize(
    spool: Spool, documents: list[int], tokenizer: PreTrainedTokenizerFast, folder: Path, say: Progress
) -> dict[str, int]:
    """Write the tokens of `documents` batch by batch; returns the counts of the split."""
    total = sum(spool.size(i) for i in documents)
    done = reported = 0
    bos = tokenizer.bos_token_id
    with TokenWriter(folder, vocab_size=len(tokenizer), bos_token_id=bos) as writer:
        for batch in batches(spool, documents):
            for i, ids in zip(batch, encode_texts(tokenizer, [spool.text(i) for i in batch]), strict=True):
                writer.add(spool.ids[i], ids, spool.size(i))
                done += spool.size(i)
            if done - reported >= total // 10:
                reported = done
                say(f"tokenizing {folder.name}: {100 * done // total}%")
    return {"documents": len(documents), "bytes": total, "tokens": sum(writer.lengths)}


def batches(spool: Spool, documents: list[int]) -> Iterator[list[int]]:
    """Documents in groups of about a megabyte, which is what the tokenizer needs to use every core."""
    batch: list[int] = []
    held = 0
    for i in documents:
        batch.append(i)
        held += spool.size(i)
        if held >= BATCH_BYTES:
            yield batch
            batch, held = [], 0
    if batch:
        yield batch

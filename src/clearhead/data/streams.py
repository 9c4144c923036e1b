"""Several texts, or one that is large, become shards of tokens, a tokenizer and a validation store, once.

    ROOT/mixtures/KEY/   tokenizer/, validation/, identity.json, sources.json: small
    ROOT/sources/KEY/    the shards of one text with one tokenizer; mixtures that differ in weights alone share them
    ROOT/stamps/         what is known of the texts' files

ROOT is `corpus.tokenized`, or the folder `streams` in the cache.
"""

from __future__ import annotations

import hashlib
import json
import re
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from filelock import FileLock, Timeout

from clearhead.data.began import check_text, check_tokens
from clearhead.data.cache import cache_dir, digest_json, fingerprint
from clearhead.data.readers import Corpus, CorpusError
from clearhead.data.shards import MANIFEST, TokenizedSource
from clearhead.data.spec import DataSpec, PreparedData, Progress, TextSource
from clearhead.data.stamps import NOT_WRITABLE, quick_sources
from clearhead.data.store import DamagedStore, TokenStore, TokenWriter
from clearhead.data.streamed import RESIDENT, StreamedText
from clearhead.data.tokenizer import get_tokenizer, load_pretrained, tokenizer_files
from clearhead.data.tokenizing import SHARD_BYTES, Tokenizing, open_text, sample, whole
from clearhead.data.weights import WHOLE, whole_shares
from clearhead.data.writing import writing

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

FORMAT = 1
SOURCES = "sources.json"
# Letters of a source that the name of its folder begins with.
NAMED = 40
TOKENIZER_BYTES = 64 * 2**20
# Held-out text that is kept for evaluations, of all sources together.
VALIDATION_BYTES = 32 * 2**20


def root_of(spec: DataSpec) -> Path:
    """Where the shards of `spec` lie."""
    return cache_dir() / "streams" if spec.tokenized is None else Path(spec.tokenized).expanduser()


def prepare_stream(
    spec: DataSpec, say: Progress, began: Mapping[str, Any] | None, *, verify: bool = False
) -> PreparedData:
    """What `prepare.prepare` promises, of texts that are read in shards.

    A document is held out when the hash of (seed, its text) falls below `validation_fraction`; the validation store has
    those with the lowest hashes, up to 32 MiB of text, of each source by its weight. The tokenizer `bpe` is trained on
    64 MiB of the training side: of each source its weight's part, from its beginning, and of several files the
    beginning in the order of the hash of their names.

    verify: read every shard and make a damaged one again; without it the sizes of files are looked at, and whoever
    reads a shard compares its checksum.
    """
    shares = whole_shares([text.weight for text in spec.texts])
    corpora = [open_text(text) for text in spec.texts]
    root = root_of(spec)
    texts: dict[str, Any] = {}
    stamps: dict[str, dict[str, str]] = {}
    with writing(root):
        for text, part, corpus in zip(spec.texts, shares, corpora, strict=True):
            say(f"checking {text.source}")
            if (account := corpus.account()) is not None:
                say(account)
            stamps[text.source] = quick_sources(corpus, root / "stamps")
            texts[text.source] = {**corpus.identity(stamps[text.source]), "share": part}
    made_from = {
        "format": FORMAT,
        "spec": spec.identity(),
        "corpus": {"kind": "mixture", "sources": texts},
        "tokenizer_files": tokenizer_files(spec.tokenizer),
        "shard_bytes": SHARD_BYTES,
    }
    files = flat(stamps)
    if began is not None:
        check_text(began, made_from, (known_sources(root, began), files))
    folder = root / "mixtures" / digest_json(made_from)[:32]
    # Without the lock first: what is there may lie in a folder that only its maker can write in.
    prepared = None if verify else load(folder, root)
    if prepared is None:
        with _writable(root), locked(folder, say), writing(root):
            prepared = None if verify else load(folder, root)
            if prepared is None:
                Building(spec, made_from, folder, root, say).build(corpora, shares, files, verify=verify)
                prepared = load(folder, root)
    if prepared is None:
        raise CorpusError(f"the tokens just written to '{root}' cannot be read back: check the disk")
    if began is not None:
        check_tokens(began, prepared.identity, folder)
    return prepared


@contextmanager
def _writable(root: Path) -> Iterator[None]:
    """CorpusError, naming the key, where `root` is no folder that can be written in."""
    try:
        yield
    except OSError as error:
        if error.errno not in NOT_WRITABLE:
            raise
        raise CorpusError(
            f"corpus.tokenized: no tokens can be written to '{root}' ({error.strerror}); name a folder that can be "
            "written, or the one where this text's tokens lie already"
        ) from error


def flat(stamps: Mapping[str, Mapping[str, str]]) -> dict[str, str]:
    """Stamps by the name of the file; with several sources, the source stands before it."""
    several = len(stamps) > 1
    return {
        f"{source}: {name}" if several else name: stamp
        for source, files in stamps.items()
        for name, stamp in files.items()
    }


def known_sources(root: Path, identity: Mapping[str, Any]) -> dict[str, str]:
    """The stamps of the files that a mixture was made from; empty where they are not known any more."""
    keys = ("format", "spec", "corpus", "tokenizer_files", "shard_bytes")
    key = {name: identity[name] for name in keys if name in identity}
    try:
        found = json.loads((root / "mixtures" / digest_json(key)[:32] / SOURCES).read_bytes())
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


@contextmanager
def locked(folder: Path, say: Progress) -> Iterator[None]:
    """Hold the lock of a folder."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    lock = FileLock(folder.with_name(f"{folder.name}.lock"))
    try:
        lock.acquire(timeout=0)
    except Timeout:
        say("waiting for another process that tokenizes the same text")
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


def load(folder: Path, root: Path) -> PreparedData | None:
    """What `Building` left; None when nothing, or something damaged or incomplete, is there."""
    from transformers import PreTrainedTokenizerFast

    try:
        identity = json.loads((folder / "identity.json").read_bytes())
        for name, expected in identity["files"].items():
            if fingerprint(_place(name, folder, root, identity)) != expected:
                return None
        names, places = list(identity["corpus"]["sources"]), identity["places"]
        if not all(whole(root / "sources" / place) for place in places):
            return None
        resident = max(2, RESIDENT // len(names))
        sources = [
            TokenizedSource(root / "sources" / place, name, resident)
            for name, place in zip(names, places, strict=True)
        ]
        shares = [source["share"] for source in identity["corpus"]["sources"].values()]
        tokenizer = PreTrainedTokenizerFast.from_pretrained(folder / "tokenizer")
        validation = TokenStore.load(folder / "validation")
    except (OSError, ValueError, KeyError, TypeError, AttributeError, DamagedStore):
        return None
    return PreparedData(tokenizer, StreamedText(tuple(sources), tuple(shares)), validation, identity)


def _place(name: str, folder: Path, root: Path, identity: Mapping[str, Any]) -> Path:
    """The file that a name in `identity["files"]` stands for: `train/PLACE/...` are the sources' manifests."""
    return root / "sources" / name.removeprefix("train/") if name.startswith("train/") else folder / name


class Building:
    """The making of one mixture."""

    def __init__(
        self, spec: DataSpec, made_from: dict[str, Any], folder: Path, root: Path, say: Progress
    ) -> None:
        self.spec = spec
        self.made_from = made_from
        self.folder = folder
        self.root = root
        self.say = say

    def build(
        self, corpora: list[Corpus], shares: list[int], files: Mapping[str, str], *, verify: bool
    ) -> None:
        """Tokenizer, shards, validation store, in this order; what is there already is kept."""
        tokenizer = self._tokenizer(shares)
        parts = zip(self.spec.texts, corpora, strict=True)
        places = [self._tokenize(text, corpus, tokenizer, verify) for text, corpus in parts]
        work = self.folder.with_name(f"{self.folder.name}.part")
        shutil.rmtree(work, ignore_errors=True)
        try:
            work.mkdir(parents=True)
            self._write(work, places, shares, tokenizer, files)
            # Only what was made of the mixture; the shards are what took time.
            shutil.rmtree(self.folder, ignore_errors=True)
            work.rename(self.folder)
        finally:
            shutil.rmtree(work, ignore_errors=True)

    def _tokenizer(self, shares: list[int]) -> PreTrainedTokenizerFast:
        spec = self.spec
        if spec.tokenizer != "bpe":
            return load_pretrained(spec.tokenizer, mask=spec.mask)
        parts = [share / WHOLE for share in shares]
        self.say(f"training the tokenizer on a sample of {TOKENIZER_BYTES / 2**20:g} MiB at most")
        digest = hashlib.sha256()
        for text in sample(spec, parts, TOKENIZER_BYTES):
            digest.update(hashlib.sha256(text.encode()).digest())
        texts = sample(spec, parts, TOKENIZER_BYTES)
        return get_tokenizer(
            "bpe", vocab_size=spec.vocab_size, texts=texts, cache_key=digest.hexdigest(), mask=spec.mask
        )

    def _tokenize(
        self, text: TextSource, corpus: Corpus, tokenizer: PreTrainedTokenizerFast, verify: bool
    ) -> str:
        about = dict(self.made_from["corpus"]["sources"][text.source])
        del about["share"]
        key = digest_json(
            {
                "format": FORMAT,
                "text": about,
                "tokenizer": tokenizer.backend_tokenizer.to_str(),
                "bos_token_id": tokenizer.bos_token_id,
                "validation_fraction": self.spec.validation_fraction,
                "seed": self.spec.seed,
                "shard_bytes": SHARD_BYTES,
            }
        )
        name = re.sub(r"[^A-Za-z0-9.]+", "-", text.source)[-NAMED:].strip("-.")
        folder = self.root / "sources" / f"{name}-{key[:16]}"
        with locked(folder, self.say):
            Tokenizing(self.spec, text, corpus, tokenizer, folder, self.say).run(verify=verify)
        return folder.name

    def _write(
        self,
        work: Path,
        places: list[str],
        shares: list[int],
        tokenizer: PreTrainedTokenizerFast,
        files: Mapping[str, str],
    ) -> None:
        sources = [
            TokenizedSource(self.root / "sources" / place, text.source)
            for place, text in zip(places, self.spec.texts, strict=True)
        ]
        kept = write_validation(work / "validation", sources, shares, tokenizer)
        held = sum(shard.held for source in sources for shard in source.shards)
        if not kept["documents"]:
            raise CorpusError(
                "no document of the corpus is held out: raise corpus.validation_fraction or add documents"
            )
        if held > kept["documents"]:
            self.say(
                f"held out: {held:,} documents, of which the {kept['documents']:,} with the lowest hashes are kept for "
                "evaluations; a smaller corpus.validation_fraction would leave more to train on"
            )
        tokenizer.save_pretrained(work / "tokenizer")
        made = {path.relative_to(work).as_posix(): path for path in sorted(work.rglob("*")) if path.is_file()}
        made |= {
            f"train/{place}/{MANIFEST}": self.root / "sources" / place / MANIFEST
            for place in dict.fromkeys(places)
        }
        identity = {
            **self.made_from,
            "places": places,
            "vocab_size": len(tokenizer),
            "train": {
                "documents": sum(one.documents for one in sources),
                "bytes": sum(one.text_bytes for one in sources),
                "tokens": sum(one.num_tokens for one in sources),
            },
            "validation": {**kept, "held_out": held},
            "files": {name: fingerprint(path) for name, path in made.items()},
        }
        (work / SOURCES).write_text(json.dumps(files), encoding="utf-8")
        (work / "identity.json").write_text(json.dumps(identity, indent=1), encoding="utf-8")


def write_validation(
    folder: Path, sources: list[TokenizedSource], shares: list[int], tokenizer: PreTrainedTokenizerFast
) -> dict[str, int]:
    """The store of held-out documents, in the order of their hashes, and its counts.

    Of each source no more than its part of `VALIDATION_BYTES`, so that much text is not more memory.
    """
    chosen: list[tuple[float, str, int, Any]] = []
    for number, (source, part) in enumerate(zip(sources, shares, strict=True)):
        room = VALIDATION_BYTES * part // WHOLE
        found: list[tuple[float, str, int, Any]] = []
        for shard in range(len(source.shards)):
            found = lowest([*found, *source.held(shard)], room)
        several = f"{number}/" if len(sources) > 1 else ""
        chosen += [(share, several + name, size, read) for share, name, size, read in found]
    chosen.sort(key=lambda one: one[:2])
    with TokenWriter(folder, vocab_size=len(tokenizer), bos_token_id=int(tokenizer.bos_token_id)) as writer:
        for _, name, size, read in chosen:
            writer.add(name, read().tolist(), size)
    return {
        "documents": len(chosen),
        "bytes": sum(one[2] for one in chosen),
        "tokens": sum(writer.lengths),
    }


def lowest(found: list[tuple[float, str, int, Any]], room: int) -> list[tuple[float, str, int, Any]]:
    """The documents with the lowest shares that together first reach `room` bytes."""
    found = sorted(found, key=lambda one: one[:2])
    taken = 0
    for count, one in enumerate(found, start=1):
        taken += one[2]
        if taken >= room:
            return found[:count]
    return found

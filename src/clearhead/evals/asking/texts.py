"""Texts to evaluate on: whole documents, tokenized as a model's own tokenizer does, none of them ever trained on."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from clearhead.data.corpora import open_corpus
from clearhead.data.needles import NeedleTokenizer
from clearhead.data.readers import SUFFIXES, CorpusError, Document, read_file, suffix_of
from clearhead.data.store import TokenStore
from clearhead.data.tokenizer import encode_texts
from clearhead.evals.reasons import Unmeasured

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

    from clearhead.evals.subject import Subject

MOST_BYTES = 32 * 10**6
"""Text that is read of one source: an evaluation needs a few hundred documents, not a data set."""
NO_BOS = -1


def open_texts(
    sources: Sequence[str],
    tokenizer: PreTrainedTokenizerFast,
    *,
    text_field: str = "text",
    max_bytes: int = MOST_BYTES,
) -> TokenStore:
    """Every document of `sources` in memory, in their order.

    A source is what `corpora.open_corpus` opens, but for a file alone: a plain text is one
    document however long it is (a book stays whole), a .jsonl one a record. Nothing is added to a text.

    Raises CorpusError for a source that is missing, empty or unreadable.
    """
    documents = [
        document for source in sources for document in read_source(source, text_field, max_bytes=max_bytes)
    ]
    if not documents:
        raise CorpusError(f"{', '.join(map(repr, sources)) or 'no source'} holds no text to evaluate on")
    tokens = encode_texts(tokenizer, [document.text for document in documents])
    store = TokenStore.from_documents(
        tokens,
        bos_token_id=NO_BOS if tokenizer.bos_token_id is None else int(tokenizer.bos_token_id),
        utf8_bytes=[len(document.text.encode()) for document in documents],
    )
    store.ids[:] = [document.id for document in documents]
    return store


def read_source(source: str, text_field: str = "text", *, max_bytes: int = MOST_BYTES) -> Iterator[Document]:
    """The documents of one source of `open_texts`."""
    path = Path(source).expanduser()
    if path.is_file() and suffix_of(path) in SUFFIXES:
        yield from read_file(path, path.name, text_field=text_field, part_bytes=None)
    else:
        yield from open_corpus(source, text_field=text_field, max_bytes=max_bytes).documents()


def utf8_size(tokenizer: NeedleTokenizer, tokens: NDArray[np.integer]) -> int:
    """Bytes of the text that these tokens are."""
    return len(str(tokenizer.decode(tokens.tolist())).encode())


Ids = NDArray[np.int64]


def long_documents(
    store: TokenStore, least: int, most: int, wanted: int, seed: int
) -> tuple[list[int], list[Ids]]:
    """At most `wanted` documents of `least` tokens or more, drawn by `seed`, cut to `most` tokens."""
    long_enough = np.flatnonzero(np.diff(store.offsets) >= least).tolist()
    chosen = [long_enough[i] for i in choose(len(long_enough), wanted, seed)]
    return chosen, [np.asarray(store.document(i)[:most], dtype=np.int64) for i in chosen]


@dataclass(frozen=True, eq=False)
class Openings:
    """The beginnings of documents, all of one length.

    texts: their tokens without bos. rows: (documents, length), with it. documents: their names.
    """

    texts: list[Ids]
    rows: Ids
    documents: list[str]

    def predicted(self, index: int) -> Ids:
        """The tokens of a text that something predicts: all but its first where no bos stands before it."""
        return self.texts[index][1 - self.rows.shape[1] :]


def openings(
    subject: Subject,
    length: int,
    wanted: int,
    seed: int,
    option: str,
    *,
    store: TokenStore | None = None,
    bos: bool = True,
    least: int = 1,
) -> Openings:
    """The first `length` tokens of at most `wanted` documents, a bos token among them where the tokenizer has one.

    store: whose documents (default: the subject's). bos: False reads without.
    Raises Unmeasured for fewer than `least` documents of that length, naming the `option` that asks for it.
    """
    store = subject.documents if store is None else store
    token = subject.tokenizer.bos_token_id if bos else None
    head = np.array([] if token is None else [token], dtype=np.int64)
    size = length - len(head)
    chosen, texts = long_documents(store, size, size, wanted, seed)
    if len(texts) < least:
        few = f"only {len(texts)} documents have {length} tokens, at least {least} are needed"
        raise Unmeasured(
            f"{few if least > 1 else f'no document has {length} tokens'}; lower evaluate.{option}"
        )
    rows = np.array([np.concatenate([head, text]) for text in texts], dtype=np.int64).reshape(-1, length)
    return Openings(texts, rows, [store.ids[i] for i in chosen])


def choose(available: int, wanted: int, seed: int) -> list[int]:
    """At most `wanted` of `available` documents, drawn without replacement, in order."""
    if wanted >= available:
        return list(range(available))
    return sorted(np.random.default_rng(seed).choice(available, wanted, replace=False).tolist())

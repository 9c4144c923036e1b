"""Masked language modelling: which tokens of a row are hidden, the same for every arm with the same seed.

The hiding itself is that of transformers' `DataCollatorForLanguageModeling`, with a generator of its own for each row:
what is hidden depends on the key of the row alone, so that a resumed run, another arm and another process see the same.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from clearhead.data.packing import Example
from clearhead.data.readers import CorpusError
from clearhead.data.store import TextRows

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

Ids = NDArray[np.int64]
# Of the tokens that are asked for: shown as the mask token, as a random token; the rest is shown as it is.
REPLACED, RANDOM = 0.8, 0.1
# Last word of the seed of a random stream, so that masks share no random numbers with the order of documents.
STREAM = 0x6D61736B
# What a byte-level or SentencePiece vocabulary writes for white space at the beginning of a token.
SPACES = ("Ġ", "Ċ", "ĉ", "č", "▁", " ")
CONTINUED = "##"


class Masker:
    """Hides tokens of a row.

    share:       chance of each token, or with `whole_words` of each word, to be asked for. Special tokens never are.
    whole_words: all tokens of a word or none. A word ends at white space, and where letters meet digits or other signs.
    always:      what is asked for is always shown as the mask token. By default (BERT's rule, Devlin et al. 2019, which
        ModernBERT keeps at a share of 0.3) 80 % are, 10 % are shown as a random token and 10 % as they are; whole words
        are always hidden, as transformers does it.
    Raises CorpusError for a tokenizer without a mask token.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerFast,
        share: float,
        *,
        whole_words: bool = False,
        always: bool = False,
    ) -> None:
        from transformers import DataCollatorForLanguageModeling

        if tokenizer.mask_token_id is None:
            raise CorpusError(
                "the tokenizer has no mask token, which masked language modelling shows in place of a hidden one: set "
                "mask_token in its tokenizer_config.json"
            )
        hidden = 1.0 if whole_words or always else REPLACED
        self.collator: Any = DataCollatorForLanguageModeling(
            tokenizer,
            mlm_probability=share,
            whole_word_mask=whole_words,
            mask_replace_prob=hidden,
            random_replace_prob=0.0 if hidden == 1.0 else RANDOM,
            return_tensors="np",
        )
        self.special = np.zeros(len(tokenizer), dtype=bool)
        self.special[tokenizer.all_special_ids] = True
        self.pieces = _Pieces(tokenizer) if whole_words else None

    def __call__(self, ids: Ids, key: Sequence[int]) -> tuple[Ids, Ids]:
        """ids (L,) as they are shown, and labels (L,): −100 where nothing is asked for. key: seeds the choice."""
        self.collator.generator = np.random.default_rng((*key, STREAM))
        special = self.special[ids]
        spans = None if self.pieces is None else self.pieces.spans(ids)[None]
        shown, labels = self.collator.numpy_mask_tokens(
            ids[None].copy(), special[None].astype(np.int64), spans
        )
        return shown[0], labels[0]


class MaskedRows:
    """Packed rows of text with tokens hidden; what row i hides depends on (seed, i) alone, so each epoch hides anew."""

    def __init__(self, text: TextRows, masker: Masker, rows: int, seed: int) -> None:
        self.text = text
        self.masker = masker
        self.rows = rows
        self.seed = seed

    def __len__(self) -> int:
        return self.rows

    def kind(self, index: int) -> str:
        """What the row is, for the log."""
        return "text"

    def __getitem__(self, index: int) -> Example:
        row = self.text[index]
        shown, labels = self.masker(row["input_ids"], (self.seed, index))
        return {"input_ids": shown, "labels": labels, "position_ids": row["position_ids"]}


class _Pieces:
    """How the tokens of a vocabulary begin and end: all that tells where a word begins."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast) -> None:
        pieces = [str(piece) for piece in tokenizer.convert_ids_to_tokens(list(range(len(tokenizer))))]
        self.begins = np.array([piece.startswith(SPACES) for piece in pieces])
        self.continues = np.array([piece.startswith(CONTINUED) for piece in pieces])
        bare = [piece.removeprefix(CONTINUED) or piece for piece in pieces]
        self.first = np.array([_kind(piece[0]) for piece in bare])
        self.last = np.array([_kind(piece[-1]) for piece in bare])

    def spans(self, ids: Ids) -> NDArray[np.int64]:
        """(L, 2) places such that transformers, which looks for gaps between them, finds the words of ids (L,)."""
        same = (self.first[ids[1:]] == self.last[ids[:-1]]) & ~self.begins[ids[1:]]
        word = np.concatenate([[True], ~(same | self.continues[ids[1:]])])
        starts = np.arange(len(ids)) + np.cumsum(word)
        return np.stack([starts, starts + 1], axis=1)


def _kind(sign: str) -> int:
    """White space, letters, digits, and signs of any other kind."""
    return 3 if sign in SPACES else 0 if sign.isalpha() else 1 if sign.isdigit() else 2


def token_bytes(tokenizer: PreTrainedTokenizerFast) -> NDArray[np.int64] | None:
    """Bytes of text of each token of a byte-level vocabulary, 0 for special tokens; None for another vocabulary.

    There a token's sign stands for a byte. Elsewhere the bytes of a token depend on those beside it.
    """
    decoder = json.loads(tokenizer.backend_tokenizer.to_str()).get("decoder")
    if '"ByteLevel"' not in json.dumps(decoder):
        return None
    sizes = np.array(
        [len(str(piece)) for piece in tokenizer.convert_ids_to_tokens(list(range(len(tokenizer))))],
        dtype=np.int64,
    )
    sizes[tokenizer.all_special_ids] = 0
    return sizes


def text_bytes(tokenizer: PreTrainedTokenizerFast, rows: Sequence[Sequence[int]]) -> list[int]:
    """UTF-8 bytes of the text that each row of ids stands for, without special tokens.

    A row may begin or end within a character, of which a decoder makes U+FFFD, three bytes: in a byte-level vocabulary
    the bytes are those of the tokens.
    """
    sizes = token_bytes(tokenizer)
    if sizes is not None:
        return [int(sizes[np.asarray(row, dtype=np.int64)].sum()) for row in rows]
    decoder: Any = tokenizer
    texts: list[str] = decoder.batch_decode([list(row) for row in rows], skip_special_tokens=True)
    return [len(text.encode()) for text in texts]

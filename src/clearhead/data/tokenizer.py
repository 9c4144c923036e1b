"""Tokenizers: a byte-level BPE trained on the training split and cached, or any tokenizer of Hugging Face."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from clearhead.data.cache import cache_dir, digest_json, fingerprint, write_atomic
from clearhead.data.hub import without_waiting
from clearhead.data.opening import NEEDS_CODE, NeedsCode, open_pretrained
from clearhead.data.readers import CorpusError, first_line

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast

PAD, BOS, EOS = "<|pad|>", "<|bos|>", "<|eos|>"
MASK = "<|mask|>"
SPECIALS = [PAD, BOS, EOS]
SMALLEST_VOCABULARY = 256 + len(SPECIALS)
FORMAT = 1


def get_tokenizer(
    source: str, *, vocab_size: int, texts: Iterable[str], cache_key: str, mask: bool = False
) -> PreTrainedTokenizerFast:
    """The tokenizer `source` names.

    `"bpe"`: byte-level BPE of at most `vocab_size` entries, trained on `texts` unless the cache holds one for
    `(cache_key, vocab_size)`; `cache_key` must stand for the content of `texts`, which are not read on a hit.
    All 256 bytes are in the alphabet, so every text survives encoding and decoding. Ids: `<|pad|>` 0, `<|bos|>` 1,
    `<|eos|>` 2; none is added by itself. A text too small for `vocab_size` entries gives fewer:
    `len(tokenizer)` counts. mask: `<|mask|>` is id 3, one of the `vocab_size`.

    Any other `source`: a Hugging Face path or id, whose own vocabulary is used. Without a bos token its eos token
    stands in, else its pad token; without a pad token its eos or bos token does. With `mask` one that has no mask token
    is given `<|mask|>`, behind its vocabulary.

    Raises CorpusError when `vocab_size` is below 259, when the tokenizer cannot be loaded (offline, wrong name) or has
    no token that can begin a document.
    """
    if source != "bpe":
        return load_pretrained(source, mask=mask)
    check_vocab_size(vocab_size)
    about = {"format": FORMAT, "vocab_size": vocab_size, "texts": cache_key}
    key = digest_json({**about, "mask": MASK} if mask else about)
    path = cache_dir() / "tokenizers" / f"bpe-{key[:32]}.json"
    tokenizer = read_cached(path)
    if tokenizer is None:
        tokenizer = train_bpe(texts, vocab_size, mask)
        content = tokenizer.to_str()
        envelope = {"sha256": hashlib.sha256(content.encode()).hexdigest(), "tokenizer": content}
        write_atomic(path, json.dumps(envelope).encode())
    return wrap(tokenizer, mask)


def check_vocab_size(vocab_size: int) -> None:
    if vocab_size < SMALLEST_VOCABULARY:
        raise CorpusError(
            f"tokenizer.vocab_size is {vocab_size}: a byte-level tokenizer needs at least {SMALLEST_VOCABULARY} "
            "(256 bytes and 3 special tokens)"
        )


def train_bpe(texts: Iterable[str], vocab_size: int, mask: bool = False) -> Tokenizer:
    """Byte-level BPE (GPT-2's splitting rule), the same for the same texts in any order."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[*SPECIALS, MASK] if mask else SPECIALS,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def wrap(tokenizer: Tokenizer, mask: bool = False) -> PreTrainedTokenizerFast:
    from transformers import PreTrainedTokenizerFast

    also = {"mask_token": MASK} if mask else {}

    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD,
        bos_token=BOS,
        eos_token=EOS,
        clean_up_tokenization_spaces=False,
        model_input_names=["input_ids", "attention_mask"],
        **also,
    )


def read_cached(path: Path) -> Tokenizer | None:
    """The cached tokenizer, or None when there is none or it is damaged."""
    from tokenizers import Tokenizer

    try:
        envelope = json.loads(path.read_bytes())
        content = envelope["tokenizer"]
        if hashlib.sha256(content.encode()).hexdigest() != envelope["sha256"]:
            return None
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None
    return Tokenizer.from_str(content)


def load_pretrained(source: str, *, mask: bool = False) -> PreTrainedTokenizerFast:
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    if not Path(source).exists():
        without_waiting()
    try:
        tokenizer = open_pretrained(AutoTokenizer, source)
    except Exception as error:  # the library raises OSError, ValueError, KeyError, ... for a wrong name
        why = NEEDS_CODE if isinstance(error, NeedsCode) else first_line(error)
        raise CorpusError(
            f"the tokenizer '{source}' cannot be loaded ({why}): set tokenizer.source to 'bpe', to a "
            "directory with a tokenizer.json, or to a Hugging Face id that is in the local cache or reachable"
        ) from error
    if not isinstance(tokenizer, PreTrainedTokenizerFast):
        raise CorpusError(
            f"the tokenizer '{source}' has no fast version (tokenizer.json): convert it or set tokenizer.source "
            "to 'bpe'"
        )
    tokenizer.bos_token = tokenizer.bos_token or tokenizer.eos_token or tokenizer.pad_token
    if tokenizer.bos_token is None:
        raise CorpusError(
            f"the tokenizer '{source}' has no bos, eos or pad token to begin a document with: set bos_token in its "
            "tokenizer_config.json"
        )
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token or tokenizer.bos_token
    if mask and tokenizer.mask_token is None:
        tokenizer.add_special_tokens({"mask_token": MASK})
    return tokenizer


def tokenizer_files(source: str) -> dict[str, str] | None:
    """Fingerprints of a local tokenizer's files, so that a changed tokenizer is not taken for the old one."""
    path = Path(source)
    if source == "bpe" or not path.is_dir():
        return None
    return {
        file.name: fingerprint(file) for file in sorted(path.iterdir()) if file.suffix in {".json", ".txt"}
    }


def encode_texts(tokenizer: PreTrainedTokenizerFast, texts: list[str]) -> list[list[int]]:
    """Token ids of raw texts: nothing is added, and a text that spells a special token does not become one."""
    backend = tokenizer.backend_tokenizer
    before = backend.encode_special_tokens
    backend.encode_special_tokens = True
    try:
        return [encoding.ids for encoding in backend.encode_batch_fast(texts, add_special_tokens=False)]
    finally:
        backend.encode_special_tokens = before

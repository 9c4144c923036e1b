"""The byte-level BPE: any text survives, training is reproducible, the cache heals."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerFast

from clearhead.data.readers import CorpusError
from clearhead.data.tokenizer import encode_texts, get_tokenizer, train_bpe

TEXTS = [
    "def needle(haystack):\n    return haystack[42]\n" * 20,
    "Where is the needle? In the haystack, é 日.\n" * 20,
]


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    cache = tmp_path_factory.mktemp("cache")
    monkeypatch.setenv("CLEARHEAD_CACHE", str(cache))
    return cache


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> PreTrainedTokenizerFast:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CLEARHEAD_CACHE", str(tmp_path_factory.mktemp("trained")))
        return get_tokenizer("bpe", vocab_size=300, texts=TEXTS, cache_key="k")


def forbidden() -> object:
    raise AssertionError("the texts were read although the cache holds the tokenizer")
    yield ""


def test_special_tokens_and_size(trained: PreTrainedTokenizerFast) -> None:
    assert (trained.pad_token_id, trained.bos_token_id, trained.eos_token_id) == (0, 1, 2)
    assert trained.convert_ids_to_tokens([0, 1, 2]) == ["<|pad|>", "<|bos|>", "<|eos|>"]
    assert len(trained) == 300
    assert trained("needle")["input_ids"] == trained("needle", add_special_tokens=False)["input_ids"]
    assert trained("<|bos|>a", add_special_tokens=False)["input_ids"][0] == 1


@settings(max_examples=200, deadline=None)
@given(text=st.text(st.characters(exclude_categories=["Cs"]), max_size=40))
def test_any_text_survives(trained: PreTrainedTokenizerFast, text: str) -> None:
    [ids] = encode_texts(trained, [text])
    assert trained.decode(ids) == text
    assert min(ids, default=3) >= 3


def test_text_that_spells_a_special_token_stays_text(trained: PreTrainedTokenizerFast) -> None:
    text = "a <|bos|><|pad|> b <|eos|>"
    [ids] = encode_texts(trained, [text])
    assert not {0, 1, 2} & set(ids)
    assert trained.decode(ids) == text
    assert trained.backend_tokenizer.encode_special_tokens is False


def test_training_does_not_depend_on_order_or_threads() -> None:
    script = (
        "from clearhead.data.tokenizer import train_bpe; from tests.unit.test_tokenizer import TEXTS;"
        "print(train_bpe(TEXTS[::-1], 400).to_str())"
    )
    environment = {
        **os.environ,
        "TOKENIZERS_PARALLELISM": "false",
        "PYTHONPATH": os.pathsep.join(["src", *sys.path]),
    }
    other = subprocess.run(
        [sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=True
    ).stdout
    assert json.loads(other) == json.loads(train_bpe(TEXTS, 400).to_str())


def test_the_cache_is_used_and_told_apart_by_key_and_size() -> None:
    first = get_tokenizer("bpe", vocab_size=300, texts=TEXTS, cache_key="one")
    again = get_tokenizer("bpe", vocab_size=300, texts=forbidden(), cache_key="one")  # type: ignore[arg-type]
    assert again.get_vocab() == first.get_vocab()
    for size, key in ((301, "one"), (300, "two")):
        with pytest.raises(AssertionError, match="were read"):
            get_tokenizer("bpe", vocab_size=size, texts=forbidden(), cache_key=key)  # type: ignore[arg-type]


@pytest.mark.parametrize("damage", ["cut", "flipped", "other", "empty"])
def test_a_damaged_cache_entry_is_made_again(own_cache: Path, damage: str) -> None:
    vocabulary = get_tokenizer("bpe", vocab_size=300, texts=TEXTS, cache_key="k").get_vocab()
    [path] = (own_cache / "tokenizers").glob("*.json")
    whole = path.read_bytes()
    broken = {
        "cut": whole[:-100],
        "flipped": whole.replace(b"needle", b"noodle"),
        "other": b"[1]",
        "empty": b"",
    }
    assert broken[damage] != whole
    path.write_bytes(broken[damage])
    assert get_tokenizer("bpe", vocab_size=300, texts=TEXTS, cache_key="k").get_vocab() == vocabulary
    assert path.read_bytes() == whole
    left = {entry.name for entry in (own_cache / "tokenizers").iterdir()}
    assert left == {path.name, path.with_suffix(".lock").name}


def test_a_vocabulary_below_the_bytes_is_refused() -> None:
    assert len(get_tokenizer("bpe", vocab_size=259, texts=TEXTS, cache_key="k")) == 259
    with pytest.raises(CorpusError, match=r"vocab_size is 258.*at least 259"):
        get_tokenizer("bpe", vocab_size=258, texts=TEXTS, cache_key="k")


def test_a_small_text_gives_fewer_entries() -> None:
    assert 259 < len(get_tokenizer("bpe", vocab_size=5000, texts=["abc abc"], cache_key="small")) < 300


def saved(folder: Path, **specials: str) -> str:
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=train_bpe(TEXTS, 280), **specials)
    tokenizer.save_pretrained(folder)
    return str(folder)


@pytest.mark.parametrize(
    ("specials", "bos", "pad"),
    [
        ({"bos_token": "<|bos|>", "eos_token": "<|eos|>", "pad_token": "<|pad|>"}, 1, 0),
        ({"eos_token": "<|eos|>"}, 2, 2),
        ({"pad_token": "<|pad|>"}, 0, 0),
        ({"bos_token": "<|bos|>"}, 1, 1),
    ],
)
def test_what_begins_a_document_when_a_tokenizer_has_no_bos(
    tmp_path: Path, specials: dict[str, str], bos: int, pad: int
) -> None:
    tokenizer = get_tokenizer(saved(tmp_path / "t", **specials), vocab_size=1, texts=(), cache_key="")
    assert (tokenizer.bos_token_id, tokenizer.pad_token_id) == (bos, pad)


def test_tokenizers_that_cannot_be_used_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(CorpusError, match=r"has no bos, eos or pad token.*set bos_token"):
        get_tokenizer(saved(tmp_path / "bare"), vocab_size=1, texts=(), cache_key="")
    (tmp_path / "nothing").mkdir()
    with pytest.raises(CorpusError, match=r"nothing' cannot be loaded .*set tokenizer\.source to 'bpe'"):
        get_tokenizer(str(tmp_path / "nothing"), vocab_size=1, texts=(), cache_key="")

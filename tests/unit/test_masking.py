"""What masked language modelling hides: how much, what it looks like, whole words, and the same for the same key."""

import numpy as np
import pytest
from transformers import PreTrainedTokenizerFast

from clearhead.data.masking import MaskedRows, Masker, token_bytes
from clearhead.data.packing import IGNORED, pack_text
from clearhead.data.readers import CorpusError
from clearhead.data.store import TokenStore
from clearhead.data.tokenizer import MASK, encode_texts, get_tokenizer, load_pretrained, train_bpe, wrap

TEXT = "The cats sat on 12 mats, and the dogs (three) looked around.\nThey were café owners. " * 30


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return wrap(train_bpe([TEXT], 300, mask=True), mask=True)


def ids_of(tokenizer: PreTrainedTokenizerFast, text: str = TEXT) -> np.ndarray:
    return np.array(encode_texts(tokenizer, [text])[0], dtype=np.int64)


def test_the_mask_token_is_the_fourth_and_others_do_not_move(tokenizer: PreTrainedTokenizerFast) -> None:
    assert (tokenizer.mask_token, tokenizer.mask_token_id, len(tokenizer)) == (MASK, 3, 300)
    plain = wrap(train_bpe([TEXT], 299))
    assert plain.mask_token is None
    # One more special token and otherwise the same vocabulary, one further on.
    vocabulary = plain.get_vocab()
    moved = {piece: number + (number > 2) for piece, number in vocabulary.items()}
    assert {**moved, MASK: 3} == tokenizer.get_vocab()


def test_a_tokenizer_without_one_is_given_one(tokenizer: PreTrainedTokenizerFast, tmp_path) -> None:
    plain = wrap(train_bpe([TEXT], 299))
    plain.save_pretrained(tmp_path)
    found = load_pretrained(str(tmp_path), mask=True)
    assert (found.mask_token, found.mask_token_id) == (MASK, len(plain))
    assert load_pretrained(str(tmp_path)).mask_token is None
    with pytest.raises(CorpusError, match=r"has no mask token.*mask_token in its tokenizer_config\.json"):
        Masker(plain, 0.3)


def test_causal_tokenizers_are_cached_under_the_name_they_had(tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("CLEARHEAD_CACHE", str(tmp_path))
    get_tokenizer("bpe", vocab_size=300, texts=[TEXT], cache_key="key")
    before = {path.name for path in (tmp_path / "tokenizers").glob("*.json")}
    get_tokenizer("bpe", vocab_size=300, texts=[TEXT], cache_key="key", mask=True)
    assert len({path.name for path in (tmp_path / "tokenizers").glob("*.json")} - before) == 1
    assert get_tokenizer("bpe", vocab_size=300, texts=[], cache_key="key").mask_token is None


def test_shares_are_bert_s(tokenizer: PreTrainedTokenizerFast) -> None:
    masker, ids = Masker(tokenizer, 0.3), ids_of(tokenizer)
    asked = hidden = same = total = 0
    for key in range(60):
        shown, labels = masker(ids, (0, key))
        chosen = labels != IGNORED
        assert (labels[chosen] == ids[chosen]).all() and (shown[~chosen] == ids[~chosen]).all()
        total += len(ids)
        asked += chosen.sum()
        hidden += (shown[chosen] == 3).sum()
        same += (shown[chosen] == ids[chosen]).sum()
    # Five standard deviations of each share.
    assert abs(asked / total - 0.3) < 5 * (0.3 * 0.7 / total) ** 0.5
    assert abs(hidden / asked - 0.8) < 5 * (0.8 * 0.2 / asked) ** 0.5 + 1 / 300
    assert abs(same / asked - 0.1) < 5 * (0.1 * 0.9 / asked) ** 0.5 + 1 / 300


def test_special_tokens_are_never_asked_for(tokenizer: PreTrainedTokenizerFast) -> None:
    ids = np.array([1, 0, 2, 3] * 50 + [70], dtype=np.int64)
    labels = np.stack([Masker(tokenizer, 0.9)(ids, (key,))[1] for key in range(20)])
    assert (labels[:, :-1] == IGNORED).all() and (labels[:, -1] == 70).any()


def test_the_same_key_hides_the_same(tokenizer: PreTrainedTokenizerFast) -> None:
    ids = ids_of(tokenizer)
    one, other = Masker(tokenizer, 0.3), Masker(tokenizer, 0.3)
    other(ids, (9, 9))
    for key in ((0, 1), (5, 7)):
        assert all((a == b).all() for a, b in zip(one(ids, key), other(ids, key), strict=True))
    assert (one(ids, (0, 1))[1] != one(ids, (0, 2))[1]).any()
    assert (one(ids, (0, 1))[1] != one(ids, (1, 1))[1]).any()


def test_whole_words_are_hidden_whole(tokenizer: PreTrainedTokenizerFast) -> None:
    ids = ids_of(tokenizer)
    masker = Masker(tokenizer, 0.3, whole_words=True)
    assert masker.pieces is not None
    spans = masker.pieces.spans(ids)
    word = np.cumsum(np.concatenate([[True], spans[1:, 0] != spans[:-1, 1]])) - 1
    words = ["".join(tokenizer.decode([i]) for i in ids[word == n]) for n in range(8)]
    assert words == ["The", " cats", " sat", " on", " 12", " mats", ",", " and"]
    shares = []
    for key in range(40):
        shown, labels = masker(ids, (key,))
        asked = labels != IGNORED
        for n in np.unique(word[asked]):
            assert asked[word == n].all() and (shown[word == n] == 3).all()
        shares.append(len(np.unique(word[asked])) / (word[-1] + 1))
    assert abs(np.mean(shares) - 0.3) < 5 * (0.3 * 0.7 / (40 * word[-1])) ** 0.5


def test_rows_are_functions_of_seed_and_number(tokenizer: PreTrainedTokenizerFast) -> None:
    store = TokenStore.from_documents([ids_of(tokenizer).tolist()] * 3, bos_token_id=1)

    def rows(seed: int) -> MaskedRows:
        return MaskedRows(pack_text(store, 64, seed, document_masks=True), Masker(tokenizer, 0.3), 1000, seed)

    one, other = rows(0), rows(0)
    epoch = len(one.text)
    for index in (epoch + 3, 5, 0):
        expected = one[index]
        assert all((other[index][key] == expected[key]).all() for key in expected)
        plain = one.text[index]["input_ids"]
        assert (
            np.where(expected["labels"] == IGNORED, expected["input_ids"], expected["labels"]) == plain
        ).all()
    # Dynamic: the same text is hidden anew in the next epoch.
    masks = [one[index]["labels"] != IGNORED for index in (3, epoch + 3)]
    assert (masks[0] != masks[1]).any()


def test_bytes_of_tokens_add_up_to_the_text(tokenizer: PreTrainedTokenizerFast) -> None:
    sizes = token_bytes(tokenizer)
    assert sizes is not None
    assert sizes[ids_of(tokenizer)].sum() == len(TEXT.encode())
    assert (sizes[:4] == 0).all()

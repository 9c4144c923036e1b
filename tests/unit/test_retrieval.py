"""Retrieval documents say what they claim to say, exactly where they claim to say it."""

from __future__ import annotations

from dataclasses import replace
from functools import cache

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from clearhead.data.needles import vocabulary
from clearhead.data.packing import TokenStore, pack_text
from clearhead.data.retrieval import (
    IGNORE,
    Mixture,
    NeedleRange,
    NeedleSpec,
    chance_level,
    in_validation,
    minimum_length,
    needle_document,
    pair_document,
)

SPECIAL = ["<|pad|>", "<|bos|>", "<|eos|>"]
WORDS = [f"{first}{second}" for first in "abcdef" for second in "ghijklmn"]
TEMPLATES = ["\n# {key}{value}", "\n# {key} = {value}\n", "{key}{value}"]


@cache
def tokenizer() -> PreTrainedTokenizerFast:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {token: i for i, token in enumerate([*SPECIAL, *alphabet, *WORDS])}
    backend = Tokenizer(models.BPE(vocab=vocab, merges=[(word[0], word[1]) for word in WORDS]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token=SPECIAL[0], bos_token=SPECIAL[1], eos_token=SPECIAL[2]
    )


@cache
def store() -> TokenStore:
    """Text of two tokens that occur in no needle, so that what a needle brought is recognisable."""
    exclamation, question = tokenizer().convert_tokens_to_ids(["!", "?"])
    documents = [[exclamation if (i + j) % 3 else question for j in range(90 + i)] for i in range(40)]
    return TokenStore.from_documents(documents, bos_token_id=1)


def document(
    spec: NeedleSpec, index: int = 0, *, seed: int = 0, split: str = "train", depth: float | None = None
):
    return needle_document(
        spec, seed=seed, index=index, haystack=store(), split=split, tokenizer=tokenizer(), depth=depth
    )


@st.composite
def specs(draw: st.DrawFn) -> NeedleSpec:
    needles = draw(st.integers(1, 6))
    shape = {
        "needles": needles,
        "questions": draw(st.integers(1, needles)),
        "key_tokens": draw(st.integers(1, 3)),
        "value_tokens": draw(st.integers(1, 3)),
        "template": draw(st.sampled_from(TEMPLATES)),
        "question": draw(st.sampled_from(["\n# {key}{value}", "\nwhat is {key}?{value}"])),
        "learn_context": draw(st.booleans()),
    }
    least = minimum_length(NeedleSpec(10_000, **shape), tokenizer())
    return NeedleSpec(least + draw(st.integers(0, 80)), **shape)


depths = st.one_of(st.none(), st.floats(0, 1))
splits = st.sampled_from(["train", "validation"])


@settings(max_examples=120, deadline=None)
@given(specs(), st.integers(0, 2**31), st.integers(0, 2**40), splits, depths)
def test_document_is_what_it_says(
    spec: NeedleSpec, seed: int, index: int, split: str, depth: float | None
) -> None:
    sample = document(spec, index, seed=seed, split=split, depth=depth)
    ids = sample.input_ids
    assert ids.shape == sample.labels.shape == (spec.length,)
    assert ids.dtype == sample.labels.dtype == np.int64
    assert ids[0] == 1
    assert len(sample.answers) == len(sample.needle_spans) == len(sample.question_spans) == spec.questions
    assert len(sample.keys) == len(sample.values) == spec.needles

    decode = tokenizer().decode
    for i in range(spec.questions):
        key, value = decode(sample.keys[i]), decode(sample.values[i])
        assert decode(ids[sample.needle_spans[i]]) == decode(ids[sample.answers[i]]) == value
        sentence = spec.template.replace("{key}", key).replace("{value}", value)
        assert decode(ids[sample.sentence_spans[i]]) == sentence
        asked = spec.question.replace("{key}", key).replace("{value}", "")
        assert decode(ids[sample.question_spans[i]]) == asked
        assert sample.question_spans[i].stop == sample.answers[i].start
        assert sample.needle_spans[i].stop <= sample.question_spans[0].start
    assert sample.answers[-1].stop == spec.length

    # Every needle is in the context exactly once, none cut by another: what is left is one run of the corpus.
    context = decode(ids[1 : sample.question_spans[0].start])
    for key, value in zip(sample.keys, sample.values, strict=True):
        sentence = spec.template.replace("{key}", decode(key)).replace("{value}", decode(value))
        assert sentence in context
        context = context.replace(sentence, "", 1)
    assert set(context) <= {"!", "?"}
    assert context in decode(np.tile(store().tokens, 2))

    learned = np.zeros(spec.length, dtype=bool)
    for span in sample.answers:
        learned[span] = True
    if spec.learn_context:
        learned[1 : sample.question_spans[0].start] |= np.isin(
            ids[1 : sample.question_spans[0].start], store().tokens
        )
    assert np.array_equal(sample.labels, np.where(learned, ids, IGNORE))


@settings(max_examples=100, deadline=None)
@given(specs(), st.integers(0, 1000), st.floats(0, 1))
def test_depth_is_exact_to_the_token(spec: NeedleSpec, index: int, depth: float) -> None:
    sample = document(spec, index, depth=depth)
    needle = sample.sentence_spans[0]
    room = sample.question_spans[0].start - 1 - (needle.stop - needle.start)
    assert needle.start - 1 == int(np.floor(depth * room + 0.5))
    assert abs(sample.depth - depth) <= 0.5 / room + 1e-12


@pytest.mark.parametrize("needles", [1, 5])
def test_every_offset_is_reachable(needles: int) -> None:
    least = minimum_length(NeedleSpec(1000, needles), tokenizer())
    spec = NeedleSpec(least, needles)
    first = document(spec, depth=0.0)
    room = first.question_spans[0].start - 1 - (first.sentence_spans[0].stop - first.sentence_spans[0].start)
    starts = [document(spec, depth=offset / room).sentence_spans[0].start for offset in range(room + 1)]
    assert starts == list(range(1, room + 2))


@settings(max_examples=50, deadline=None)
@given(st.integers(1, 3), st.integers(1, 3), st.integers(0, 99), st.integers(0, 99))
def test_validation_keys_and_values_never_occur_in_training(
    key_tokens: int, value_tokens: int, one_seed: int, another_seed: int
) -> None:
    spec = NeedleSpec(200, needles=6, questions=2, key_tokens=key_tokens, value_tokens=value_tokens)
    seen = {"train": (set(), set()), "validation": (set(), set())}
    for split, seed in (("train", one_seed), ("validation", another_seed)):
        for index in range(20):
            sample = document(spec, index, seed=seed, split=split)
            keys, values = [set(map(tuple, x.tolist())) for x in (sample.keys, sample.values)]
            assert len(keys) == len(values) == spec.needles, "keys and values are distinct within a document"
            seen[split][0].update(keys)
            seen[split][1].update(values)
    assert not seen["train"][0] & seen["validation"][0]
    assert not seen["train"][1] & seen["validation"][1]


def test_the_partition_is_fixed_and_takes_a_quarter() -> None:
    """Pinned: a model trained by one release is evaluated by the next on keys that it has not seen."""
    tuples = np.stack(np.meshgrid(np.arange(300), np.arange(300)), axis=-1).reshape(-1, 2)
    keys, values = in_validation(tuples, "key"), in_validation(tuples, "value")
    assert abs(keys.mean() - 0.25) < 0.005 and abs(values.mean() - 0.25) < 0.005
    assert abs((keys & values).mean() - 1 / 16) < 0.005, "the two roles are independent"
    assert keys[:24].astype(int).tolist() == PINNED


PINNED = [1, 0, 1, 1, 0, 0, 0, 1, 0, 1, 0, 0, 0, 0, 0, 1, 0, 0, 0, 0, 0, 0, 1, 0]


@settings(max_examples=50, deadline=None)
@given(specs(), st.integers(0, 2**31), st.integers(0, 2**31), splits, depths)
def test_same_seed_and_index_give_the_same_document(
    spec: NeedleSpec, seed: int, index: int, split: str, depth: float | None
) -> None:
    one, two = [document(spec, index, seed=seed, split=split, depth=depth) for _ in range(2)]
    assert np.array_equal(one.input_ids, two.input_ids) and np.array_equal(one.labels, two.labels)
    assert one.answers == two.answers and one.needle_spans == two.needle_spans
    other = document(spec, index + 1, seed=seed, split=split, depth=depth)
    assert not np.array_equal(one.input_ids, other.input_ids)


@pytest.mark.parametrize("tokens", [1, 2])
@pytest.mark.parametrize("split", ["train", "validation"])
def test_chance_level_counts_the_values_of_the_split(tokens: int, split: str) -> None:
    spec = NeedleSpec(100, value_tokens=tokens)
    words = vocabulary(tokenizer()).words
    assert len(words) == len(WORDS)
    every = np.stack(np.meshgrid(*[words] * tokens, indexing="ij"), axis=-1).reshape(-1, tokens)
    count = (in_validation(every, "value") == (split == "validation")).sum()
    assert chance_level(spec, tokenizer(), split) == pytest.approx(1 / count)
    rng = np.random.default_rng(0)
    truth = np.array([document(spec, i, split=split).values[0] for i in range(4000)])
    guesses = every[in_validation(every, "value") == (split == "validation")]
    hits = (truth == guesses[rng.integers(len(guesses), size=len(truth))]).all(axis=1).mean()
    assert abs(hits - 1 / count) < 5 * np.sqrt(1 / count / 4000)


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 8), st.integers(2, 3), st.sampled_from(["train", "validation"]), st.integers(0, 99))
def test_a_pair_document_asks_about_every_fact(pairs: int, size: int, split: str, index: int) -> None:
    spec = NeedleSpec(999, pairs, pairs, size, size)
    example = pair_document(spec, seed=1, index=index, split=split, tokenizer=tokenizer())
    ids, labels = example["input_ids"], example["labels"]
    assert ids.shape == labels.shape == example["position_ids"].shape
    facts, asked = ids[1:].reshape(2, pairs, -1)
    marker = facts.shape[1] - 2 * size
    assert sorted(map(tuple, facts)) == sorted(map(tuple, asked)), (
        "the question is the fact in the same words"
    )
    keys, values = facts[:, marker : marker + size], facts[:, marker + size :]
    assert len({tuple(key) for key in keys}) == pairs, "keys are distinct"
    assert (in_validation(keys, "key") == (split == "validation")).all()
    assert (in_validation(values, "value") == (split == "validation")).all()
    learned = labels[1:].reshape(2, pairs, -1)
    assert (
        (labels[0] == IGNORE)
        and (learned[0] == IGNORE).all()
        and (learned[1, :, : marker + size] == IGNORE).all()
    )
    assert np.array_equal(learned[1, :, marker + size :], asked[:, marker + size :])


def mixture(**changes) -> Mixture:
    length = changes.pop("length", 96)
    masks = changes.pop("document_masks", True)
    seed = changes.pop("seed", 3)
    arguments = {
        "needle_share": 0.35,
        "pair_share": 0.2,
        "needles": NeedleRange((24, 60), (1, 4), questions=2),
    } | changes
    text = pack_text(store(), length, seed, document_masks=masks)
    return Mixture(text, store(), tokenizer(), length, 1000, seed, document_masks=masks, **arguments)


def test_repeats_are_runs_of_words_to_be_copied() -> None:
    data = mixture(pair_share=0.5, needles=NeedleRange((24, 60), (1, 4), repeats=0.5))
    words = set(vocabulary(tokenizer()).words.tolist())
    repeated = pairs = 0
    for i in range(300):
        if data.kind(i) != "pairs":
            continue
        row = data[i]
        starts = np.flatnonzero(row["position_ids"] == 0)
        ends = [*starts[1:], 96]
        first = row["input_ids"][starts[0] : ends[0]]
        run = first[1 : 1 + (len(first) - 1) // 2]
        if not set(run.tolist()) <= words:  # the template of a fact
            pairs += 1
            continue
        repeated += 1
        assert np.array_equal(first[1 + len(run) : 1 + 2 * len(run)], run)
        labels = row["labels"][starts[0] : ends[0]]
        assert (labels[: 1 + len(run)] == IGNORE).all()
        assert np.array_equal(labels[1 + len(run) : 1 + 2 * len(run)], run)
    assert 0.35 < repeated / (repeated + pairs) < 0.65


def test_separate_words_make_keys_and_values_of_different_words() -> None:
    words = vocabulary(tokenizer()).words
    for_keys, for_values = set(words[0::2].tolist()), set(words[1::2].tolist())
    spec = NeedleSpec(96, 3, 2, key_tokens=2, value_tokens=2, separate_words=True)
    for split in ("train", "validation"):
        for index in range(20):
            made = needle_document(
                spec, seed=1, index=index, haystack=store(), split=split, tokenizer=tokenizer()
            )
            assert set(made.keys.ravel().tolist()) <= for_keys
            assert set(made.values.ravel().tolist()) <= for_values
    mixed = mixture(pair_share=0.5, needles=NeedleRange((24, 60), (1, 4), separate_words=True))
    learned = [
        row["input_ids"][row["labels"] != IGNORE]
        for row in (mixed[i] for i in range(60) if mixed.kind(i) == "pairs")
    ]
    assert learned and set(np.concatenate(learned).tolist()) <= for_values


def test_separate_words_leave_fewer_values_to_guess_from() -> None:
    spec = NeedleSpec(96, value_tokens=1)
    rare = replace(spec, separate_words=True)
    words = vocabulary(tokenizer()).words[1::2][:, None]
    held_out = int(in_validation(words, "value").sum())
    assert chance_level(rare, tokenizer()) == 1 / held_out > chance_level(spec, tokenizer())


def test_rows_without_repeats_are_as_they_were() -> None:
    plain, other = mixture(), mixture(needles=NeedleRange((24, 60), (1, 4), questions=2, repeats=1.0))
    for i in range(60):
        same = all(np.array_equal(plain[i][key], other[i][key]) for key in plain[i])
        assert same == (plain.kind(i) != "pairs")


def test_mixture_rows_have_the_exact_length_and_share() -> None:
    data = mixture()
    rows = [data[i] for i in range(400)]
    for row in rows:
        assert set(row) == {"input_ids", "labels", "position_ids"}
        assert all(value.shape == (96,) and value.dtype == np.int64 for value in row.values())
        assert (row["labels"] != IGNORE).any()
        assert np.isin(row["labels"], [IGNORE, *row["input_ids"]]).all()
    kinds = np.array([data.kind(i) for i in range(400)])
    for kind, share in (("text", 0.45), ("needles", 0.35), ("pairs", 0.2)):
        counts = np.cumsum(kinds == kind)
        assert np.abs(counts - share * np.arange(1, 401)).max() < 2


def test_mixture_positions_restart_at_each_document() -> None:
    data = mixture()
    for i in range(60):
        row = data[i]
        starts = np.flatnonzero(row["position_ids"] == 0)
        assert starts[0] == 0
        assert np.array_equal(
            row["position_ids"], np.arange(96) - starts[np.searchsorted(starts, np.arange(96), "right") - 1]
        )
        if data.kind(i) != "text":
            lengths = np.diff([*starts, 96])
            if data.kind(i) == "needles":
                assert all(24 <= length <= 60 for length in lengths)
            # What is left of a row of pairs is filled with text.
            assert (row["input_ids"][starts[: None if data.kind(i) == "needles" else -1]] == 1).all()
    assert np.array_equal(mixture(document_masks=False)[1]["position_ids"], np.arange(96))


def test_mixture_uses_every_text_row_once_in_order() -> None:
    data = mixture()
    text = pack_text(store(), 96, 3, document_masks=True)
    rows = [i for i in range(300) if data.kind(i) == "text"]
    for number, i in enumerate(rows):
        assert np.array_equal(data[i]["input_ids"], text[number]["input_ids"])


def test_mixture_is_a_function_of_seed_and_index() -> None:
    backward = {i: mixture()[i] for i in reversed(range(40))}
    data, other = mixture(), mixture(seed=4)
    for i in range(40):
        assert all(np.array_equal(data[i][key], backward[i][key]) for key in data[i])
    assert not any(np.array_equal(data[i]["input_ids"], other[i]["input_ids"]) for i in range(40))
    made = [tuple(data[i]["input_ids"]) for i in range(300) if data.kind(i) != "text"]
    assert len(set(made)) == len(made), "no retrieval row repeats"


@pytest.mark.parametrize(
    ("lengths", "length"), [((40, 40), 96), ((96, 96), 96), ((50, 60), 96), ((24, 500), 96)]
)
def test_mixture_fills_rows_that_documents_do_not_divide(lengths: tuple[int, int], length: int) -> None:
    data = mixture(length=length, needles=NeedleRange(lengths, (1, 2)), needle_share=0.5, pair_share=0.5)
    for i in range(30):
        row = data[i]
        assert row["input_ids"].shape == (length,)
        starts = np.flatnonzero(row["position_ids"] == 0)
        rest = np.diff([*starts, length])[-1]
        if data.kind(i) == "needles" and rest < lengths[0]:
            assert (row["labels"][starts[-1] :] == IGNORE).all(), "a filler is not learned"


def test_shares_at_their_limits() -> None:
    assert {mixture(needle_share=0.0, pair_share=0.0).kind(i) for i in range(50)} == {"text"}
    assert {mixture(needle_share=1.0, pair_share=0.0).kind(i) for i in range(50)} == {"needles"}
    assert {mixture(needle_share=0.0, pair_share=1.0).kind(i) for i in range(50)} == {"pairs"}
    assert {mixture(needle_share=0.1, pair_share=0.9).kind(i) for i in range(50)} == {"needles", "pairs"}


def test_pairs_first_delays_the_mixture_and_repeats_nothing() -> None:
    data, plain = mixture(pairs_first=0.1), mixture()
    assert {data.kind(i) for i in range(100)} == {"pairs"}
    assert [data.kind(100 + i) for i in range(200)] == [plain.kind(i) for i in range(200)]
    text = [i for i in range(200) if plain.kind(i) == "text"]
    assert all(np.array_equal(data[100 + i]["input_ids"], plain[i]["input_ids"]) for i in text)
    pairs = [tuple(data[i]["input_ids"]) for i in range(300) if data.kind(i) == "pairs"]
    assert len(set(pairs)) == len(pairs)


def test_needles_give_way_when_a_document_is_short() -> None:
    wanted = NeedleRange((24, 60), (1, 16), questions=4)
    spec = wanted.fitting(60, 16, tokenizer())
    assert minimum_length(spec, tokenizer()) <= 60
    assert spec.questions == min(4, spec.needles)
    larger = wanted.spec(60, spec.needles + 1, 4)
    assert minimum_length(larger, tokenizer()) > 60


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: NeedleSpec(0), "length must be at least 1"),
        (lambda: NeedleSpec(64, needles=2, questions=3), "3 questions about 2 needles"),
        (lambda: NeedleSpec(64, template="{value} is {key}"), "must name {key} once and then {value} once"),
        (lambda: NeedleSpec(64, question="{key}{value}."), "must end with {value}"),
        (lambda: NeedleRange((64, 32)), "lengths must be"),
        (lambda: document(NeedleSpec(20, needles=4)), "raise the length or lower needles"),
        (lambda: document(NeedleSpec(64), depth=1.5), "depth must lie in 0..1"),
        (lambda: document(NeedleSpec(800, needles=60, key_tokens=1)), "distinct keys"),
        (lambda: NeedleRange(pairs=(0, 2)), "pairs must be"),
        (lambda: mixture(needle_share=0.9), "needle_share + pair_share"),
        (lambda: mixture(needles=NeedleRange((8, 60))), "data.needles.lengths"),
        (lambda: mixture(needles=NeedleRange((97, 97))), "data.needles.lengths starts at 97"),
        (lambda: mixture()[-1], "rows are numbered from 0"),
    ],
)
def test_bad_input_names_what_to_change(make, message: str) -> None:
    with pytest.raises((ValueError, IndexError), match=message.replace("{", r"\{").replace("+", r"\+")):
        make()


def test_a_tokenizer_without_words_is_refused() -> None:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(
        models.BPE(vocab={token: i for i, token in enumerate(["<|bos|>", *alphabet])}, merges=[])
    )
    letters = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<|bos|>")
    with pytest.raises(ValueError, match=r"raise tokenizer\.vocab_size"):
        vocabulary(letters)

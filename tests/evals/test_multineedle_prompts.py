"""Multi-needle prompts: the published text, word for word, in exactly the tokens that are asked for."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from clearhead.data.tokenizer import train_bpe, wrap
from clearhead.evals.asking.decoding import found
from clearhead.evals.asking.haystack import draw_text, make_haystack, measured
from clearhead.evals.retrieval.multi_needle.prompts import CITIES, draw_facts, multi_needle_prompt
from tests.evals import tiny

PROSE = (
    "It was a quiet morning; the river ran slowly past the mill, and nobody spoke.\n\nThe miller's daughter, who was "
    'never at a loss, asked: "What is the number of the day?"  He didn\'t know it (nor did we).\n'
    "    An indented line, 1234 and 56 barrels, and a tab\there.\n"
)
TEXT = "".join(f"Chapter {i}. " + PROSE for i in range(120))
TEMPLATE = "{% for m in messages %}<|bos|>{{ m.role }}\n{{ m.content }}<|eos|>\n{% endfor %}{{ '<|bos|>assistant\n' }}"


def plain() -> PreTrainedTokenizerFast:
    return wrap(train_bpe([PROSE, tiny.WORDS] * 3, 400))


def trimmed() -> PreTrainedTokenizerFast:
    """Offsets leave the space before a word out, as GPT-2's do."""
    made = train_bpe([PROSE] * 3, 420)
    made.post_processor = processors.ByteLevel(trim_offsets=True)
    return wrap(made)


def pieces() -> PreTrainedTokenizerFast:
    """Words begin with a mark instead of a space, and nothing else splits the text."""
    made = Tokenizer(models.BPE(unk_token="<|pad|>"))
    made.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="never")
    made.decoder = decoders.Metaspace(prepend_scheme="never")
    alphabet = [chr(i) for i in range(33, 127)] + ["\n", "\t"]
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=["<|pad|>", "<|bos|>", "<|eos|>"], initial_alphabet=alphabet,
        show_progress=False,
    )  # fmt: skip
    made.train_from_iterator([PROSE] * 3, trainer)
    return wrap(made)


def needle(city: str, number: str) -> str:
    return f"\nThe special magic {city} number is: {number}\n"


@pytest.mark.parametrize("make", [plain, trimmed, pieces])
@pytest.mark.parametrize("length", [400, 777])
def test_a_prompt_is_the_published_text_in_exactly_so_many_tokens(
    make: Callable[[], PreTrainedTokenizerFast], length: int
) -> None:
    words = make()
    haystack = make_haystack([TEXT], words, length, np.random.default_rng(3))
    longest = max(len(words(f" {word}")["input_ids"]) for word in TEXT.split())
    for index in range(3):
        facts = draw_facts(7, index, 3, 2)
        for depth in (0.0, 0.25, 0.5, 0.75, 1.0):
            prompt = multi_needle_prompt(words, haystack, facts, length, depth)
            assert len(prompt.ids) == length
            assert words(prompt.text, add_special_tokens=False)["input_ids"] == prompt.ids.tolist()
            a, b = prompt.cities
            tail = (
                f" What are the special magic numbers for {a} and {b}? Don't give information outside the document."
                f"\nThe special magic numbers for {a} and {b} are:"
            )
            assert prompt.text.startswith("<|bos|>") and prompt.text.endswith(tail)
            text = prompt.text.removeprefix("<|bos|>").removesuffix(tail)
            where = {}
            for city, number in zip(facts.cities, facts.numbers, strict=True):
                assert text.count(needle(city, number)) == 1
                where[city] = text.index(needle(city, number))
            # The asked one stands after its share of the haystack's tokens, to the word.
            before = text[: where[facts.cities[0]]]
            for city, number in zip(facts.cities[1:], facts.numbers[1:], strict=True):
                before = before.replace(needle(city, number), "")
            assert haystack.text.startswith(before)
            count = len(words(before)["input_ids"]) if before else 0
            assert count == prompt.before
            assert -0.5 <= depth * prompt.haystack - count <= longest + 4
            if depth == 0:
                assert count == 0
            for city, number, start in zip(facts.cities, facts.numbers, prompt.starts, strict=True):
                said = words.decode(prompt.ids[start : start + 60].tolist()).lstrip("\n")
                assert said.startswith(needle(city, number).strip()) and start < length
            assert set(prompt.numbers) == {facts.numbers[0], facts.numbers[1]}
            answers = dict(zip(facts.cities, facts.numbers, strict=True))
            assert prompt.numbers == (answers[a], answers[b])


def test_the_chat_form_is_the_published_message_in_the_template() -> None:
    words = plain()
    words.chat_template = TEMPLATE
    haystack = make_haystack([TEXT], words, 500, np.random.default_rng(0))
    facts = draw_facts(0, 0, 1, 1)
    prompt = multi_needle_prompt(words, haystack, facts, 500, 0.5, "chat")
    city, number = facts.cities[0], facts.numbers[0]
    ask = f" What is the special magic number for {city}? Don't give information outside the document."
    assert prompt.text.startswith("<|bos|>user\n") and needle(city, number) in prompt.text
    assert prompt.text.endswith(f"{ask}<|eos|>\n<|bos|>assistant\n")
    content = prompt.text.removeprefix("<|bos|>user\n").removesuffix("<|eos|>\n<|bos|>assistant\n")
    ids = words.apply_chat_template(
        [{"role": "user", "content": content}], add_generation_prompt=True, return_dict=True
    )["input_ids"]
    assert ids == prompt.ids.tolist() and len(ids) == 500
    words.chat_template = "{% for m in messages %}{{ m.content | upper }}{% endfor %}"
    with pytest.raises(ValueError, match="does not give the message as it is"):
        multi_needle_prompt(words, haystack, facts, 500, 0.5, "chat")
    words.chat_template = None
    with pytest.raises(ValueError, match="has no chat template"):
        multi_needle_prompt(words, haystack, facts, 500, 0.5, "chat")


def test_three_cities_are_listed_as_in_the_program() -> None:
    words = plain()
    haystack = make_haystack([TEXT], words, 600, np.random.default_rng(0))
    prompt = multi_needle_prompt(words, haystack, draw_facts(0, 0, 4, 3), 600, 0.5)
    a, b, c = prompt.cities
    assert f"What are the special magic numbers for {a}, {b}, and {c}?" in prompt.text


def test_facts_are_drawn_before_and_without_any_tokenizer() -> None:
    first = [draw_facts(5, i, 8, 1) for i in range(50)]
    assert first == [draw_facts(5, i, 8, 1) for i in range(50)] != [draw_facts(6, i, 8, 1) for i in range(50)]
    for facts in first:
        assert len(set(facts.cities)) == len(set(facts.numbers)) == 8 and len(facts.places) == 7
        assert all(1_000_000 <= int(number) <= 9_999_999 for number in facts.numbers)
        assert all(0 <= place < 1 for place in facts.places)
    assert len({facts.cities[0] for facts in first}) > 20 and len(set(CITIES)) == len(CITIES)
    assert sorted(draw_facts(0, 1, 6, 3).asked) == [0, 1, 2]
    for needles, asked in ((2, 3), (1, 0), (500, 1)):
        with pytest.raises(ValueError, match=f"cannot ask {asked} of {needles}"):
            draw_facts(0, 0, needles, asked)


def test_one_text_for_all_tokenizers_and_none_of_it_twice() -> None:
    documents = [f"document {i} has words " + "of its own " * 40 for i in range(9)]
    short, everything = draw_text(documents, np.random.default_rng(1), 300)
    assert len(short) == 300 and not everything
    whole, everything = draw_text(documents, np.random.default_rng(1), 10**6)
    assert everything and whole.startswith(short)
    assert all(whole.count(f"document {i} has") <= 1 for i in range(9))
    assert len(whole) > sum(map(len, documents)) - 40
    texts = {
        make_haystack(documents, words, 50, np.random.default_rng(1)).text[:200]
        for words in (plain(), trimmed(), pieces())
    }
    assert len(texts) == 1
    assert draw_text(documents, np.random.default_rng(2), 300)[0] != short


def test_a_text_is_cut_before_words_and_between_ideographs_only() -> None:
    words = plain()
    made = measured("quiet  morning\n the river, 日本語の text", words)
    places = {int(made.begins[cut]) for cut in made.cuts}
    assert places == {0, 19, 26, *range(28, 31), 31}, (
        "not beside runs of space, not inside a word or a character"
    )
    spelled = make_haystack(["a <|eos|> b"], words, 1, np.random.default_rng(0))
    assert words.eos_token_id not in words(spelled.text)["input_ids"]


def test_faults_of_the_haystack_are_said() -> None:
    words = plain()
    with pytest.raises(ValueError, match="the haystack is empty"):
        make_haystack([" \n", ""], words, 100, np.random.default_rng(0))
    small = make_haystack(["Only a few words."], words, 400, np.random.default_rng(0))
    with pytest.raises(ValueError, match=rf"the haystack has {small.tokens} tokens, the prompt needs \d+"):
        multi_needle_prompt(words, small, draw_facts(0, 0, 1, 1), 400, 0.5)
    large = make_haystack([TEXT], words, 400, np.random.default_rng(0))
    with pytest.raises(ValueError, match=r"with 6 needles needs at least \d+ tokens, not 60"):
        multi_needle_prompt(words, large, draw_facts(0, 0, 6, 2), 60, 0.5)


def test_the_rule() -> None:
    assert found(" 1234567 and 7654321", ["7654321", "1234567"]) == [True, True]
    assert found("It is 12345678.", ["1234567"]) == [True], "digits as a substring"
    assert found("1,234,567", ["1234567"]) == [False]
    assert found("", ["1234567"]) == [False]

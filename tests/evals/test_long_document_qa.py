"""Long-document questions: exact lengths and depths, SQuAD's rules, controls, intervals over articles, bad input."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pydantic import ValidationError
from transformers import PreTrainedTokenizerFast

from clearhead.evals.asking.squad_rules import covered, exact, f1, normalised, within
from clearhead.evals.faithfulness.long_document_qa.evaluation import (
    LongDocumentQa,
    LongDocumentQaConfig,
    blind,
)
from clearhead.evals.faithfulness.long_document_qa.prompts import Asker, draw, read_articles
from tests.evals import tiny
from tests.evals.test_knowledge_conflicts import run_of, subject_of
from tests.evals.test_multineedle_prompts import plain

TOPICS = ["grass", "sky", "key", "passkey", "hill", "river"]


def write(path: Path, articles: int = 5, paragraphs: int = 6) -> Path:
    """Articles whose paragraphs each say one thing that no other says; a few questions to each."""
    rng = np.random.default_rng(0)
    rows = []
    for a in range(articles):
        parts = []
        for p in range(paragraphs):
            secret = f"Number {a}{p}x{rng.integers(100, 999)}"
            filler = " ".join(rng.choice(["the", "green", "hidden", "keys,", "are", "blue;"], 20))
            context = f"Of {TOPICS[p % 6]} {p}: {filler}. Its name is {secret}. {filler.capitalize()}."
            parts.append(
                {
                    "context": context,
                    "qas": [
                        {
                            "question": f"What is the name of {TOPICS[p % 6]} {p}?",
                            "answers": [secret, secret],
                        },
                        {"question": "What colour?", "answers": [{"text": "blue"}]},
                    ],
                }
            )
        rows.append({"title": f"Article {a}", "paragraphs": parts})
    if path.suffix == ".json":
        path.write_text(json.dumps({"data": rows}))
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


class Says(tiny.CopyModel):
    def __init__(self, words: PreTrainedTokenizerFast, reply: Callable[[str], str]) -> None:
        super().__init__(tiny.CopyConfig(vocab_size=400))
        self.words, self.reply = words, reply
        self.lengths: Counter[int] = Counter()

    def _next(self, ids: list[int]) -> int:
        text = self.words.decode(ids)
        asked, _, spoken = text.rpartition("Answer:")
        if not spoken:
            self.lengths[len(ids)] += 1
        said = self.words(f"{self.reply(asked)}\n and on")["input_ids"]
        return next((token for k, token in enumerate(said) if self.words.decode(said[:k]) == spoken), 0)


def reads(prompt: str) -> str:
    """Looks up the paragraph that the question names."""
    topic = re.findall(r"name of (\w+ \d)\?", prompt)[-1]
    found = re.search(rf"Of {topic}: .*? Its name is ([^.]*)\.", prompt)
    return f" {found[1]}." if found else " Number 0"


SMALL: dict[str, Any] = {"lengths": [400, 500], "depths": [0.0, 0.5, 1.0], "samples": 7}


def run(model: Any, words: Any, data: Path, folder: Path | None = None, **settings: Any) -> dict[str, Any]:
    config = LongDocumentQaConfig(**{"data": str(data), **SMALL, **settings})
    return LongDocumentQa().run(subject_of(model.eval(), words, folder), config)


def test_the_rules_are_squads() -> None:
    assert normalised("  The Denver-Broncos,  a team! ") == "denverbroncos team"
    assert exact("the Denver Broncos.", ["Denver", "denver broncos"]) and not exact("", ["the"])
    assert not exact("Denver Bronco", ["Denver Broncos"])
    # Bag of words: 2 of 3 said, 2 of 4 right, so 2 · 2 / (3 + 4).
    assert f1("gold gold ring", ["golden gold gold bars"]) == pytest.approx(4 / 7)
    assert f1("gold", ["silver", "gold"]) == 1.0 and f1("x", ["y"]) == 0.0 and f1("", ["y"]) == 0.0
    assert (
        within("Number 1", "It is the number, 1!")
        and not within("Number 1", "number 12")
        and not within("the", "the")
    )


@pytest.mark.parametrize("suffix", [".json", ".jsonl"])
def test_files_are_read_and_questions_with_answers_elsewhere_left_out(suffix: str, tmp_path: Path) -> None:
    data = write(tmp_path / f"set{suffix}")
    articles = read_articles(str(data), unique=True)
    assert [len(a.questions) for a in articles] == [6] * 5
    assert all(len(question.answers) == 1 for a in articles for question in a.questions)
    assert [len(a.questions) for a in read_articles(str(data), unique=False)] == [12] * 5
    drawn = draw([a.questions for a in articles], 7, 1)
    assert Counter(question.article for question in drawn).most_common(1)[0][1] == 2, "articles in turn"
    assert drawn == draw([a.questions for a in articles], 7, 1)


@pytest.mark.parametrize("form", ["completion", "chat"])
def test_prompts_have_exactly_the_tokens_and_the_paragraph_at_its_depth(form: Any, tmp_path: Path) -> None:
    words = plain()
    words.chat_template = "{{ '<user>' + messages[0]['content'] + '<said>' }}"
    articles = read_articles(str(write(tmp_path / "set.jsonl", paragraphs=8)), unique=True)
    asker = Asker(articles, words, form)
    question = articles[1].questions[3]
    paragraphs = articles[1].paragraphs
    for length in (400, 401, 402, 403, 450):
        for depth in (0.0, 0.3, 0.5, 1.0):
            prompt = asker.prompt(question, length, depth)
            assert len(prompt.ids) == length
            assert words(prompt.text, add_special_tokens=False)["input_ids"] == prompt.ids.tolist()
            assert prompt.text.startswith(words.bos_token if form == "completion" else "<user>Read")
            assert prompt.text.endswith("Answer:" if form == "completion" else "<said>")
            # The article as a ring: what is around the paragraph is the article's own text, in order.
            ring = "\n\n".join([*paragraphs[4:], *paragraphs[:3]])
            lead, found, tail = prompt.document.partition(paragraphs[3])
            assert (
                found
                and ring.endswith(lead.removesuffix("\n\n"))
                and ring.startswith(tail.removeprefix("\n\n"))
            )
            tokens = [len(words(part)["input_ids"]) for part in (lead, tail)]
            # Between words, of which some have more than a dozen tokens here.
            assert tokens[0] == pytest.approx(depth * sum(tokens), abs=20)
            assert prompt.before / prompt.around == pytest.approx(tokens[0] / sum(tokens), abs=0.03)
    with pytest.raises(ValueError, match="tokens around the paragraph, the prompt needs"):
        asker.prompt(question, 4000, 0.5)


def test_a_model_that_reads_answers_all_and_one_that_invents_is_found_out(tmp_path: Path) -> None:
    words, data = plain(), write(tmp_path / "set.jsonl")
    model = Says(words, reads)
    values = run(model, words, data)
    assert model.lengths[400] == model.lengths[500] == 21 and values["n"] == 7 * 7
    for cell in values["cells"]:
        assert cell["n"] == 7 and cell["index"] == list(range(7))
        right = 0.0 if cell["length"] == 0 else 1.0
        assert cell["exact"] == cell["contains"] == [right] * 7
        assert cell["extractive"] == (None if cell["length"] == 0 else [1.0] * 7)
        if cell["length"]:
            assert cell["at"] == pytest.approx(cell["depth"], abs=0.05) and 0 < cell["chance"] < 0.02
    closed = next(cell for cell in values["cells"] if cell["length"] == 0)
    assert closed["f1"] == pytest.approx([0.5] * 7), "it says Number without the text"
    values = run(Says(words, lambda prompt: " purple rain"), words, data, closed_book=False)
    assert all(cell["extractive"] == [0.0] * 7 and cell["f1"] == [0.0] * 7 for cell in values["cells"])
    assert {row["exact"] for row in values["examples"]} == {False}


def test_words_that_the_text_has() -> None:
    assert covered("It is the Purple, key!", "A key: what is it?") == pytest.approx(3 / 4)
    assert covered("the", "the") == 0.0


def test_the_blind_level() -> None:
    # Five words after normalisation, "the" removed: four runs of two.
    assert blind("One two the three, four five", ["two three"]) == pytest.approx(1 / 4)


@pytest.mark.parametrize("kind", ["llama", "ours"])
def test_batches_and_padding_side_change_no_answer(kind: str, tmp_path: Path) -> None:
    words, data = plain(), write(tmp_path / "set.jsonl")
    model = (tiny.llama(400) if kind == "llama" else tiny.ours(400, attention="differential")).double()
    found = []
    for number, tokens in enumerate((1, 4000)):
        words.padding_side = ("left", "right")[number]
        folder = tmp_path / str(number)
        run(model, words, data, folder, samples=2, depths=[0.5], max_new_tokens=5, batch_tokens=tokens)
        lines = (folder / "long_document_qa.jsonl").read_text().splitlines()[1:]
        found.append({(r["length"], r["index"]): r["answer"] for r in map(json.loads, lines)})
    assert found[0] == found[1] and len(set(found[0].values())) > 1


def test_an_interrupted_run_goes_on(tmp_path: Path) -> None:
    words, data = plain(), write(tmp_path / "set.jsonl")
    whole = run(Says(words, reads), words, data)
    seen: set[str] = set()

    def stops(prompt: str) -> str:
        seen.add(prompt)
        if len(seen) > 20:
            raise KeyboardInterrupt
        return reads(prompt)

    with pytest.raises(KeyboardInterrupt):
        run(Says(words, stops), words, data, tmp_path, batch_tokens=1)
    left = len((tmp_path / "long_document_qa.partial.jsonl").read_text().splitlines()) - 1
    assert 20 <= left < 40
    model = Says(words, reads)
    assert run(model, words, data, tmp_path, batch_tokens=1) == whole and model.lengths.total() == 49 - left


def test_lengths_that_cannot_be_asked_are_left_out_with_the_reason(tmp_path: Path) -> None:
    words, data = plain(), write(tmp_path / "set.jsonl")
    values = run(Says(words, reads), words, data, lengths=[20, 400, 9000])
    assert {cell["length"] for cell in values["cells"]} == {0, 400}
    assert "the shortest need" in values["skipped_cells"]["20 tokens"]
    assert "no article fills 9000 tokens; the longest has" in values["skipped_cells"]["9000 tokens"]
    assert "more than the model takes" in run(tiny.gpt2(400), words, data)["skipped"]
    values = run(Says(words, reads), words, data, form="chat")
    assert "no chat template" in values["skipped"]
    with pytest.raises(ValidationError, match="between 0 and 1"):
        LongDocumentQaConfig(data="x", depths=[50])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"title": "a"}', "has no field 'paragraphs'; its fields are title"),
        ('{"paragraphs": ["a"]}', "is not a list of objects"),
        ('{"paragraphs": [{"qas": []}]}', "has no field 'context'"),
        ('{"paragraphs": [{"context": "a b", "qas": [{"question": "q"}]}]}', "has no field 'answers'"),
        (
            '{"paragraphs": [{"context": "a b", "qas": [{"question": "q", "answers": [3]}]}]}',
            "an answer in .* is int",
        ),
        ('{"paragraphs": [{"context": "a b", "qas": []}]}', "holds no question with an answer"),
        ("", "is empty: it holds no record"),
    ],
)
def test_files_that_cannot_be_used_say_why(text: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "set.jsonl"
    path.write_text(text)
    with pytest.raises(ValueError, match=message):
        read_articles(str(path), unique=True)


def test_the_report_compares_article_by_article(tmp_path: Path) -> None:
    words, data = plain(), write(tmp_path / "set.jsonl")
    good = run(Says(words, reads), words, data)
    bad = run(Says(words, lambda prompt: " purple"), words, data)
    section = LongDocumentQa().section(run_of("long_document_qa", {"reader": good, "inventor": bad}))
    assert "F1 of greedy answers, 400 to 500 tokens: inventor is worse than reader by 1.00" in section.answer
    estimate = section.headlines[0].estimate
    assert estimate is not None and estimate.n == 5, "articles are the samples"
    rows = {str(row[0]): row for row in section.tables[0].rows}
    assert rows["exact match"][1] == "1.00 (0.92 to 1.00, n=42)", "Wilson where articles all agree"
    assert str(rows["extractive: what is said stands in the text"][2]).startswith("0.00")
    assert str(rows["words: of what is said, those that the text has"][1]).startswith("1.00")
    assert str(rows["closed book, F1"][1]).startswith("0.50")
    assert [chart.slug for chart in section.charts] == ["long-document-heat", "long-document-length"]
    assert any("[not in the text]" in str(row[-1]) for row in section.tables[2].rows)
    same = LongDocumentQa().section(run_of("long_document_qa", {"a": good, "b": good}))
    assert "No difference from a detected for b" in same.answer
    other = replace_indices(good)
    assert "No cell was measured for all arms" in LongDocumentQa().section(
        run_of("long_document_qa", {"a": good, "b": other})
    ).answer  # fmt: skip
    missing = LongDocumentQa().section(run_of("long_document_qa", {"a": {"skipped": "why"}}))
    assert missing.missing and "why" in missing.answer


def replace_indices(values: dict[str, Any]) -> dict[str, Any]:
    """As if other questions had been asked."""
    return {**values, "articles": {key: article + 1 for key, article in values["articles"].items()}}

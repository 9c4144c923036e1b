"""Knowledge conflicts: likelihoods that batches cannot change, both lengths' norms, and what a greedy answer names."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedTokenizerFast

from clearhead.evals.asking.answering import encode, frame, greedy_answers, likelihoods
from clearhead.evals.asking.records import RecordError
from clearhead.evals.faithfulness.knowledge_conflicts.evaluation import (
    Conflict,
    KnowledgeConflicts,
    KnowledgeConflictsConfig,
    draw,
    greedily,
    read_conflicts,
    said,
    summary,
)
from clearhead.evals.runner import checked
from clearhead.runs.results import ArmResults, RunResults, SeedResults
from tests.evals import tiny
from tests.evals.test_multineedle_prompts import plain

NAMES = ["Ada", "Byron", "Charles Babbage", "Dora", "Emil and the rest", "Fritz"]


def write(path: Path, count: int = 9) -> Path:
    """Questions with contexts of many lengths, answers of many lengths, one with two remembered ones."""
    rows = []
    for i in range(count):
        new, old = NAMES[i % 6], NAMES[(i + 1) % 6]
        scores = {new: 1, old: 0} | ({"Zoe": 0} if i == 4 else {})
        text = f"\nQuestion: who wrote book {i}?\nContext: It is said {'over and over ' * (i % 4)}that {new} wrote it."
        rows.append({"input": text, "target": new, "target_scores": scores})
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


class Says(tiny.CopyModel):
    """Answers with what ``reply`` makes of the prompt, then ends its line."""

    def __init__(self, words: PreTrainedTokenizerFast, reply: Callable[[str], str]) -> None:
        super().__init__(tiny.CopyConfig(vocab_size=400))
        self.words, self.reply = words, reply
        self.answered = 0

    def _next(self, ids: list[int]) -> int:
        text = self.words.decode(ids)
        asked, spoken = re.split("Answer:|Summary:", text, maxsplit=1)
        reply = self.reply(asked)
        # Where there is nothing to say the text ends.
        said = self.words(f"{reply}\n and on")["input_ids"] if reply else [self.words.eos_token_id]
        self.answered += not spoken
        return next((token for k, token in enumerate(said) if self.words.decode(said[:k]) == spoken), 0)


def reads(prompt: str) -> str:
    return " " + prompt.split("that ")[-1].split(" wrote")[0] if "Context" in prompt else " no"


def run_of(name: str, values: dict[str, dict[str, Any]]) -> RunResults:
    arms = [
        ArmResults(arm, arm, "softmax", {0: SeedResults(results={name: {"config": {}, "values": v}})})
        for arm, v in values.items()
    ]
    return RunResults({"name": "run"}, {}, arms)


def subject_of(model: Any, words: PreTrainedTokenizerFast, folder: Path | None = None) -> Any:
    return replace(tiny.subject(model, tokenizer=words, training_length=400), folder=folder)


def run(model: Any, words: Any, data: Path, folder: Path | None = None, **settings: Any) -> dict[str, Any]:
    config = KnowledgeConflictsConfig(data=str(data), **settings)
    return KnowledgeConflicts().run(subject_of(model, words, folder), config)


@pytest.mark.parametrize("kind", ["llama", "ours", "dynamic", "theirs dynamic"])
def test_likelihoods_are_those_of_each_answer_alone(kind: str, tmp_path: Path) -> None:
    """Oracle: one row at a time, unpadded, in float64, over the softmax of its own logits."""
    words = plain()
    growing = {"rope_type": "dynamic", "factor": 4.0}
    model = {
        "llama": lambda: tiny.llama(400),
        "ours": lambda: tiny.ours(400, attention="differential"),
        "dynamic": lambda: tiny.ours(
            400, rope_parameters={**growing, "original_max_position_embeddings": 16}
        ),
        "theirs dynamic": lambda: tiny.llama(400, rope_parameters={**growing, "rope_theta": 1e4}),
    }[kind]().double()
    # Hugging Face's growing frequencies are made in float32, here and there in another order.
    close = 1e-7 if kind == "theirs dynamic" else 1e-12
    data = write(tmp_path / "set.jsonl")
    words.padding_side = "left"
    run(model, words, data, tmp_path, max_new_tokens=2)
    rows = [
        json.loads(line) for line in (tmp_path / "knowledge_conflicts.jsonl").read_text().splitlines()[1:]
    ]
    assert len(rows) == 9
    for row, one in zip(rows, read_conflicts(str(data)), strict=True):
        for kept, question in ((row["with"], one.asked), (row["without"], one.alone)):
            for (mean, total), answer in zip(kept, one.answers, strict=True):
                prompt = words(f"{words.bos_token}{question}\nAnswer:", add_special_tokens=False)["input_ids"]
                tail = words(f" {answer}", add_special_tokens=False)["input_ids"]
                # A fresh copy keeps no frequencies of a longer text.
                fresh = type(model)(model.config).double().eval()
                fresh.load_state_dict(model.state_dict())
                with torch.inference_mode():
                    logits = fresh(input_ids=torch.tensor([prompt + tail]), use_cache=False).logits[0]
                expected = 0.0
                for k, token in enumerate(tail):
                    scores = [float(x) for x in logits[len(prompt) + k - 1]]
                    top = max(scores)
                    expected += scores[token] - top - math.log(sum(math.exp(x - top) for x in scores))
                assert total == pytest.approx(expected, rel=close)
                assert mean == pytest.approx(expected / len(tail), rel=close)


@pytest.mark.parametrize("kind", ["llama", "ours"])
def test_batches_change_nothing(kind: str, tmp_path: Path) -> None:
    words = plain()
    model = (tiny.llama(400) if kind == "llama" else tiny.ours(400, attention="differential")).double()
    data = write(tmp_path / "set.jsonl")
    answers = []
    for number, tokens in enumerate((1, 4000)):
        words.padding_side = ("left", "right")[number]
        run(model, words, data, tmp_path / str(number), batch_tokens=tokens, max_new_tokens=4)
        lines = (tmp_path / str(number) / "knowledge_conflicts.jsonl").read_text().splitlines()[1:]
        answers.append([json.loads(line) for line in lines])
    for one, other in zip(*answers, strict=True):
        assert one["answer"] == other["answer"] and one["said"] == other["said"]
        assert torch.allclose(torch.tensor(one["with"]), torch.tensor(other["with"]), rtol=1e-12)


def test_rows_of_different_starts_are_read_from_their_own() -> None:
    model = tiny.llama(400).double()
    ids = [encode(plain(), text) for text in ("who is hidden here and there", "a key is a key")]
    together = likelihoods(model, [(ids[0], 5), (ids[1], 1)])
    alone = [likelihoods(model, [(ids[0], 5)])[0], likelihoods(model, [(ids[1], 1)])[0]]
    assert [len(row) for row in together] == [len(ids[0]) - 5, len(ids[1]) - 1]
    for one, other in zip(together, alone, strict=True):
        assert one == pytest.approx(other, rel=1e-12)


def test_the_mean_and_the_sum_may_disagree_and_a_tie_is_no_preference() -> None:
    row = {
        "index": 0,
        "said": "context",
        "with": [[-1.0, -6.0], [-2.0, -4.0]],
        "without": [[-3.0, -3.0], [-3.0, -3.0]],
    }
    assert summary(row).values() == {
        "index": 0, "mean": True, "total": False, "mean_without": False, "total_without": False, "said": "context"
    }  # fmt: skip
    three = summary({**row, "with": [[-2.0, -2.0], [-3.0, -3.0], [-1.0, -1.0]], "without": []})
    assert (three.mean, three.mean_without) == (False, None), "the context's answer must beat all others"


def test_what_an_answer_names() -> None:
    conflict = Conflict(0, "", "", "The Beatles", ("Queen", "ABBA"))
    assert said(" It was the beatles!", conflict) == "context"
    assert said("ABBA.", conflict) == "remembered" and said("Queen, then Beatles", conflict) == "both"
    assert said("Queens", conflict) == "neither" and said("", conflict) == "neither"


def test_a_model_that_reads_says_the_contexts_answer_and_goes_on_after_an_interruption(
    tmp_path: Path,
) -> None:
    words, data = plain(), write(tmp_path / "set.jsonl", 70)
    whole = run(Says(words, reads).eval(), words, data, samples=60)
    assert {item["said"] for item in whole["items"]} == {"context"} and whole["n"] == 60
    # Question 4 has three answers; it may be among those drawn.
    assert whole["chance"] == pytest.approx((59 / 2 + 1 / 3) / 60) or whole["chance"] == 0.5
    assert all("and on" not in row["answer"] for row in whole["examples"]), "an answer ends with its line"

    seen: set[str] = set()

    def stops(prompt: str) -> str:
        seen.add(prompt)
        # Each question is read with its context and without.
        if len(seen) > 70:
            raise KeyboardInterrupt
        return reads(prompt)

    with pytest.raises(KeyboardInterrupt):
        run(Says(words, stops).eval(), words, data, tmp_path, samples=60, batch_tokens=1)
    kept = (tmp_path / "knowledge_conflicts.partial.jsonl").read_text().splitlines()
    assert len(kept) == 1 + 32, "questions are kept in groups of 32"
    model = Says(words, reads).eval()
    again = run(model, words, data, tmp_path, samples=60, batch_tokens=1)
    assert again == whole and model.answered < 60 * 2
    config = KnowledgeConflictsConfig(data=str(data), samples=60)
    chosen = draw(read_conflicts(str(data)), 60, config.seed)
    assert [item["index"] for item in whole["items"]] == [one.index for one in chosen]


def test_a_chat_model_is_asked_in_its_template_but_scored_as_any_other(tmp_path: Path) -> None:
    words, data = plain(), write(tmp_path / "set.jsonl", 2)
    words.chat_template = "{{ '<user>' + messages[0]['content'] + '<said>' }}"
    (one, _) = read_conflicts(str(data))
    text = words.decode(greedily(words, "chat", one.asked))
    shout = frame(words, "chat", "Read:\n", "\nWhat DOCUMENT is it?", "")
    assert shout == ("<user>Read:\n", "\nWhat DOCUMENT is it?<said>"), "a question may hold any word"
    assert text == f"<user>{one.asked}\nAnswer with as few words as possible.<said>"
    assert words.decode(greedily(words, "completion", one.asked)) == f"{words.bos_token}{one.asked}\nAnswer:"
    model = tiny.llama(400).double()
    both = [run(model, words, data, tmp_path / form, form=form) for form in ("chat", "completion")]
    assert [value["form"] for value in both] == ["chat", "completion"]
    kept = [
        (tmp_path / form / "knowledge_conflicts.jsonl").read_text().splitlines()[1:]
        for form in ("chat", "completion")
    ]
    assert [json.loads(row)["with"] for row in kept[0]] == [json.loads(row)["with"] for row in kept[1]]
    words.chat_template = None
    assert "no chat template" in run(model, words, data, form="chat")["skipped"]


def test_the_report_compares_question_by_question(tmp_path: Path) -> None:
    words, data = plain(), write(tmp_path / "set.jsonl")
    good = run(Says(words, reads).eval(), words, data)
    bad = run(Says(words, lambda prompt: " Ada or Byron").eval(), words, data)
    for item in good["items"]:
        item.update(mean=True, mean_without=item["index"] % 2 == 0)
    for item in bad["items"]:
        item.update(mean=False)
    section = KnowledgeConflicts().section(run_of("knowledge_conflicts", {"reader": good, "babbler": bad}))
    assert "babbler is worse than reader by 1.00" in section.answer
    rows = {str(row[0]): row for row in section.tables[0].rows}
    assert str(rows["preferred, of the known, mean"][1]).startswith("1.00 (") and "n=4" in str(
        rows["preferred, of the known, mean"][1]
    )
    assert str(rows["said: context"][1]).startswith("1.00") and str(
        rows["memorisation ratio ↓"][1]
    ).startswith("0.00")
    shown = [str(row[0]) for row in section.tables[1].rows]
    assert "reader, right" in shown and "babbler, wrong" in shown
    same = KnowledgeConflicts().section(run_of("knowledge_conflicts", {"a": good, "b": good}))
    assert "No difference from a detected for b" in same.answer
    missing = KnowledgeConflicts().section(run_of("knowledge_conflicts", {"a": {"skipped": "why"}}))
    assert missing.missing and "why" in missing.answer


def test_a_model_that_cannot_take_a_prompt_leaves_it_out(tmp_path: Path) -> None:
    words, data = plain(), write(tmp_path / "set.jsonl")
    values = run(tiny.gpt2(400), words, data)
    assert "more than the model takes" in values["skipped"]


def test_answers_of_any_length_come_back_in_their_places() -> None:
    words = plain()
    model = Says(words, lambda prompt: "\n\n " + prompt.split()[-1])
    prompts = [
        encode(words, f"the {word} {'x ' * k}{word}\nAnswer:")
        for k, word in enumerate(("sky", "key", "green"))
    ]
    said_ = dict(greedy_answers(subject_of(model.eval(), words), prompts, 8, one_line=True))
    assert said_ == {0: "sky", 1: "key", 2: "green"}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"input": "a", "target": "b"}', "has no field 'target_scores'; its fields are input, target"),
        ('{"text": "a"}', "line 1 of .* has no field 'input'"),
        ('{"input": "a", "target": "b", "target_scores": {"b": 1}}', "names no other answer"),
        ('{"input": "a", "target": "b", "target_scores": ["b"]}', "not an object of answers"),
        (
            '{"input": "a", "target": "", "target_scores": {"b": 1}}',
            "field 'target' in line 1 .* is empty, not text",
        ),
        ("", "is empty: it holds no record"),
        ('{"input": ', "line 1 of .* is not JSON"),
        ("[1]", "is a JSON list"),
    ],
)
def test_files_that_cannot_be_used_say_why(text: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "set.jsonl"
    path.write_text(text)
    with pytest.raises(ValueError, match=message):
        read_conflicts(str(path))


def test_a_file_that_is_not_there() -> None:
    with pytest.raises(RecordError, match="there is no file 'nowhere"):
        read_conflicts("nowhere.jsonl")
    with pytest.raises(ValueError, match="did you mean 'samples'"):
        checked("knowledge_conflicts", {"data": "x", "sample": 3})

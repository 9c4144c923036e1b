"""Hallucination: answers kept and judged once, undecided ones shown as such, sets and judges that cannot be used."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from clearhead import registry
from clearhead.evals.faithfulness.hallucination.data import open_set
from clearhead.evals.faithfulness.hallucination.evaluation import (
    Hallucination,
    HallucinationConfig,
    prompt_of,
)
from clearhead.evals.faithfulness.judges.base import Case, Judge, JudgeConfig, JudgeError, Judgement
from clearhead.evals.runner import checked, evaluate_external
from clearhead.evals.subjects.external import ExternalSpec
from tests.evals import tiny
from tests.evals.judging import completion, endpoint
from tests.evals.test_knowledge_conflicts import Says, run_of, subject_of
from tests.evals.test_multineedle_prompts import plain

judged: list[Case] = []


class WordsConfig(JudgeConfig):
    """stop: cases after which it breaks down."""

    stop: int = 10**9


class Words(Judge[WordsConfig]):
    """Free of hallucination when the document has the answer's last word; undecided when the answer asks back."""

    name = "words"
    Config = WordsConfig

    def prepare(self) -> None:
        pass

    def judge(self, cases: Sequence[Case]) -> Iterator[tuple[int, Judgement]]:
        # Not in their order: no judge has to keep it.
        for count, index in enumerate(reversed(range(len(cases)))):
            if count == self.config.stop:
                raise JudgeError("the judge is tired")
            case = cases[index]
            judged.append(case)
            last = case.proposed.split()[-1].rstrip(".")
            free = None if case.proposed.endswith("?") else f" {last} " in f" {case.document} "
            yield index, Judgement(free, f"looked for {last}")

    def described(self) -> str:
        return "the judge of words"

    def spent(self) -> str:
        return "1 word."


@pytest.fixture(autouse=True)
def words_judge(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(registry.JUDGES, "words", f"{__name__}:Words")
    judged.clear()


def write(path: Path, question: bool = True, count: int = 12) -> Path:
    rows = []
    for i in range(count):
        row = {
            "document": f"\nThe sky of place {i} is {'green ' * (i % 3)}grey{i} here.",
            "reference": f"grey{i}",
        }
        rows.append({**row, "question": f"What is the sky of place {i}?"} if question else row)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def reads(prompt: str) -> str:
    """Finds the colour of the place; of place 3 nothing, of place 4 another one, of place 5 it asks back."""
    place = int(prompt.split("place ")[1].split()[0])
    colour = prompt.split(" here.")[0].split()[-1]
    return {3: "", 4: f" It is blue{place}.", 5: " Is it?"}.get(place, f" It is {colour}.")


def run(
    data: Sequence[Path], folder: Path | None = None, reply: Any = reads, **settings: Any
) -> dict[str, Any]:
    words = plain()
    options: dict[str, Any] = {"data": [str(path) for path in data], "judge": "words", **settings}
    return Hallucination().run(
        subject_of(Says(words, reply).eval(), words, folder), HallucinationConfig(**options)
    )


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()[1:]]


def test_answers_are_judged_and_what_is_undecided_is_neither_right_nor_wrong(tmp_path: Path) -> None:
    data = write(tmp_path / "skies.jsonl")
    values = run([data], tmp_path)
    (part,) = values["sets"]
    assert (part["name"], part["task"], part["n"], part["empty"]) == ("skies", "qa", 12, 1)
    assert dict(zip(part["index"], part["free"], strict=True)) == {
        **dict.fromkeys(range(12), True), 3: None, 4: False, 5: None
    }  # fmt: skip
    assert len(judged) == 11, "an empty answer is not sent"
    case = next(case for case in judged if case.proposed == "It is grey1.")
    assert case == Case(
        "qa",
        "The sky of place 1 is green grey1 here.",
        ("grey1",),
        "It is grey1.",
        "What is the sky of place 1?",
    )
    assert {row["free"] for row in values["examples"]} == {True, False, None}
    assert Hallucination().remark(values) == "judge: 1 word."
    answers = lines(tmp_path / "hallucination_answers.jsonl")
    assert len(answers) == 12 and all("Answer as briefly as possible" in row["prompt"] for row in answers)
    why = {row["index"]: row["why"] for row in lines(tmp_path / "hallucination_verdicts.jsonl")}
    assert why[3] == "the answer is empty" and why[1] == "looked for grey1"
    section = Hallucination().section(run_of("hallucination", {"reader": values}))
    assert "Free of hallucination: reader: 0.90 (0.60 to 0.98, n=10, 1 seed)" in section.answer
    assert section.tables[0].rows == [["skies", "0.90 (0.60 to 0.98, n=10); 2 of 12 undecided: 0.75 to 0.92"]]
    assert section.tables[-1].rows[1] == ["DIFF", ".53", ".41", ".61", ".39", ".46", ".36"]
    marks = [row[0] for row in section.tables[1].rows]
    assert marks[0] == "reader, free" and "reader, hallucinates" in marks and "reader, undecided" in marks


def test_summaries_and_several_sets(tmp_path: Path) -> None:
    first, second = write(tmp_path / "a.jsonl"), write(tmp_path / "b.jsonl", question=False)
    values = run([first, second], samples=5)
    assert [(part["name"], part["task"], part["n"]) for part in values["sets"]] == [
        ("a", "qa", 5),
        ("b", "summarisation", 5),
    ]
    assert {case.task for case in judged} == {"qa", "summarisation"}
    bad = run([first, second], samples=5, reply=lambda prompt: " It is black.")
    section = Hallucination().section(run_of("hallucination", {"reader": values, "inventor": bad}))
    assert "inventor is worse than reader by" in section.answer and len(section.tables[0].rows) == 3
    same = Hallucination().section(run_of("hallucination", {"a": values, "b": values}))
    assert "No difference from a detected for b" in same.answer
    asks = run([first], samples=5, reply=lambda prompt: " Why?")
    lost = Hallucination().section(run_of("hallucination", {"a": asks}))
    assert lost.answer == "No answer was decided for all arms." and "none decided" in str(
        lost.tables[0].rows[0][1]
    )
    missing = Hallucination().section(run_of("hallucination", {"a": {"skipped": "why"}}))
    assert missing.missing and "why" in missing.answer


def test_a_judge_that_breaks_down_loses_nothing(tmp_path: Path) -> None:
    data = write(tmp_path / "skies.jsonl")
    whole = run([data])
    asked: list[str] = []

    def counts(prompt: str) -> str:
        asked.append(prompt)
        return reads(prompt)

    with pytest.raises(
        JudgeError, match=r"the judge is tired\. 5 of 12 answers are judged and kept; the same command"
    ):
        run([data], tmp_path, counts, judge_options={"stop": 4})
    assert len(set(asked)) == 12 and not (tmp_path / "hallucination_answers.jsonl").exists()
    asked.clear()
    judged.clear()
    # Another option of the judge is another judge: the answers are read again, the verdicts are not.
    values = run([data], tmp_path, counts)
    assert values == whole and not asked and len(judged) == 11
    judged.clear()
    assert run([data], tmp_path, counts) == whole and not asked and not judged, "all of it is there"
    other = run([data], tmp_path, counts, seed=1)
    assert len(set(asked)) == 12 and other["n"] == 12


def test_a_real_run_with_an_endpoint_says_what_it_cost(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CLEARHEAD_CACHE", str(tmp_path / "cache"))
    model = tiny.save(tmp_path / "model", max_position_embeddings=2048)
    data = write(tmp_path / "skies.jsonl", count=3)
    said: list[str] = []
    replies = {"True": completion("**Conclusion: True**"), "False": completion("**Conclusion: False**")}
    with endpoint(
        lambda number, body: replies["True" if "place 1" in body["messages"][0]["content"] else "False"]
    ) as fake:
        options = {
            "data": [str(data)], "judge": "openai", "max_new_tokens": 4,
            "judge_options": {
                "model": "m", "base_url": fake.url, "api_key_env": "", "price_input": 1.0, "price_output": 1.0
            },
        }  # fmt: skip
        spec = ExternalSpec(str(model))
        evaluate_external(
            spec,
            tmp_path / "run",
            ["hallucination"],
            options={"hallucination": options},
            progress=said.append,
        )
        assert any(line.startswith("judge: 3 requests, 300 + 30 tokens, cost 0.0003") for line in said)
        evaluate_external(spec, tmp_path / "again", ["hallucination"], options={"hallucination": options})
        assert len(fake.asked) == 3, "another run pays nothing twice"
    found = json.loads(next((tmp_path / "again").rglob("hallucination.json")).read_text())["values"]
    assert found["sets"][0]["free"] == [False, True, False] and found["usage"]["from_cache"] == 3


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            '{"text": "a", "reference": "b"}',
            "has no field 'document'; its fields are reference, text: set fields.document",
        ),
        ('{"document": "a"}', "has no field 'reference'"),
        ('{"document": "a", "reference": 3}', "is neither a text nor a list of texts"),
        ('{"document": " ", "reference": "b"}', "field 'document' in line 1 .* is empty"),
        (
            '{"document": "a", "reference": "b", "question": "q"}\n{"document": "a", "reference": "b"}',
            "line 2 .* 'question'",
        ),
        ("", "is empty: it holds no record"),
        ("{", "line 1 of .* is not JSON"),
    ],
)
def test_files_that_cannot_be_used_say_why(text: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "set.jsonl"
    path.write_text(text)
    with pytest.raises(ValueError, match=message):
        open_set(str(path), {}, 10, 0)


def test_fields_may_have_other_names(tmp_path: Path) -> None:
    path = tmp_path / "set.jsonl"
    path.write_text(json.dumps({"text": "A text.", "summary": ["One.", "Two."]}))
    part = open_set(str(path), {"document": "text", "reference": "summary"}, 10, 0)
    assert part.task == "summarisation" and part.items[0].references == ("One.", "Two.")
    with pytest.raises(ValidationError, match="only document, reference, question can be renamed"):
        HallucinationConfig(data=["x"], judge="nli", fields={"text": "a"})


def test_sets_and_judges_that_are_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="no file or set 'xsun': did you mean 'xsum'"):
        run([Path("xsun")])
    with pytest.raises(ValueError, match="unknown judge 'nly': did you mean 'nli'"):
        checked("hallucination", {"data": ["xsum"], "judge": "nly"})
    monkeypatch.delenv("NO_SUCH_KEY", raising=False)
    with pytest.raises(JudgeError, match="environment variable NO_SUCH_KEY"):
        data = write(tmp_path / "skies.jsonl")
        run([data], judge="openai", judge_options={"model": "m", "api_key_env": "NO_SUCH_KEY"})
    (tmp_path / "b").mkdir()
    with pytest.raises(ValueError, match="have one name"):
        run([data, write(tmp_path / "b" / "skies.jsonl")])


def test_a_hub_that_is_out_of_reach_is_a_reason(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    def offline(*path: str, **options: Any) -> Any:
        raise ConnectionError(f"offline, no {path[0]}")

    monkeypatch.setattr(datasets, "load_dataset", offline)
    values = run([Path("xsum"), Path("qasper")])
    assert values == {
        "skipped": "the Hugging Face dataset 'EdinburghNLP/xsum' cannot be read (offline, no EdinburghNLP/xsum); "
        "the Hugging Face dataset 'Xnhyacinth/LongBench' cannot be read (offline, no Xnhyacinth/LongBench)"
    }
    values = run([write(tmp_path / "skies.jsonl"), Path("qasper")], samples=3)
    assert values["n"] == 3 and "cannot be read" in values["skipped_items"]["qasper"]
    rows = [{"context": f"text {i}", "question": f"which {i}?", "answers": ["a", "b"]} for i in range(5)]
    monkeypatch.setattr(datasets, "load_dataset", lambda *path, **options: rows)
    part = open_set("qasper", {"document": "ignored"}, 2, 0)
    assert part.task == "qa" and part.items[0].references == ("a", "b") and len(part.items) == 2


def test_prompts_that_do_not_fit_are_left_out_and_never_cut(tmp_path: Path) -> None:
    words, data = plain(), write(tmp_path / "skies.jsonl")
    config = HallucinationConfig(data=[str(data)], judge="words")
    values = Hallucination().run(subject_of(tiny.gpt2(400), words), config)
    assert "more than the model takes" in values["skipped"]
    chat = HallucinationConfig(data=[str(data)], judge="words", form="chat")
    values = Hallucination().run(subject_of(Says(words, reads).eval(), words), chat)
    assert "no chat template" in values["skipped"]
    special = replace(open_set(str(data), {}, 1, 0).items[0], document=f"before{words.eos_token}after")
    text = prompt_of(words, "completion", "qa", special)
    assert "beforeafter" in text and words.eos_token not in text.removeprefix(words.bos_token)

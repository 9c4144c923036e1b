"""The loop around cells: what is left out with its reason, what is kept on disk, what is an error."""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import Field

from clearhead.data.store import TokenStore
from clearhead.evals import cells as loop
from clearhead.evals.asking.records import RecordError
from clearhead.evals.asking.sample_log import Key, Row
from clearhead.evals.cells import (
    Asked,
    Cell,
    CellEvaluation,
    LeftOut,
    Measured,
    SampleEvaluation,
    fingerprint,
)
from clearhead.evals.evaluation import EvaluationConfig, EvaluationResult, Section, Skipped
from clearhead.evals.reasons import Unmeasured
from clearhead.evals.runner import measured as run_of
from clearhead.evals.subject import Subject
from clearhead.runs.results import ArmResults, RunResults, SeedResults
from tests.evals import tiny


class LengthsConfig(EvaluationConfig):
    lengths: list[int] = Field(default=[8, 16, 64])
    factor: int = 1


class Value(EvaluationResult):
    length: int
    double: float
    later: int | None = None


class LengthsResult(EvaluationResult):
    cells: list[Value]
    skipped_cells: dict[str, str]


class Lengths(CellEvaluation[LengthsConfig, LengthsResult, Cell, Value]):
    name, Config, Result, Value = "lengths", LengthsConfig, LengthsResult, Value

    def __init__(self, act: Callable[[int], Any] = lambda length: None) -> None:
        self.act = act
        self.asked: list[int] = []

    def cells(self, subject: Subject, config: LengthsConfig) -> list[Cell]:
        return [Cell(name=f"{length} tokens", length=length) for length in config.lengths]

    def measure(self, subject: Subject, config: LengthsConfig, cell: Cell) -> Value:
        assert cell.length is not None
        self.asked.append(cell.length)
        self.act(cell.length)
        subject.model(input_ids=torch.zeros(1, min(cell.length, 16), dtype=torch.long))
        return Value(length=cell.length, double=2.0 * cell.length * config.factor)

    def gather(
        self, subject: Subject, config: LengthsConfig, measured: Measured[Cell, Value]
    ) -> LengthsResult:
        return LengthsResult(cells=measured.values, skipped_cells=measured.skipped)

    def section(self, run: RunResults) -> Section:
        return Section(self.name, "", "", str(self.results(run)))


def raising(at: int, error: BaseException) -> Callable[[int], None]:
    def act(length: int) -> None:
        if length == at:
            raise error

    return act


@pytest.fixture(scope="module")
def gpt2() -> Any:
    return tiny.gpt2()


def test_a_length_that_the_model_cannot_take_is_left_out_unread(gpt2: Any) -> None:
    lengths = Lengths()
    values = lengths.run(tiny.subject(gpt2), LengthsConfig())
    assert lengths.asked == [8, 16]
    assert values == {
        "cells": [{"length": 8, "double": 16.0}, {"length": 16, "double": 32.0}],
        "skipped_cells": {
            "64 tokens": "64 tokens is more than the model takes (max_position_embeddings = 32)"
        },
    }


@pytest.mark.parametrize(
    "error", [torch.OutOfMemoryError("no room\nfor it"), MemoryError("no room"), ValueError("no room")]
)
def test_a_cell_without_room_or_with_a_reason_leaves_the_others(gpt2: Any, error: Exception) -> None:
    values = Lengths(raising(8, error)).run(tiny.subject(gpt2), LengthsConfig(lengths=[8, 16]))
    assert values["skipped_cells"] == {"8 tokens": "no room"}
    assert [cell["length"] for cell in values["cells"]] == [16]


def test_nothing_left_is_skipped_with_every_reason_once(gpt2: Any, tmp_path: Path) -> None:
    lengths = Lengths(raising(8, Unmeasured("no room")))
    assert lengths.run(tiny.subject(gpt2), LengthsConfig(lengths=[8])) == Skipped("no room").values()
    whole = tiny.subject(gpt2, folder=tmp_path)
    reasons = Lengths().run(whole, LengthsConfig(lengths=[64, 128]))["skipped"].split("; ")
    assert [reason.partition(" ")[0] for reason in reasons] == ["64", "128"]
    assert not list(tmp_path.iterdir())


def test_a_file_that_cannot_be_used_and_a_mistake_are_no_reasons(gpt2: Any) -> None:
    with pytest.raises(RecordError):
        Lengths(raising(8, RecordError("there is no file"))).run(tiny.subject(gpt2), LengthsConfig())
    with pytest.raises(ValueError, match="validation error"):
        Lengths(lambda length: Value.model_validate({})).run(tiny.subject(gpt2), LengthsConfig())


def test_a_text_that_cannot_be_opened_is_an_error_where_it_is_needed(gpt2: Any) -> None:
    def broken() -> TokenStore:
        raise ValueError("the text is gone")

    subject = replace(tiny.subject(gpt2), open_documents=broken)
    with pytest.raises(ValueError, match="the text is gone"):
        Lengths().run(subject, LengthsConfig())
    assert "skipped" in Lengths().run(subject, LengthsConfig(lengths=[64]))


def interrupted(subject: Subject) -> None:
    with pytest.raises(KeyboardInterrupt):
        Lengths(raising(16, KeyboardInterrupt())).run(subject, LengthsConfig())


def test_an_interrupted_evaluation_goes_on_with_the_next_cell(gpt2: Any, tmp_path: Path) -> None:
    subject = tiny.subject(gpt2, folder=tmp_path)
    interrupted(subject)
    assert [path.name for path in tmp_path.iterdir()] == ["lengths.cells.partial.jsonl"]
    lengths = Lengths()
    whole = lengths.run(subject, LengthsConfig())
    assert lengths.asked == [16] and not list(tmp_path.iterdir())
    assert whole == Lengths().run(subject, LengthsConfig())


def test_cells_of_other_options_weights_or_text_are_measured_again(gpt2: Any, tmp_path: Path) -> None:
    subject = tiny.subject(gpt2, folder=tmp_path)
    for other, config in (
        (subject, LengthsConfig(factor=2)),
        (tiny.subject(tiny.ours(), folder=tmp_path), LengthsConfig()),
        (tiny.subject(gpt2, tiny.store([40, 41]), folder=tmp_path), LengthsConfig()),
    ):
        interrupted(subject)
        lengths = Lengths()
        lengths.run(other, config)
        assert lengths.asked[:2] == [8, 16]
    borders = [TokenStore.from_documents(texts, bos_token_id=1) for texts in ([[3], [4]], [[3, 4]])]
    assert fingerprint(borders[0]) != fingerprint(borders[1])


def test_a_cell_whose_logits_were_no_numbers_is_not_kept(tmp_path: Path) -> None:
    """The next process would not see it, and would take the rest for a whole result."""
    model = tiny.ours(tie_word_embeddings=False)
    subject = tiny.subject(model, folder=tmp_path)
    with torch.no_grad():
        model.lm_head.weight.fill_(3e38)
    interrupted(subject)
    found = run_of(Lengths(), subject, LengthsConfig())
    assert "NaN or infinity in 3 of 3 calls" in found["skipped"]


def test_how_far_it_is_is_said_now_and_then(gpt2: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    subject = tiny.subject(gpt2)
    Lengths().run(subject, LengthsConfig(), said.append)
    assert not said
    monkeypatch.setattr(loop, "SILENCE", 0.0)
    Lengths().run(subject, LengthsConfig(), said.append)
    assert said[1] == "lengths: 1 of 2 parts, next 16 tokens"


class Answer(EvaluationResult):
    cell: str
    right: list[int]


class QuizConfig(EvaluationConfig):
    lengths: list[int] = Field(default=[8, 16, 64])
    samples: int = 3


class QuizResult(EvaluationResult):
    cells: list[Answer]
    skipped_cells: dict[str, str]
    rows: int


class Quiz(SampleEvaluation[QuizConfig, QuizResult, Cell]):
    """Samples of all lengths answered together, two at a time; `act` is told each and may say why its cell has none."""

    name, Config, Result, keys, at_once = "quiz", QuizConfig, QuizResult, ("cell", "index"), 2

    def __init__(self, act: Callable[[str, int], str | None] = lambda cell, index: None) -> None:
        self.act = act
        self.asked: list[list[tuple[str, int]]] = []

    def cells(self, subject: Subject, config: QuizConfig) -> list[Cell | LeftOut]:
        made = [Cell(name=f"{length} tokens", length=length) for length in config.lengths]
        return [made[0], LeftOut("no tokens", "there is nothing to read"), *made[1:]]

    def about(self, subject: Subject, config: QuizConfig, cells: Sequence[Cell]) -> dict[str, Any]:
        return {"config": config.model_dump(mode="json")}

    def samples(self, config: QuizConfig, cell: Cell) -> list[Key]:
        return [(cell.name, index) for index in range(config.samples)]

    def together(self, subject: Subject, config: QuizConfig, samples: Any) -> Any:
        return [samples]

    def ask(self, subject: Subject, config: QuizConfig, asked: Asked[Cell]) -> Generator[Row, None, None]:
        self.asked.append([(str(name), int(index)) for _, (name, index) in asked.samples])
        for cell, (name, index) in reversed(asked.samples):
            if reason := self.act(name, index):
                asked.leave_out(cell, reason)
                continue
            subject.model(input_ids=torch.zeros(1, 8, dtype=torch.long))
            yield {"cell": name, "index": index, "right": index}

    def gather(self, subject: Subject, config: QuizConfig, measured: Measured[Cell, list[Row]]) -> QuizResult:
        cells = [
            Answer(cell=cell.name, right=[row["right"] for row in rows]) for cell, rows in measured.pairs
        ]
        return QuizResult(cells=cells, skipped_cells=measured.skipped, rows=len(measured.rows))

    def section(self, run: RunResults) -> Section:
        return Section(self.name, "", "", str(self.results(run)))


WHOLE: dict[str, Any] = {
    "cells": [{"cell": "8 tokens", "right": [0, 1, 2]}, {"cell": "16 tokens", "right": [0, 1, 2]}],
    "skipped_cells": {
        "no tokens": "there is nothing to read",
        "64 tokens": "64 tokens is more than the model takes (max_position_embeddings = 32)",
    },
    "rows": 6,
}


def at(cell: str, index: int, act: BaseException | str) -> Callable[[str, int], str | None]:
    def found(name: str, number: int) -> str | None:
        if (name, number) != (cell, index):
            return None
        if isinstance(act, BaseException):
            raise act
        return act

    return found


def test_samples_of_several_cells_are_answered_together_and_come_back_in_their_order(gpt2: Any) -> None:
    quiz = Quiz()
    assert quiz.run(tiny.subject(gpt2), QuizConfig()) == WHOLE
    assert list(WHOLE["skipped_cells"]) == ["no tokens", "64 tokens"]
    assert [len(part) for part in quiz.asked] == [2, 2, 2]
    assert quiz.asked[1] == [("8 tokens", 2), ("16 tokens", 0)]


def test_a_cell_that_is_left_out_midway_stops_no_other(gpt2: Any) -> None:
    quiz = Quiz(at("16 tokens", 0, "nothing fits"))
    values = quiz.run(tiny.subject(gpt2), QuizConfig(lengths=[8, 16]))
    assert [cell["cell"] for cell in values["cells"]] == ["8 tokens"]
    assert values["skipped_cells"]["16 tokens"] == "nothing fits"
    assert quiz.asked[-1] == [("8 tokens", 2), ("16 tokens", 0)], "its other samples are not asked"


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("no room\nfor it"), ValueError("no room")])
def test_an_error_leaves_out_what_is_not_finished(gpt2: Any, error: Exception) -> None:
    """Of 16 tokens two samples of three were answered before the error."""
    quiz = Quiz(at("16 tokens", 1, error))
    values = quiz.run(tiny.subject(gpt2), QuizConfig(lengths=[8, 16]))
    assert values["cells"] == WHOLE["cells"][:1] and values["skipped_cells"]["16 tokens"] == "no room"
    assert values["rows"] == 5, "what was answered of it may be shown"
    # Asked together with 8 tokens, but answered before them.
    last = Quiz(at("8 tokens", 0, error)).run(tiny.subject(gpt2), QuizConfig(lengths=[8, 16], samples=1))
    assert last["cells"] == [{"cell": "16 tokens", "right": [0]}] and "8 tokens" in last["skipped_cells"]
    with pytest.raises(RecordError):
        Quiz(at("8 tokens", 0, RecordError("there is no file"))).run(tiny.subject(gpt2), QuizConfig())


@pytest.mark.parametrize("place", [("8 tokens", 0), ("8 tokens", 2), ("16 tokens", 2)])
def test_an_interrupted_evaluation_goes_on_with_the_next_sample(
    gpt2: Any, tmp_path: Path, place: tuple[str, int]
) -> None:
    subject, quiz = tiny.subject(gpt2, folder=tmp_path), Quiz()
    with pytest.raises(KeyboardInterrupt):
        Quiz(at(*place, KeyboardInterrupt())).run(subject, QuizConfig())
    kept = len((tmp_path / "quiz.partial.jsonl").read_text().splitlines()) - 1
    assert quiz.run(subject, QuizConfig()) == WHOLE
    assert sum(map(len, quiz.asked)) == 6 - kept
    rows = (tmp_path / "quiz.jsonl").read_text().splitlines()[1:]
    assert len(rows) == 6 and not (tmp_path / "quiz.partial.jsonl").exists()
    # A finished file is gone on with only where the evaluation says so.
    quiz.asked.clear()
    assert quiz.run(subject, QuizConfig()) == WHOLE and sum(map(len, quiz.asked)) == 6
    Quiz.reopened = True
    try:
        quiz.asked.clear()
        assert quiz.run(subject, QuizConfig()) == WHOLE and not quiz.asked
    finally:
        Quiz.reopened = False


def test_a_sample_whose_logits_were_no_numbers_is_not_kept(tmp_path: Path) -> None:
    model = tiny.ours(tie_word_embeddings=False)
    with torch.no_grad():
        model.lm_head.weight.fill_(3e38)
    found = run_of(Quiz(), tiny.subject(model, folder=tmp_path), QuizConfig())
    assert "NaN or infinity" in found["skipped"]
    assert len((tmp_path / "quiz.jsonl").read_text().splitlines()) == 1


def test_nothing_that_can_be_measured_leaves_no_file(gpt2: Any, tmp_path: Path) -> None:
    values = Quiz().run(tiny.subject(gpt2, folder=tmp_path), QuizConfig(lengths=[64]))
    assert values["skipped"].startswith("64 tokens is more than the model takes")
    assert values["skipped"].endswith("; there is nothing to read") and not list(tmp_path.iterdir())


def test_how_many_samples_are_done_is_said(gpt2: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    monkeypatch.setattr(loop, "SILENCE", 0.0)
    Quiz().run(tiny.subject(gpt2), QuizConfig(), said.append)
    assert said == [f"quiz: {n} of 6 parts, next {8 if n < 3 else 16} tokens" for n in range(6)]


def run_with(values: dict[str, Any]) -> RunResults:
    seeds = {0: SeedResults(results={"lengths": {"values": values}})}
    return RunResults({"name": "x"}, {}, [ArmResults("a", "a", "softmax", seeds)])


def test_results_are_read_back_as_what_they_are() -> None:
    values = {"cells": [{"length": 8, "double": 16, "gone": 1}], "skipped_cells": {}, "older": True}
    (found,) = Lengths().results(run_with(values))["a"].values()
    assert found == LengthsResult(cells=[Value(length=8, double=16.0)], skipped_cells={})
    assert not Lengths().results(run_with(Skipped("why").values()))
    assert run_with(Skipped("why").values()).skipped("lengths") == ["a: why"]
    said = r"a, seed 0: results/lengths\.json holds no values of lengths \(cells\.0\.double: field required\)"
    with pytest.raises(ValueError, match=said):
        Lengths().section(run_with({"cells": [{"length": 8}], "skipped_cells": {}}))

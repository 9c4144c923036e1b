"""Contextual hallucination: does a model say things that its document does not support? A judge decides.

The protocol of the Differential Transformer paper (arXiv 2410.05258, section 3.6), after Lookback Lens: a document is
summarised, or a question about it answered, greedily; a judge reads document, right answer and proposed answer and says
whether the proposed one is free of hallucination. 100 samples a set, the share that is free. Judges are pluggable
(`evals.judges`); shares by different judges do not compare.

Answers (`hallucination_answers.jsonl`) and verdicts (`hallucination_verdicts.jsonl`) are kept apart: a run goes on
after the last of either, and another judge reads the answers that are there. What a judge does not decide, and an empty
answer, is neither right nor wrong; it is counted and shown.
"""

from __future__ import annotations

from collections.abc import Generator, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from pydantic import Field, field_validator
from transformers import PreTrainedTokenizerFast

from clearhead.analysis.sections import Section
from clearhead.data.cache import digest_json
from clearhead.evals.asking.answering import (
    FormName,
    Ids,
    answer_log,
    encode,
    fast_tokenizer,
    form_of,
    frame,
    greedy_answers,
)
from clearhead.evals.asking.haystack import specials
from clearhead.evals.asking.records import RecordError, UnreachableError
from clearhead.evals.asking.sample_log import Key, Row, SampleLog
from clearhead.evals.cells import Asked, Cell, LeftOut, Measured, SampleEvaluation, grouped
from clearhead.evals.evaluation import EvaluationConfig
from clearhead.evals.faithfulness.hallucination.data import FIELDS, Item, ItemSet, known_source, open_set
from clearhead.evals.faithfulness.hallucination.section import (
    HallucinationResult,
    JudgedAnswer,
    JudgedSet,
    hallucination_section,
)
from clearhead.evals.faithfulness.judges.base import Case, Judge, JudgeError, Judgement, Task, make_judge
from clearhead.evals.reasons import Unmeasured, reason_of
from clearhead.evals.subject import Subject
from clearhead.registry import resolve
from clearhead.runs.results import RunResults
from clearhead.runs.secrets import secret_in

ANSWERS, VERDICTS = "hallucination_answers", "hallucination_verdicts"
KEYS = ("set", "index")
SHOWN = 2
INTRO = {
    "summarisation": "Read the document and summarise it.\n\nDocument:\n",
    "qa": "Read the document and answer the question.\n\nDocument:\n",
}
OUTRO = {
    "summarisation": "\n\nSummarise the document in a few sentences. Say only what the document says.",
    "qa": "\n\nQuestion: {question}\nAnswer as briefly as possible. Say only what the document says.",
}
CUE = {"summarisation": "\n\nSummary:", "qa": "\nAnswer:"}
NEW_TOKENS: dict[Task, int] = {"summarisation": 128, "qa": 32}


class HallucinationConfig(EvaluationConfig):
    """data: files of JSON lines with document, reference and, for questions, question; or xsum, cnn_dm, multi_news,
    qasper, hotpotqa, 2wikimqa, which are read from the Hugging Face hub.

    judge: openai, local, nli or a third party's; judge_options: see there. fields: names of fields of files, where
        they are others than document, reference, question.
    samples: of each set. form: chat or completion (default: chat where the tokenizer has a template).
    max_new_tokens: of an answer (default: 128 for a summary, 32 for an answer).
    """

    data: list[str] = Field(min_length=1)
    judge: str
    judge_options: dict[str, Any] = Field(default={})
    fields: dict[str, str] = Field(default={})
    samples: int = Field(default=100, ge=1)
    form: FormName | None = None
    max_new_tokens: int | None = Field(default=None, ge=1)
    batch_tokens: int = Field(default=8192, ge=1)
    save_prompts: bool = True
    seed: int = 9000

    @field_validator("judge")
    @classmethod
    def _known(cls, value: str) -> str:
        resolve("judges", value)
        return value

    @field_validator("judge_options")
    @classmethod
    def _told_no_secrets(cls, value: dict[str, Any]) -> dict[str, Any]:
        if found := secret_in(value):
            raise ValueError(
                f"{found}, and options are written down with the results: put the key into an environment variable and "
                "its name into judge_options.api_key_env"
            )
        return value

    @field_validator("fields")
    @classmethod
    def _named(cls, value: dict[str, str]) -> dict[str, str]:
        if not set(value) <= set(FIELDS):
            raise ValueError(f"only {', '.join(FIELDS)} can be renamed")
        return value

    def new_tokens(self, task: Task) -> int:
        return self.max_new_tokens or NEW_TOKENS[task]


@dataclass(frozen=True, kw_only=True)
class JudgedSets:
    """What all items share."""

    judge: Judge[Any]
    sets: Sequence[ItemSet]
    tokenizer: PreTrainedTokenizerFast
    form: FormName


@dataclass(frozen=True, kw_only=True)
class AskedItem(Cell):
    """One item of a set, and its prompt. No prompt is ever cut."""

    part: ItemSet
    item: Item
    text: str
    ids: Ids
    asking: JudgedSets


class Hallucination(SampleEvaluation[HallucinationConfig, HallucinationResult, AskedItem]):
    name = "hallucination"
    Config = HallucinationConfig
    Result = HallucinationResult
    keys = KEYS
    at_once = 32
    # Another judge reads the answers that are there.
    reopened = True

    def file(self) -> str:
        return ANSWERS

    def cells(self, subject: Subject, config: HallucinationConfig) -> Iterator[AskedItem | LeftOut]:
        """Raises RecordError for a file and JudgeError for a judge that cannot be used: no property of the model."""
        judge = make_judge(config.judge, config.judge_options)
        for source in config.data:
            known_source(source)
        judge.prepare()
        sets, skipped = read_sets(config)
        yield from skipped
        if not sets:
            return
        tokenizer = fast_tokenizer(subject)
        asking = JudgedSets(
            judge=judge, sets=sets, tokenizer=tokenizer, form=asked_in(tokenizer, config.form)
        )
        for part in sets:
            for item in part.items:
                text = prompt_of(tokenizer, asking.form, part.task, item)
                ids = encode(tokenizer, text)
                yield AskedItem(
                    name=f"{part.name}, record {item.index}",
                    length=len(ids) + config.new_tokens(part.task),
                    part=part,
                    item=item,
                    text=text,
                    ids=ids,
                    asking=asking,
                )

    def about(
        self, subject: Subject, config: HallucinationConfig, cells: Sequence[AskedItem]
    ) -> dict[str, Any]:
        left = {"data", "judge", "judge_options", "fields", "batch_tokens"}
        asking = cells[0].asking
        return {
            "config": config.model_dump(mode="json", exclude=left),
            "form": asking.form,
            "data": digest_of(asking.sets),
        }

    def samples(self, config: HallucinationConfig, cell: AskedItem) -> list[Key]:
        return [(cell.part.name, cell.item.index)]

    def together(
        self, subject: Subject, config: HallucinationConfig, samples: Sequence[tuple[AskedItem, Key]]
    ) -> Iterable[Sequence[tuple[AskedItem, Key]]]:
        return grouped(samples, lambda cell, key: cell.part.name).values()

    def ask(
        self, subject: Subject, config: HallucinationConfig, asked: Asked[AskedItem]
    ) -> Generator[Row, None, None]:
        cells = asked.cells
        said = greedy_answers(
            subject,
            [cell.ids for cell in cells],
            config.new_tokens(cells[0].part.task),
            one_line=cells[0].asking.form == "completion",
            batch_tokens=config.batch_tokens,
        )
        for place, answer in said:
            cell = cells[place]
            yield {
                "set": cell.part.name,
                "index": cell.item.index,
                "tokens": len(cell.ids),
                "answer": answer,
                "prompt": cell.text if config.save_prompts else None,
            }

    def gather(
        self, subject: Subject, config: HallucinationConfig, measured: Measured[AskedItem, list[Row]]
    ) -> HallucinationResult:
        """Has the answers judged, which are all on disk by now. Raises JudgeError as `cells`."""
        cells = [cell for cell, _ in measured.pairs]
        asking = cells[0].asking
        about = self.about(subject, config, cells)
        about |= {"judge": config.judge, "options": config.judge_options}
        answers = measured.rows
        with answer_log(subject, VERDICTS, about, KEYS, measured.progress, reopened=True) as verdicts:
            pass_judgement(asking.judge, asking.sets, answers, verdicts)
        texts = {(row["set"], row["index"]): row for row in answers}
        rows = [{**row, **texts[row["set"], row["index"]]} for row in verdicts.records]
        return HallucinationResult(
            sets=[
                summary(part, rows) for part in asking.sets if any(row["set"] == part.name for row in rows)
            ],
            judge=asking.judge.described(),
            usage=asking.judge.usage(),
            spent=asking.judge.spent(),
            skipped_items=measured.skipped,
            examples=[JudgedAnswer.model_validate(row) for row in shown(rows)],
            form=asking.form,
            n=len(rows),
        )

    def remark(self, values: dict[str, Any]) -> str:
        """What the judge has cost."""
        return f"judge: {values['spent']}" if values.get("spent") else ""

    def section(self, run: RunResults) -> Section:
        title, question = "Hallucination", "Does it say what its document does not support?"
        values = self.results(run)
        if not values:
            return self.missing(run, title, question)
        return hallucination_section(self.name, title, question, run, values)


def digest_of(sets: Sequence[ItemSet]) -> str:
    """Tells what is asked from anything else."""
    return digest_json(
        [[s.name, s.task, [[i.document, i.question, *i.references] for i in s.items]] for s in sets]
    )


def read_sets(config: HallucinationConfig) -> tuple[list[ItemSet], list[LeftOut]]:
    """All sets, and why some are not there. Raises RecordError for files that cannot be told apart."""
    skipped: list[LeftOut] = []
    sets: list[ItemSet] = []
    for source in dict.fromkeys(config.data):
        try:
            sets.append(open_set(source, config.fields, config.samples, config.seed))
        except UnreachableError as error:
            skipped.append(LeftOut(source, reason_of(error)))
    names = [part.name for part in sets]
    if len(set(names)) < len(names):
        raise RecordError(f"two files of {', '.join(config.data)} have one name: rename one of them")
    return sets, skipped


def asked_in(tokenizer: PreTrainedTokenizerFast, wanted: FormName | None) -> FormName:
    """The form of the prompts. Raises Unmeasured for a tokenizer that cannot ask in it."""
    try:
        form = form_of(tokenizer, wanted)
        frame(tokenizer, form, INTRO["qa"], OUTRO["qa"], CUE["qa"])
    except ValueError as error:
        raise Unmeasured(reason_of(error)) from error
    return form


def prompt_of(tokenizer: PreTrainedTokenizerFast, form: FormName, task: Task, item: Item) -> str:
    """The whole prompt as text, bos and template spelled out."""
    document, question = item.document, item.question
    for token in specials(tokenizer):
        document, question = document.replace(token, ""), question.replace(token, "")
    before, after = frame(tokenizer, form, INTRO[task], OUTRO[task].format(question=question), CUE[task])
    return before + document + after


def pass_judgement(
    judge: Judge[Any], sets: Sequence[ItemSet], answers: Sequence[dict[str, Any]], log: SampleLog
) -> None:
    """Has all answers judged that `log` does not have. What is judged is kept, whatever ends the run."""
    items = {(part.name, item.index): (part.task, item) for part in sets for item in part.items}
    todo: list[tuple[dict[str, Any], Case]] = []
    for row in answers:
        key = (row["set"], row["index"])
        if log.has(key):
            continue
        task, item = items[key]
        if row["answer"].strip():
            todo.append(
                (row, Case(task, item.document, item.references, row["answer"].strip(), item.question))
            )
        else:
            log.add({"set": row["set"], "index": row["index"], "free": None, "why": "the answer is empty"})
    try:
        for place, verdict in judge.judge([case for _, case in todo]):
            log.add(line(todo[place][0], verdict))
    except JudgeError as error:
        kept = f"{len(log.records)} of {len(answers)} answers are judged and kept; the same command goes on."
        raise JudgeError(f"{str(error).rstrip('.')}. {kept} {judge.spent()}".strip()) from error


def line(row: dict[str, Any], verdict: Judgement) -> dict[str, Any]:
    return {"set": row["set"], "index": row["index"], "free": verdict.faithful, "why": verdict.reason}


def summary(part: ItemSet, rows: Sequence[dict[str, Any]]) -> JudgedSet:
    """What the report needs of a set."""
    own = sorted((row for row in rows if row["set"] == part.name), key=lambda row: int(row["index"]))
    return JudgedSet(
        name=part.name,
        task=part.task,
        n=len(own),
        index=[row["index"] for row in own],
        free=[row["free"] for row in own],
        empty=sum(not row["answer"].strip() for row in own),
        tokens=sum(row["tokens"] for row in own) / len(own),
    )


def shown(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """A few answers that are free of hallucination, that are not, and that were not decided."""
    kept = []
    for wanted in (True, False, None):
        same = [row for row in rows if row["free"] is wanted]
        same.sort(key=lambda row: (row["index"], row["set"]))
        kept += [{key: row[key] for key in row if key != "prompt"} for row in same[:SHOWN]]
    return kept

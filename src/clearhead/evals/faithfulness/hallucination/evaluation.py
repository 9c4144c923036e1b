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

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pydantic import Field, field_validator
from transformers import PreTrainedTokenizerFast

from clearhead.analysis.sections import Section
from clearhead.data.cache import digest_json
from clearhead.evals.asking.answering import (
    FormName,
    answer_log,
    encode,
    fast_tokenizer,
    form_of,
    frame,
    greedy_answers,
)
from clearhead.evals.asking.haystack import specials
from clearhead.evals.asking.records import RecordError, UnreachableError
from clearhead.evals.asking.sample_log import SampleLog
from clearhead.evals.evaluation import Evaluation, EvaluationConfig, Say
from clearhead.evals.faithfulness.hallucination.data import FIELDS, Item, ItemSet, known_source, open_set
from clearhead.evals.faithfulness.hallucination.section import (
    HallucinationResult,
    JudgedAnswer,
    JudgedSet,
    hallucination_section,
)
from clearhead.evals.faithfulness.judges.base import Case, Judge, JudgeError, Judgement, Task, make_judge
from clearhead.evals.reasons import Unmeasured, all_of, reason_of
from clearhead.evals.subject import Subject
from clearhead.registry import resolve
from clearhead.runs.results import RunResults
from clearhead.runs.secrets import secret_in

ANSWERS, VERDICTS = "hallucination_answers", "hallucination_verdicts"
KEYS = ("set", "index")
SHOWN = 2
AT_ONCE = 32
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


class Hallucination(Evaluation[HallucinationConfig, HallucinationResult]):
    name = "hallucination"
    Config = HallucinationConfig
    Result = HallucinationResult

    def result(
        self, subject: Subject, config: HallucinationConfig, progress: Say | None = None
    ) -> HallucinationResult:
        """Raises RecordError for a file and JudgeError for a judge that cannot be used: no property of the model."""
        judge = make_judge(config.judge, config.judge_options)
        for source in config.data:
            known_source(source)
        judge.prepare()
        sets, skipped = read_sets(config)
        if not sets:
            raise Unmeasured(all_of(skipped))
        tokenizer = fast_tokenizer(subject)
        form = asked_in(tokenizer, config.form)
        left = {"data", "judge", "judge_options", "fields", "batch_tokens"}
        options = config.model_dump(mode="json", exclude=left)
        about: dict[str, Any] = {"config": options, "form": form, "data": digest_of(sets)}
        judged = {**about, "judge": config.judge, "options": config.judge_options}
        reopen(subject.folder, ANSWERS)
        with answer_log(subject, ANSWERS, about, KEYS, progress) as answers:
            for part in sets:
                skipped |= ask(subject, tokenizer, config, form, part, answers)
            reopen(subject.folder, VERDICTS)
            with answer_log(subject, VERDICTS, judged, KEYS, progress) as verdicts:
                pass_judgement(judge, sets, answers.records, verdicts)
        texts = {(row["set"], row["index"]): row for row in answers.records}
        rows = [{**row, **texts[row["set"], row["index"]]} for row in verdicts.records]
        if not rows:
            raise Unmeasured(all_of(skipped))
        return HallucinationResult(
            sets=[summary(part, rows) for part in sets if any(row["set"] == part.name for row in rows)],
            judge=judge.described(),
            usage=judge.usage(),
            spent=judge.spent(),
            skipped_items=skipped,
            examples=[JudgedAnswer.model_validate(row) for row in shown(rows)],
            form=form,
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


def read_sets(config: HallucinationConfig) -> tuple[list[ItemSet], dict[str, str]]:
    """All sets, and why some are not there. Raises RecordError for files that cannot be told apart."""
    skipped: dict[str, str] = {}
    sets: list[ItemSet] = []
    for source in dict.fromkeys(config.data):
        try:
            sets.append(open_set(source, config.fields, config.samples, config.seed))
        except UnreachableError as error:
            skipped[source] = reason_of(error)
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


def reopen(folder: Path | None, name: str) -> None:
    """Reopens a finished file of answers or verdicts; the log checks that they are of the same run."""
    if folder is None:
        return
    whole, partial = folder / f"{name}.jsonl", folder / f"{name}.partial.jsonl"
    if whole.exists() and not partial.exists():
        shutil.copyfile(whole, partial)


def ask(
    subject: Subject,
    tokenizer: PreTrainedTokenizerFast,
    config: HallucinationConfig,
    form: FormName,
    part: ItemSet,
    log: SampleLog,
) -> dict[str, str]:
    """Answers all items that `log` does not have; why items were left out. No prompt is ever cut."""
    new, skipped = config.new_tokens(part.task), {}
    todo = []
    for item in part.items:
        if log.has((part.name, item.index)):
            continue
        text = prompt_of(tokenizer, form, part.task, item)
        ids = encode(tokenizer, text)
        if reason := subject.too_long(len(ids) + new):
            skipped[f"{part.name}, record {item.index}"] = reason
        else:
            todo.append((item, text, ids))
    for start in range(0, len(todo), AT_ONCE):
        some = todo[start : start + AT_ONCE]
        said = greedy_answers(
            subject,
            [ids for _, _, ids in some],
            new,
            one_line=form == "completion",
            batch_tokens=config.batch_tokens,
        )
        for row, answer in said:
            item, text, ids = some[row]
            log.add(
                {
                    "set": part.name,
                    "index": item.index,
                    "tokens": len(ids),
                    "answer": answer,
                    "prompt": text if config.save_prompts else None,
                }
            )
    return skipped


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

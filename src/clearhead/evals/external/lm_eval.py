"""Standard benchmarks by lm-evaluation-harness, in the same report: `clearhead evaluate MODEL --lm-eval hellaswag`.

Prompts, few-shot examples and scores are the harness's own (Gao et al., lm-evaluation-harness); nothing is changed but
the model that it is handed. Its tasks load their data from the Hugging Face hub; one that cannot be run is left out
with the reason, and an interrupted evaluation goes on with the next one. The retrieval tasks of this library are among
them (`clearhead.lm_eval_tasks`).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from pydantic import Field

from clearhead.analysis.by_length import Values
from clearhead.analysis.comparison import compare
from clearhead.analysis.sections import Section, SectionTable
from clearhead.analysis.statistics import decimal
from clearhead.data.writing import Unwritten
from clearhead.evals.cells import Cell, CellEvaluation, Measured
from clearhead.evals.evaluation import EvaluationConfig, EvaluationResult
from clearhead.evals.external.harness import harness_model
from clearhead.evals.reasons import Unmeasured
from clearhead.evals.subject import Subject
from clearhead.extras import need
from clearhead.runs.results import RunResults

INCLUDE_PATH = Path(__file__).parents[2] / "lm_eval_tasks"
MAIN = ("acc_norm", "acc", "exact", "exact_match", "f1")
"""What decides where a task has several numbers, first one first."""
LOWER = ("perplexity", "word_perplexity", "byte_perplexity", "bits_per_byte")


class LmEvalConfig(EvaluationConfig):
    """tasks: names of tasks or groups of the harness. num_fewshot: examples before a question (default: the task's).

    limit: questions of each task (default: all). metadata: for tasks that take it, as the harness's `--metadata`.
    """

    tasks: list[str] = Field(min_length=1)
    num_fewshot: int | None = Field(default=None, ge=0)
    limit: int | None = Field(default=None, ge=1)
    batch_size: int = Field(default=8, ge=1)
    metadata: dict[str, Any] = Field(default={})


class Metric(EvaluationResult):
    value: float
    stderr: float | None


class TaskResult(EvaluationResult):
    """samples: what each question counts of the `main` number; none where a question has no part of it."""

    metrics: dict[str, Metric]
    main: str
    samples: list[float]
    n: int
    version: str
    num_fewshot: int | str | None


class LmEvalResult(EvaluationResult):
    tasks: dict[str, TaskResult]
    skipped_tasks: dict[str, str]
    n: int


class NamedTasks(EvaluationResult):
    """What a name of the harness stands for. left_out: why tasks and numbers of it are not there."""

    tasks: dict[str, TaskResult]
    left_out: dict[str, str]


@dataclass(frozen=True, kw_only=True)
class HarnessTask(Cell):
    """A task or group of the harness by its name, which asks `model` and finds its data by `manager`."""

    model: Any
    manager: Any


class LmEval(CellEvaluation[LmEvalConfig, LmEvalResult, HarnessTask, NamedTasks]):
    """Every name of the harness is a cell without a length: prompts, lengths and batches are the harness's own."""

    name = "lm_eval"
    Config = LmEvalConfig
    Result = LmEvalResult
    Value = NamedTasks

    def cells(self, subject: Subject, config: LmEvalConfig) -> Iterator[HarnessTask]:
        """Raises ValueError without lm-eval: that is no property of the model."""
        need("running the standard benchmarks", "lm-eval")
        from lm_eval.tasks import TaskManager

        tokenizer: Any = subject.tokenizer
        metadata = {"pretrained": tokenizer.name_or_path or None, **config.metadata}
        manager = TaskManager(include_path=str(INCLUDE_PATH), metadata=metadata)
        model = harness_model(subject.model, tokenizer, config.batch_size)
        for name in dict.fromkeys(config.tasks):
            yield HarnessTask(name=name, model=model, manager=manager)

    def text(self, subject: Subject, config: LmEvalConfig) -> None:
        """The harness has its own data."""

    def about(self, subject: Subject, config: LmEvalConfig, cells: Sequence[HarnessTask]) -> dict[str, Any]:
        return {**super().about(subject, config, cells), "lm_eval": version("lm_eval")}

    def measure(self, subject: Subject, config: LmEvalConfig, cell: HarnessTask) -> NamedTasks:
        tasks, left_out = measured(cell.model, cell.name, cell.manager, config)
        return NamedTasks(tasks=tasks, left_out=left_out)

    def is_reason(self, error: Exception) -> bool:
        # Whatever goes wrong with one task (no network, no such name) must not lose the others.
        return not isinstance(error, Unwritten)

    def why(self, skipped: Mapping[str, str]) -> str:
        return "; ".join(f"{name}: {why}" for name, why in skipped.items())

    def gather(
        self, subject: Subject, config: LmEvalConfig, measured: Measured[HarnessTask, NamedTasks]
    ) -> LmEvalResult:
        found = {cell.name: value for cell, value in measured.pairs}
        tasks: dict[str, TaskResult] = {}
        skipped: dict[str, str] = {}
        for name in dict.fromkeys(config.tasks):
            if name in found:
                tasks |= found[name].tasks
                skipped |= found[name].left_out
            else:
                skipped[name] = measured.skipped[name]
        if not tasks:
            raise Unmeasured(self.why(skipped))
        return LmEvalResult(tasks=tasks, skipped_tasks=skipped, n=sum(task.n for task in tasks.values()))

    def section(self, run: RunResults) -> Section:
        title, question = "Standard benchmarks", "How does it do on standard benchmarks?"
        values = self.results(run)
        if not values:
            return self.missing(run, title, question)
        return lm_eval_section(self.name, title, question, run, values)


def measured(
    model: Any, name: str, manager: Any, config: LmEvalConfig
) -> tuple[dict[str, TaskResult], dict[str, str]]:
    """The tasks that `name` stands for: their numbers, and what each question counts of the main one.

    Beside them what is left out, with the reason: numbers that are NaN or infinite, and tasks that have no other.
    """
    from lm_eval import simple_evaluate

    done = simple_evaluate(
        model=model,
        tasks=[name],
        num_fewshot=config.num_fewshot,
        limit=config.limit,
        task_manager=manager,
        log_samples=True,
        bootstrap_iters=1000,
    )
    found: dict[str, TaskResult] = {}
    odd: dict[str, str] = {}
    for task, rows in done["samples"].items():
        metrics: dict[str, Metric] = {}
        for key, value in done["results"][task].items():
            metric, comma, kind = key.partition(",")
            if comma and not metric.endswith("_stderr") and isinstance(value, int | float):
                error = done["results"][task].get(f"{metric}_stderr,{kind}")
                shown = metric if kind == "none" else f"{metric}, {kind}"
                if not math.isfinite(value):
                    odd[f"{task}, {shown}"] = f"it is {value}"
                    continue
                known = isinstance(error, float) and math.isfinite(error)
                metrics[shown] = Metric(value=float(value), stderr=error if known else None)
        if not metrics:
            odd.setdefault(task, "the harness gave no number for it")
            continue
        main = next((metric for metric in MAIN if metric in metrics), next(iter(metrics)))
        marks = [row[main] for row in sorted(rows, key=lambda row: int(row["doc_id"])) if main in row]
        found[task] = TaskResult(
            metrics=metrics,
            main=main,
            # Of some numbers (a perplexity over all documents) a question has no part.
            samples=[float(mark) for mark in marks]
            if all(isinstance(m, int | float) and math.isfinite(m) for m in marks)
            else [],
            n=len(rows),
            version=str(done["versions"].get(task)),
            num_fewshot=done["n-shot"].get(task),
        )
    return found, odd


def lm_eval_section(
    name: str, title: str, question: str, run: RunResults, values: Values[LmEvalResult]
) -> Section:
    """A row a task and number; every task compared question by question."""
    every = [value for seeds in values.values() for value in seeds.values()]
    tasks = list(dict.fromkeys(task for value in every for task in value.tasks))
    sentences = []
    result = None
    rows: list[list[str | None]] = []
    for task in tasks:
        known = [value.tasks[task] for value in every if task in value.tasks]
        if samples := samples_of(values, task):
            main = known[0].main
            result = compare(samples, "lower" if main in LOWER else "higher")
            sentences.append(f"{task} ({main}): {result.sentence()}")
        for metric in dict.fromkeys(metric for one in known for metric in one.metrics):
            cells = [shown(list(seeds.values()), task, metric) for seeds in values.values()]
            rows.append([f"{task}, {metric}", *cells])
    one = len(sentences) == 1 and result is not None
    skipped = [f"{task}: {why}." for value in every for task, why in value.skipped_tasks.items()]
    return Section(
        name,
        title,
        question,
        " ".join(sentences) or "Measured; see the table.",
        measure=f"{tasks[0]}" if one else "",
        headlines=result.headlines() if one and result is not None else [],
        tables=[SectionTable("Numbers of lm-evaluation-harness", ["task and number", *values], rows)],
        notes=[
            "Value ± the harness's standard error, mean over seeds; n questions. Sentences: bootstrap over questions "
            "or Student's t over seeds, the wider; differences are paired by question. Prompts and rules are the "
            "harness's.",
            *dict.fromkeys(skipped),
            *run.skipped(name),
        ],
    )


def samples_of(values: Values[LmEvalResult], task: str) -> dict[str, dict[int, list[float]]]:
    """Arm -> seed -> what each question counts, of those models that answered all of them."""
    found = {
        arm: {
            seed: v.tasks[task].samples
            for seed, v in seeds.items()
            if task in v.tasks and v.tasks[task].samples
        }
        for arm, seeds in values.items()
    }
    sizes = {len(row) for seeds in found.values() for row in seeds.values()}
    return {arm: seeds for arm, seeds in found.items() if seeds} if len(sizes) == 1 else {}


def shown(seeds: Sequence[LmEvalResult], task: str, metric: str) -> str | None:
    """`0.412 ± 0.010 (n=500)`, or None where it is missing."""
    parts = [v.tasks[task] for v in seeds if task in v.tasks and metric in v.tasks[task].metrics]
    if not parts:
        return None
    numbers = [part.metrics[metric] for part in parts]
    value = sum(number.value for number in numbers) / len(numbers)
    error = numbers[0].stderr
    spread = "" if error is None else f" ± {decimal(error, 3)}"
    return f"{decimal(value, 3)}{spread} (n={parts[0].n})"

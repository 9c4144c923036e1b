"""`task = "classify"`: an encoder that gives texts their labels."""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from clearhead.data.examples import ExampleRows, ExampleSet, TextPair, label_counts, read_examples
from clearhead.data.packing import Example
from clearhead.models.tasks.base import Task, TrainingRows
from clearhead.runs.recipe import Job, Recipe
from clearhead.runs.recipe_data import ExampleOptions

if TYPE_CHECKING:
    from clearhead.data.prepare import PreparedData


def example_set(source: Recipe | Job) -> ExampleSet:
    """The examples of a recipe or a job, read once. Raises CorpusError where they cannot be used."""
    told = source.data.examples
    assert told.source is not None
    return _read(told, source.task == "classify", _state(told.source))


def _state(source: str) -> tuple[int, int] | None:
    """Time of the last change and size: a file that was written anew is read anew."""
    try:
        found = Path(source).expanduser().stat()
    except OSError:
        return None
    return found.st_mtime_ns, found.st_size


@lru_cache(maxsize=2)
def _read(told: ExampleOptions, labelled: bool, state: tuple[int, int] | None) -> ExampleSet:
    assert told.source is not None
    return read_examples(
        told.source,
        text_field=told.text_field,
        target_field=told.target_field,
        folds=told.folds,
        seed=told.seed,
        labelled=labelled,
    )


def fold_of(job: Job) -> int:
    """The fold that a job holds out."""
    return job.seed % job.data.examples.folds


class ClassifyTask(Task):
    """One label a text."""

    name = "classify"
    model_type = "clearhead_encoder"
    auto = "AutoModelForSequenceClassification"
    what = "an encoder, which gives texts their labels"
    decides = ("classifier.",)

    def rows(self, job: Job, data: PreparedData) -> TrainingRows:
        found = example_set(job)
        rows = job.train.steps * (job.train.batch_tokens // job.data.length)
        return self._rows(job, data, found, found.learned(fold_of(job)), rows)

    def held_out(self, job: Job, data: PreparedData, count: int) -> list[Example]:
        found = example_set(job)
        pairs = found.held_out(fold_of(job))[:count]
        rows = self._rows(job, data, found, pairs, len(pairs))
        return [rows.row(i) for i in range(len(pairs))]

    def _rows(
        self, job: Job, data: PreparedData, found: ExampleSet, pairs: list[TextPair], rows: int
    ) -> ExampleRows:
        return ExampleRows(data.tokenizer, pairs, job.data.length, rows, job.seed, labels=found.labels)

    def labels(self, job: Job) -> tuple[str, ...]:
        return example_set(job).labels

    def also(self, source: Recipe | Job) -> dict[str, Any]:
        labels = example_set(source).labels
        return {
            "id2label": dict(enumerate(labels)),
            "label2id": {label: number for number, label in enumerate(labels)},
        }

    def targets(self, labels: Tensor) -> Tensor:
        return labels[:, None]

    def losses(self, logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        return super().losses(logits[:, None], labels)

    def bytes_per_label(self, job: Job, data: PreparedData) -> float | None:
        return None

    def describe(self, job: Job, data: PreparedData) -> str:
        found = example_set(job)
        return f"{described(job, found)}; {len(found.labels)} labels: {label_counts(found)}"


def described(job: Job, found: ExampleSet) -> str:
    """How many examples there are, what was left out, and how often a run reads each."""
    folds = job.data.examples.folds
    learned = len(found.learned(fold_of(job)))
    rows = job.train.steps * (job.train.batch_tokens // job.data.length)
    often = f"each {rows / learned:.2g} times"
    parts = [f"{len(found.pairs):,} examples in {folds} folds, of which a seed learns {learned:,}, {often}"]
    if found.repeated:
        parts.append(f"{found.repeated:,} repeated lines left out")
    if found.ambiguous:
        parts.append(f"{found.ambiguous:,} lines left out whose text has several labels or targets")
    return "; ".join(parts)

"""Accuracy and macro F1 on the examples that a training held out.

A seed holds out one fold, the same for every arm; folds have one size, so that several seeds are several folds of the
data. Macro F1 is the mean over labels of the harmonic mean of precision and recall, every label alike however rare; a
label that neither stands there nor is given is left out.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from clearhead.analysis.comparison import compare
from clearhead.analysis.sections import Section, SectionTable
from clearhead.analysis.statistics import student_interval
from clearhead.evals.asking.running import batches, inference
from clearhead.evals.cells import LengthEvaluation, TextLength
from clearhead.evals.evaluation import EvaluationConfig, EvaluationResult
from clearhead.evals.reasons import Unmeasured
from clearhead.evals.subject import Subject
from clearhead.models.tasks import collate
from clearhead.runs.results import RunResults


class ClassificationConfig(EvaluationConfig):
    """max_examples: held-out ones at most."""

    max_examples: int = Field(default=10_000, ge=1)
    batch: int = Field(default=64, ge=1)


class ClassificationResult(EvaluationResult):
    """truth, given: numbers of labels, an example each. chance: always naming the commonest label."""

    accuracy: float
    macro_f1: float
    chance: float
    n: int
    labels: list[str]
    truth: list[int]
    given: list[int]


class Classification(LengthEvaluation[ClassificationConfig, ClassificationResult]):
    name = "classification"
    tasks = ("classify",)
    Config = ClassificationConfig
    Result = ClassificationResult

    def length(self, subject: Subject, config: ClassificationConfig) -> int:
        return subject.training_length or 256

    def measure(
        self, subject: Subject, config: ClassificationConfig, cell: TextLength
    ) -> ClassificationResult:
        rows = subject.held_out(config.max_examples)
        if not rows:
            raise Unmeasured("the training held out no examples")
        truth, given = [], []
        with inference(subject.model, length=cell.tokens):
            for span in batches(len(rows), config.batch):
                batch = collate([rows[i] for i in span])
                truth += batch.pop("labels").tolist()
                inputs = {key: value.to(subject.device) for key, value in batch.items()}
                given += subject.model(**inputs).logits.argmax(-1).tolist()
        return ClassificationResult(
            accuracy=float(np.equal(truth, given).mean()),
            macro_f1=macro_f1(np.array(truth), np.array(given)),
            chance=float(np.bincount(truth).max() / len(truth)),
            n=len(truth),
            labels=list(subject.labels),
            truth=truth,
            given=given,
        )

    def section(self, run: RunResults) -> Section:
        title, question = "Classification", "Does it give unseen texts the right labels?"
        values = self.results(run)
        if not values:
            return self.missing(run, title, question)
        samples = {
            arm: {s: np.equal(v.truth, v.given).astype(float) for s, v in seeds.items()}
            for arm, seeds in values.items()
        }
        result = compare(samples, "higher", proportions=True, digits=3)
        rows = []
        for arm, seeds in values.items():
            scores = [v.macro_f1 for v in seeds.values()]
            spread = student_interval(scores)
            shown = "" if spread is None else f" ({spread[0]:.3f} to {spread[1]:.3f})"
            each = ", ".join(f"{v.accuracy:.3f}" for v in seeds.values())
            rows.append([arm, result.estimates[arm].text(3), f"{np.mean(scores):.3f}{shown}", each])
        first = next(iter(next(iter(values.values())).values()))
        chance = np.mean([v.chance for v in next(iter(values.values())).values()])
        return Section(
            self.name,
            title,
            question,
            result.sentence(),
            measure="accuracy ↑",
            digits=3,
            headlines=result.headlines(),
            tables=[
                SectionTable(
                    "Accuracy and macro F1 on held-out examples",
                    ["arm", "accuracy", "macro F1", "accuracy by seed"],
                    rows,
                )
            ],
            notes=[
                f"{first.n} held-out examples a seed, {len(first.labels)} labels; naming the commonest label is right "
                f"for {chance:.3f}. A seed holds out one fold, the same for every arm. Intervals of the accuracy: "
                "Wilson or Student's t over seeds, whichever is wider; of macro F1: Student's t over seeds. "
                "Differences are paired by example and seed.",
                *run.skipped(self.name),
            ],
        )


def macro_f1(truth: NDArray[np.int64], given: NDArray[np.int64]) -> float:
    """The mean of 2 · hits / (true + given) over the labels that occur in either."""
    scores = [
        2
        * int(((truth == label) & (given == label)).sum())
        / (int((truth == label).sum()) + int((given == label).sum()))
        for label in np.union1d(truth, given)
    ]
    return float(np.mean(scores))

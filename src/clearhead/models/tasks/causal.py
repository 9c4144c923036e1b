"""`task = "causal"`: a decoder that predicts the next token of text, retrieval documents and pairs."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch.nn.functional as F
from torch import Tensor

from clearhead.data.packing import IGNORED, Example
from clearhead.models.tasks.base import Task, TrainingRows
from clearhead.runs.recipe import Job
from clearhead.runs.rows import check_rows, describe_text, training_rows

if TYPE_CHECKING:
    from clearhead.data.prepare import PreparedData


class CausalTask(Task):
    """Next-token prediction."""

    name = "causal"
    model_type = "clearhead"
    auto = "AutoModelForCausalLM"
    what = "a causal language model"
    forward = {"use_cache": False}  # noqa: RUF012

    def rows(self, job: Job, data: PreparedData) -> TrainingRows:
        return training_rows(job, data)

    def held_out(self, job: Job, data: PreparedData, count: int) -> list[Example]:
        raise NotImplementedError("the probe of causal language models asks for needles: train.probe")

    def targets(self, labels: Tensor) -> Tensor:
        # The labels are shifted, not the logits: cutting the last logit off would copy all of them.
        return F.pad(labels[:, 1:], (0, 1), value=IGNORED)

    def check(self, job: Job, data: PreparedData) -> None:
        check_rows(job, data)

    def describe(self, job: Job, data: PreparedData) -> str:
        return describe_text(job, data)

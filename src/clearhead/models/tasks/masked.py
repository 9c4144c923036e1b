"""`task = "masked"`: an encoder that says which tokens of a text were hidden."""

from __future__ import annotations

from typing import TYPE_CHECKING

from clearhead.data.masking import MaskedRows, Masker
from clearhead.data.packing import Example, pack_text
from clearhead.models.tasks.base import Task, TrainingRows
from clearhead.runs.recipe import Job
from clearhead.runs.rows import describe_text

if TYPE_CHECKING:
    from clearhead.data.prepare import PreparedData

# Held-out text is hidden the same way under every seed.
HELD_OUT_SEED = 0


class MaskedTask(Task):
    """Masked language modelling (Devlin et al. 2019), of packed rows without padding."""

    name = "masked"
    model_type = "clearhead_encoder"
    auto = "AutoModelForMaskedLM"
    what = "an encoder, which predicts hidden tokens"

    def rows(self, job: Job, data: PreparedData) -> TrainingRows:
        rows = job.train.steps * (job.train.batch_tokens // job.data.length)
        text = pack_text(data.train, job.data.length, job.seed, document_masks=job.data.document_masks)
        return MaskedRows(text, masker_of(job, data), rows, job.seed)

    def held_out(self, job: Job, data: PreparedData, count: int) -> list[Example]:
        text = pack_text(
            data.validation, job.data.length, HELD_OUT_SEED, document_masks=job.data.document_masks
        )
        rows = MaskedRows(text, masker_of(job, data), len(text), HELD_OUT_SEED)
        return [rows[i] for i in range(min(count, len(rows)))]

    def describe(self, job: Job, data: PreparedData) -> str:
        masks = job.data.masks
        what = "words" if masks.whole_words else "tokens"
        return f"{describe_text(job, data)}; {masks.share:.0%} of the {what} are hidden, anew in every epoch"


def masker_of(job: Job, data: PreparedData) -> Masker:
    """What hides the tokens of the job's rows."""
    return Masker(data.tokenizer, job.data.masks.share, whole_words=job.data.masks.whole_words)

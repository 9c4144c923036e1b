"""`task = "seq2seq"`: an encoder-decoder that writes a target for a source, or what is missing in a text."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from clearhead.data.examples import ExampleRows, ExampleSet
from clearhead.data.gaps import GapRows
from clearhead.data.masking import text_bytes
from clearhead.data.packing import IGNORED, Example, pack_text
from clearhead.models.start import with_defaults
from clearhead.models.tasks.base import FIXED, Task, TrainingRows
from clearhead.models.tasks.causal import CausalTask
from clearhead.models.tasks.classify import described, example_set, fold_of
from clearhead.models.tasks.masked import HELD_OUT_SEED, MaskedTask
from clearhead.runs.recipe import RESERVED_MODEL_KEYS, Job
from clearhead.runs.rows import describe_text

if TYPE_CHECKING:
    from clearhead.data.prepare import PreparedData

# Target rows that tell how many bytes a label stands for.
SEEN = 256
# What an arm says for the whole model, a side may say for itself.
OF_A_SIDE = ("attention", "attention_options")


class Seq2SeqTask(Task):
    """A target for a source: pairs of examples, or without them text with a gap and what stood there."""

    name = "seq2seq"
    model_type = "clearhead_seq2seq"
    auto = "AutoModelForSeq2SeqLM"
    what = "an encoder-decoder, which writes a target for a source"
    forward = {"use_cache": False}  # noqa: RUF012

    @property
    def keys(self) -> list[str]:
        from clearhead.models.seq2seq_config import FLAT

        return list(dict.fromkeys([*super().keys, *sorted(FLAT - {*RESERVED_MODEL_KEYS, *FIXED})]))

    def tables(self, model: Mapping[str, Any]) -> Iterator[tuple[str, Mapping[str, Any], list[str]]]:
        yield from super().tables(model)
        for side, task in (("encoder", MaskedTask()), ("decoder", CausalTask())):
            # Anything else than a table is the configuration's to refuse.
            if isinstance(model.get(side), Mapping):
                yield f"model.{side}", model[side], [*task.keys, *OF_A_SIDE]

    def complete(self, model: Mapping[str, Any], length: int) -> dict[str, Any]:
        return with_defaults(model, length)

    def rows(self, job: Job, data: PreparedData) -> TrainingRows:
        rows = job.train.steps * (job.train.batch_tokens // job.data.length)
        if job.data.examples.source is None:
            text = pack_text(data.train, job.data.length, job.seed, document_masks=False)
            return GapRows(data.tokenizer, text, job.data.examples.target_length, rows, job.seed)
        found = example_set(job)
        return self._pairs(job, data, found, rows, held_out=False)

    def held_out(self, job: Job, data: PreparedData, count: int) -> list[Example]:
        if job.data.examples.source is None:
            text = pack_text(data.validation, job.data.length, HELD_OUT_SEED, document_masks=False)
            gaps = GapRows(data.tokenizer, text, job.data.examples.target_length, len(text), HELD_OUT_SEED)
            return [gaps[i] for i in range(min(count, len(gaps)))]
        found = example_set(job)
        rows = self._pairs(job, data, found, count, held_out=True)
        return [rows.row(i) for i in range(min(count, len(rows.texts)))]

    def _pairs(
        self, job: Job, data: PreparedData, found: ExampleSet, rows: int, *, held_out: bool
    ) -> ExampleRows:
        fold = fold_of(job)
        pairs = found.held_out(fold) if held_out else found.learned(fold)
        length, target = job.data.length, job.data.examples.target_length
        return ExampleRows(data.tokenizer, pairs, length, rows, job.seed, target_length=target)

    def bytes_per_label(self, job: Job, data: PreparedData) -> float | None:
        rows = self.rows(job, data)
        some = [rows[i]["labels"] for i in range(min(SEEN, len(rows)))]
        written = [row[row != IGNORED].tolist() for row in some]
        return sum(text_bytes(data.tokenizer, written)) / sum(map(len, written))

    def describe(self, job: Job, data: PreparedData) -> str:
        if job.data.examples.source is None:
            most = job.data.examples.target_length - 1
            return f"{describe_text(job, data)}; a gap of up to {most} tokens in every row is its target"
        return described(job, example_set(job))

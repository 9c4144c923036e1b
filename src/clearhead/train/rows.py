"""What a job trains on: the same rows in the same order for every arm with the same seed."""

from clearhead.data.packing import pack_text
from clearhead.data.prepare import DataSpec, PreparedData
from clearhead.data.retrieval import Mixture, NeedleRange
from clearhead.train.recipe import Job, Recipe


def data_spec(source: Recipe | Job) -> DataSpec:
    """What `clearhead.data.prepare` has to make ready; it does not depend on arm and seed."""
    return DataSpec(
        source=source.corpus.source,
        text_field=source.corpus.text_field,
        max_bytes=source.corpus.max_bytes,
        validation_fraction=source.corpus.validation_fraction,
        tokenizer=source.tokenizer.source,
        vocab_size=source.tokenizer.vocab_size,
        seed=source.corpus.seed,
    )


def training_rows(job: Job, data: PreparedData) -> Mixture:
    """The rows of the whole budget; row i is a pure function of the job's seed and i."""
    length = job.data.length
    return Mixture(
        text=pack_text(data.train, length, job.seed, document_masks=job.data.document_masks),
        haystack=data.train,
        tokenizer=data.tokenizer,
        length=length,
        rows=job.train.steps * (job.train.batch_tokens // length),
        seed=job.seed,
        needle_share=job.data.needle_share,
        pair_share=job.data.pair_share,
        pairs_first=job.data.pairs_first,
        needles=needle_range(job),
        document_masks=job.data.document_masks,
    )


def needle_range(job: Job) -> NeedleRange:
    """The retrieval documents of the job's mixture."""
    return NeedleRange(**job.data.needles.model_dump())

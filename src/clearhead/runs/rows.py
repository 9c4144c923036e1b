"""What a job trains on: the same rows in the same order for every arm with the same seed."""

from pathlib import Path

from clearhead.data.instructions import InstructionRows, read_conversations
from clearhead.data.needles import Split, needle_document, sentences, vocabulary
from clearhead.data.packing import pack_text
from clearhead.data.prepare import DataSpec, PreparedData
from clearhead.data.retrieval import Mixture, NeedleRange, pair_document
from clearhead.data.spec import TextSource
from clearhead.data.streamed import MixedRows
from clearhead.runs.recipe import Job, Recipe

# Evaluations that write needles with the tokenizer's own words.
NEED_WORDS = {"needles", "allocation"}
KINDS_WITHIN = 1000
# Passes over the same text beyond which a person is told.
REPEATED = 4.0
FEWEST_HELD_OUT = 2


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
        mask=source.task == "masked" or (source.task == "seq2seq" and source.data.examples.source is None),
        sources=tuple(
            TextSource(one.source, one.weight, one.text_field or source.corpus.text_field, one.max_bytes)
            for one in source.corpus.sources or ()
        ),
        tokenized=source.corpus.tokenized,
    )


def training_rows(job: Job, data: PreparedData) -> Mixture | InstructionRows:
    """The rows of the whole budget; row i is a pure function of the job's seed and i."""
    length = job.data.length
    if job.data.instructions is not None:
        rows = job.train.steps * (job.train.batch_tokens // length)
        conversations = read_conversations(Path(job.data.instructions), data.tokenizer)
        return InstructionRows(conversations, length, rows, job.seed, int(data.tokenizer.pad_token_id))
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


def text_rows(job: Job, data: PreparedData) -> float:
    """How many of the job's rows are text."""
    rows = training_rows(job, data)
    after = len(rows) - round(len(rows) * job.data.pairs_first)
    return max(0.0, 1.0 - job.data.needle_share - job.data.pair_share) * after


def epochs_by_source(job: Job, data: PreparedData) -> dict[str, float]:
    """How many times the job's text rows go through each source."""
    text = pack_text(data.train, job.data.length, job.seed, document_masks=False)
    count = text_rows(job, data)
    return text.epochs(count) if isinstance(text, MixedRows) else {job.corpus.source: count / len(text)}


def describe_text(job: Job, data: PreparedData) -> str:
    """What is trained on and held out, and how often the text is read, in a sentence."""
    epochs = epochs_by_source(job, data)
    most = max(epochs.values())
    parts = [f"training text: {len(data.train):,} documents, {data.train.num_tokens:,} tokens"]
    parts.append(f"held out: {len(data.validation):,}, {data.validation.num_tokens:,} tokens")
    if most > 0 and len(epochs) > 1:
        each = ", ".join(f"{name} {times:.2g} times" for name, times in epochs.items())
        parts.append(f"a run reads {each}")
    elif most > 0:
        parts.append(f"a run reads the text {most:.2g} times")
    if most > REPEATED:
        parts.append("so often that it is learned by heart: more text or fewer train.tokens would say more")
    return "; ".join(parts)


def check_validation(job: Job, data: PreparedData) -> None:
    """ValueError unless enough documents are held out to say anything about others."""
    found = len(data.validation)
    if found < FEWEST_HELD_OUT:
        raise ValueError(
            f"corpus.validation_fraction {job.corpus.validation_fraction:g} of {found + len(data.train):,} documents "
            f"in {job.corpus.named!r} holds out {found}, and nothing can be said from one: raise it, or give more or "
            "smaller files (at least 2 held out, better 20)"
        )


def needle_range(job: Job) -> NeedleRange:
    """The retrieval documents of the job's mixture."""
    return NeedleRange(**job.data.needles.model_dump())


def check_rows(job: Job, data: PreparedData) -> None:
    """Raise ValueError, which names the key, for what would end a training at some row or an evaluation after it."""
    rows = training_rows(job, data)
    if isinstance(rows, InstructionRows):
        return
    mixed = job.data.needle_share + job.data.pair_share + job.data.pairs_first > 0
    if not (mixed or job.train.probe_every or set(job.evaluate.suites) & NEED_WORDS):
        return
    vocabulary(data.tokenizer)
    needles = needle_range(job)
    length = min(job.data.length, job.data.needles.lengths[1])
    seen: tuple[Split, ...] = ("train", "validation") if job.train.probe_every else ("train",)
    if job.data.needle_share > 0 or job.train.probe_every:
        largest = needles.fitting(length, job.data.needles.needles[1], data.tokenizer)
        for split in seen:
            needle_document(
                largest, seed=job.seed, index=0, haystack=data.train, split=split, tokenizer=data.tokenizer
            )
    found: set[str] = set()
    for index in range(min(len(rows), KINDS_WITHIN)):
        kind = rows.kind(index)
        if kind != "text" and kind not in found:
            found.add(kind)
            rows[index]
    if job.data.pair_share + job.data.pairs_first > 0:
        most = needles.spec(job.data.length, job.data.needles.pairs[1], job.data.needles.pairs[1])
        sentence, question = sentences(most, data.tokenizer)
        room = (job.data.length - 1) // (sentence.size(most) + question.size(most))
        if room < 1:
            raise ValueError(
                f"data.length: a row of {job.data.length} tokens has no room for one pair; lengthen it"
            )
        fitting = min(room, job.data.needles.pairs[1])
        pair_document(
            needles.spec(job.data.length, fitting, fitting),
            seed=job.seed,
            index=0,
            split="train",
            tokenizer=data.tokenizer,
        )

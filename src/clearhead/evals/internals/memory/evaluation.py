"""Quality against memory: how small may the key-value cache of a prompt be before a model gets worse?

A prompt is read in full; then its cache is held in fewer bits (`QuantisedCache`: 8, 4 or 3) or with fewer of its tokens
(`EvictingCache`: kvpress's policies, by budgets), and what follows is read behind that:

* *bits per byte* of the rest of documents, `length` tokens long, of which the first `prompt` are the prompt;
* *needle accuracy*: facts of the kind that training used, asked at the end of a prompt of `length` tokens; the
  question is a part of the prompt, the answer is what follows. Exact match.

Bytes are what the caches really hold behind the prompt, over a cache of all its tokens in 16 bits. Every difference
is from the same model with its whole cache, paired by document.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import Field
from torch import Tensor, nn

from clearhead.analysis.sections import Section
from clearhead.data.needles import NeedleSample
from clearhead.evals.asking.losses import finite
from clearhead.evals.asking.needle_documents import documents as needle_documents
from clearhead.evals.asking.needle_documents import marks, too_short
from clearhead.evals.asking.running import batches, inference
from clearhead.evals.asking.texts import Openings, openings, utf8_size
from clearhead.evals.cells import Cell, CellEvaluation, LeftOut, Measured
from clearhead.evals.evaluation import EvaluationConfig
from clearhead.evals.internals.memory.results import MemoryCell, MemoryResult
from clearhead.evals.internals.memory.section import section
from clearhead.evals.reasons import Unmeasured, all_of, reason_of, unless
from clearhead.evals.subject import Subject
from clearhead.runs.results import RunResults

if TYPE_CHECKING:
    from transformers import Cache

Budget = Annotated[float, Field(gt=0, lt=1)]
Policy = Literal["streaming_llm", "snapkv", "observed_attention", "tova", "knorm", "random"]
LONGEST = 2048
FEWEST_DOCUMENTS = 4


class MemoryConfig(EvaluationConfig):
    """bits: of keys and values, 8, 4 or 3 (3 are held in the bytes of 4). budgets: parts of a prompt's tokens that
    policies keep.

    policies: see `clearhead.models.eviction`. ranks: what attention is to them in differential models, |A1 − λ A2|
        ("effective") or A1 ("signal"); others have one.
    length: tokens of a text (default: the training length, at most 2,048). prompt: of them, the prompt's (default:
        three quarters).
    documents: texts for bits per byte. needles: facts in a document, one of which is asked, for each kind of question.
    samples: needle documents of each kind (0 = not asked). newest: tokens that stay numbers at least.
    window, sinks: numbers of the policies.
    """

    bits: list[Literal[3, 4, 8]] = Field(default=[8, 4, 3])
    budgets: list[Budget] = Field(default=[0.5, 0.25, 0.125])
    policies: list[Policy] = Field(
        default=["streaming_llm", "snapkv", "observed_attention", "tova", "knorm", "random"]
    )
    ranks: list[Literal["effective", "signal"]] = Field(default=["effective", "signal"])
    length: int | None = Field(default=None, ge=8)
    prompt: int | None = Field(default=None, ge=1)
    documents: int = Field(default=32, ge=1)
    needles: list[Annotated[int, Field(ge=1)]] = Field(default=[1, 4])
    samples: int = Field(default=50, ge=0)
    newest: int = Field(default=1, ge=1)
    window: int = Field(default=16, ge=1)
    sinks: int = Field(default=4, ge=0)
    batch_tokens: int = Field(default=4096, ge=1)
    seed: int = 6000


@dataclass(frozen=True, kw_only=True)
class CacheForm(Cell):
    """The same texts and questions behind one cache."""

    bits: int | None = None
    policy: str | None = None
    rank: str | None = None
    budget: float | None = None
    prompt: int
    read: Openings
    needles: dict[str, list[NeedleSample]]


class Memory(CellEvaluation[MemoryConfig, MemoryResult, CacheForm, MemoryCell]):
    name = "memory"
    Config = MemoryConfig
    Result = MemoryResult
    Value = MemoryCell

    def cells(self, subject: Subject, config: MemoryConfig) -> Iterator[CacheForm | LeftOut]:
        length = config.length or min(subject.training_length or 256, LONGEST)
        unless(subject.too_long(length))
        prompt = config.prompt or length * 3 // 4
        if prompt >= length:
            raise Unmeasured(
                f"a prompt of {prompt} tokens leaves nothing of {length}; lower {self.name}.prompt"
            )
        if not config.bits and not (config.budgets and config.policies):
            raise Unmeasured("no cache is smaller than the whole; give bits, or budgets and policies")
        read = openings(
            subject, length, config.documents, config.seed, f"{self.name}.length", least=FEWEST_DOCUMENTS
        )
        common: dict[str, Any] = {"prompt": prompt, "read": read, "needles": {}}
        for count in config.needles if config.samples else []:
            spec = subject.needles.spec(length, count, 1)
            try:
                unless(too_short(spec, subject.tokenizer))
                common["needles"][str(count)] = needle_documents(
                    subject, spec, None, config.samples, config.seed
                )
            except ValueError as error:
                yield LeftOut(f"needles, {count}", reason_of(error))
        yield CacheForm(name="whole", **common)
        for bits in config.bits:
            yield CacheForm(name=f"{bits} bits", bits=bits, **common)
        for policy in config.policies:
            for rank in config.ranks if _looks(subject, policy) else config.ranks[:1]:
                for budget in config.budgets:
                    shown = f"{policy} by signal" if rank == "signal" else policy
                    name = f"{shown}, {budget:.4g} of the tokens"
                    yield CacheForm(name=name, policy=policy, rank=rank, budget=budget, **common)

    def measure(self, subject: Subject, config: MemoryConfig, cell: CacheForm) -> MemoryCell:
        def make() -> Cache:
            return cache_of(subject, config, cell)

        nats, shares = losses(subject, cell.read.rows, cell.prompt, make, config.batch_tokens)
        if cell.bits is not None and min(shares) > 0.99:
            raise ValueError(
                f"nothing of a prompt of {cell.prompt} tokens becomes codes, which are made of blocks of 128 tokens"
            )
        correct = {kind: marks(exact_match(subject, samples, make)) for kind, samples in cell.needles.items()}
        return MemoryCell(
            form=cell.name,
            bits=cell.bits,
            policy=cell.policy,
            rank=cell.rank,
            budget=cell.budget,
            bytes=round(float(np.mean(shares)), 5),
            nats=[round(float(value), 4) for value in nats],
            correct=correct,
        )

    def gather(
        self, subject: Subject, config: MemoryConfig, measured: Measured[CacheForm, MemoryCell]
    ) -> MemoryResult:
        cells = measured.values
        if len(cells) < 2 or cells[0].form != "whole":
            raise Unmeasured(all_of(measured.skipped))
        read, prompt = measured.pairs[0][0].read, measured.pairs[0][0].prompt
        return MemoryResult(
            cells=cells,
            skipped_cells=measured.skipped,
            length=read.rows.shape[1],
            prompt=prompt,
            n=len(read.rows),
            documents=read.documents,
            bytes=[utf8_size(subject.tokenizer, row[prompt:]) for row in read.rows],
        )

    def section(self, run: RunResults) -> Section:
        return section(self.name, run, self.results(run), self.missing)


def cache_of(subject: Subject, config: MemoryConfig, cell: CacheForm) -> Cache:
    """A new cache of a cell's form; ValueError where the model cannot have it."""
    from transformers import DynamicCache

    from clearhead.models import EvictingCache, QuantisedCache

    own = subject.model.config
    if cell.bits is not None:
        return QuantisedCache(own, cell.bits, config.newest)
    if cell.policy is not None:
        assert cell.budget is not None and cell.rank is not None
        numbers = {"window": config.window, "sinks": config.sinks, "seed": config.seed}
        return EvictingCache(own, cell.policy, cell.budget, rank=cell.rank, **numbers)
    return DynamicCache(config=own)


def losses(
    subject: Subject, rows: NDArray[np.int64], prompt: int, make: Callable[[], Cache], batch_tokens: int
) -> tuple[NDArray[np.float64], list[float]]:
    """NLL in nats of what follows the first `prompt` tokens of each row, and each batch's bytes over 16 bits of all."""
    found: list[NDArray[np.float64]] = []
    shares: list[float] = []
    with inference(subject.model, length=rows.shape[1]):
        for span in batches(len(rows), batch_tokens // rows.shape[1]):
            ids = torch.from_numpy(rows[span.start : span.stop]).to(subject.device)
            cache = make()
            logits = _behind(subject, cache, ids, prompt, shares)
            targets = ids[:, prompt:]
            lost = nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none")
            found.append(lost.view_as(targets).double().sum(1).cpu().numpy())
    return finite(np.concatenate(found)), shares


def exact_match(subject: Subject, samples: list[NeedleSample], make: Callable[[], Cache]) -> list[bool]:
    """Whether greedy decoding behind each sample's prompt, its first question included, would give the answer."""
    hits = []
    with inference(subject.model, length=len(samples[0].input_ids)):
        for sample in samples:
            answer = sample.answers[0]
            ids = torch.from_numpy(sample.input_ids[: answer.stop])[None].to(subject.device)
            guess = _behind(subject, make(), ids, answer.start, []).argmax(-1)[0].cpu().numpy()
            hits.append(bool((guess == sample.input_ids[answer]).all()))
    return hits


def _behind(subject: Subject, cache: Cache, ids: Tensor, prompt: int, shares: list[float]) -> Tensor:
    """(B, L − prompt, V): logits of the tokens from `prompt` on, all but the first read behind the prompt's cache."""
    # The last token of the prompt is the first query that meets the smaller cache, as when something is generated.
    before, rest = ids[:, : prompt - 1], ids[:, prompt - 1 : -1]
    if before.shape[1]:
        subject.model(input_ids=before, past_key_values=cache, use_cache=True, logits_to_keep=1)
        shares.append(_share(cache, before.shape[1]))
    logits: Tensor = subject.model(input_ids=rest, past_key_values=cache, use_cache=True).logits
    return logits if logits.dtype == torch.float64 else logits.float()


def _share(cache: Cache, tokens: int) -> float:
    """Bytes that a cache holds behind `tokens` tokens, over all of them in 16 bits; numbers count as 16 bits."""
    held = whole = 0.0
    for layer in cache.layers:
        keys, values = getattr(layer, "keys", None), getattr(layer, "values", None)
        assert isinstance(keys, Tensor) and isinstance(values, Tensor)
        each = keys.shape[0] * keys.shape[1] * (keys.shape[3] + values.shape[3])
        codes = getattr(layer, "held", None)
        held += 2 * each * keys.shape[2] + (0 if codes is None else codes.nbytes)
        window = getattr(layer, "sliding_window", None) or getattr(layer, "window", None)
        whole += 2 * each * (tokens if window is None else min(tokens, window - 1))
    return held / whole


def _looks(subject: Subject, policy: str) -> bool:
    """Whether `rank` makes a difference: to policies that look at attention, of models that have a difference."""
    attention = str(getattr(subject.model.config, "attention", ""))
    return policy in ("snapkv", "observed_attention", "tova") and attention.startswith("differential")

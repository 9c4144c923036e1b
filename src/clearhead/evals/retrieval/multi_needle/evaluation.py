"""Multi-needle retrieval: can a model find several numbers in one long text, by the published protocol?

N needles are hidden and R of them asked for; the first asked one stands at 0, 25, 50, 75 or 100 % of the text, the
others anywhere (Differential Transformer, arXiv 2410.05258, section 3.4, after LWM and Gemini 1.5). (N, R) = (1, 1),
(2, 2), (4, 2), (6, 2) at one length, and N = 8, R = 1 over length x depth. Sentences, forms and rule:
`multi_needle.prompts`.

What is hidden and asked is drawn before anything is tokenized: the same cities, numbers and places at every length and
depth and for every model. Of each length there are a few haystacks; their samples share all tokens up to their first
needle, which are read once where that is exact (`asking.decoding`).

Every answer is a line of `results/multi_needle.jsonl`; an interrupted grid goes on after the last one.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from pydantic import Field, field_validator
from transformers import GenerationConfig, PreTrainedTokenizerFast

from clearhead.analysis.sections import Section
from clearhead.evals.asking.answering import answer_log, encode, fast_tokenizer
from clearhead.evals.asking.decoding import AskedPrompt, answer, found, greedy
from clearhead.evals.asking.haystack import Haystack, digest, make_haystack, read_documents, store_documents
from clearhead.evals.asking.running import inference
from clearhead.evals.asking.sample_log import SampleLog
from clearhead.evals.evaluation import Evaluation, EvaluationConfig, Say
from clearhead.evals.probing.rescaling import rescaled
from clearhead.evals.reasons import Unmeasured, all_of, reason_of
from clearhead.evals.retrieval.multi_needle.prompts import (
    CITIES,
    FormName,
    NeedlesPrompt,
    any_needle,
    draw_facts,
    expected,
    multi_needle_prompt,
    surroundings,
)
from clearhead.evals.retrieval.multi_needle.section import (
    FoundNeedles,
    MultiNeedleCell,
    MultiNeedleResult,
    multi_needle_section,
)
from clearhead.evals.subject import Subject
from clearhead.runs.results import RunResults

PER_NUMBER = 64
"""New tokens that an answer may have for each number that is asked."""
Kind = tuple[int, int, int]
"""(needles, asked, length)."""
KEYS = ("needles", "asked", "length", "depth", "index")
SHOWN = 2
"""Right answers, and wrong ones, that the report shows."""


class MultiNeedleConfig(EvaluationConfig):
    """pairs: (needles, asked) at `length` (default: the training length, at most 4096).

    grid: (needles, asked) over `lengths` (default: 1/8, 1/4, 1/2 and all of the training length).
    depths: of the first asked needle, in 0..1. samples: per (pair, length, depth).
    haystacks: different texts per length, among which the samples are divided.
    form: chat, completion or message (default: chat where the tokenizer has a template).
    haystack: files, directories or corpora to hide the needles in, instead of the evaluation's documents.
    max_new_tokens: of an answer (default: 64 for each number asked).
    share_prefix: read what prompts begin with only once where that is exact. It changes no answer but by rounding.
    save_prompts: keep the whole prompts beside the answers. rope_parameters: see `clearhead.evals.probing.rescaling`.
    """

    pairs: list[tuple[int, int]] = Field(default=[(1, 1), (2, 2), (4, 2), (6, 2)])
    length: int | None = Field(default=None, ge=1)
    grid: tuple[int, int] | None = (8, 1)
    lengths: list[int] | None = Field(default=None, min_length=1)
    depths: list[float] = Field(default=[0.0, 0.25, 0.5, 0.75, 1.0], min_length=1)
    samples: int = Field(default=50, ge=1)
    haystacks: int = Field(default=5, ge=1)
    form: FormName | None = None
    haystack: list[str] | None = Field(default=None, min_length=1)
    max_new_tokens: int | None = Field(default=None, ge=1)
    batch_tokens: int = Field(default=8192, ge=1)
    share_prefix: bool = True
    save_prompts: bool = True
    rope_parameters: dict[str, Any] | None = None
    seed: int = 5000

    @field_validator("pairs", "grid")
    @classmethod
    def _askable(cls, value: Any) -> Any:
        for needles, asked in [] if value is None else value if isinstance(value, list) else [value]:
            if not 1 <= asked <= needles <= len(CITIES):
                raise ValueError(f"asks {asked} of {needles} needles; 1 <= asked <= needles <= {len(CITIES)}")
        return value

    @field_validator("depths")
    @classmethod
    def _within(cls, value: list[float]) -> list[float]:
        if not all(0 <= depth <= 1 for depth in value):
            raise ValueError("a depth lies between 0 and 1")
        return value

    def kinds(self, trained: int | None) -> tuple[list[Kind], list[Kind]]:
        """(needles, asked, length) of the pairs and of the grid."""
        whole = trained or 4096
        length = self.length or min(whole, 4096)
        pairs = [(needles, asked, length) for needles, asked in dict.fromkeys(self.pairs)]
        if self.grid is None:
            return pairs, []
        needles, asked = self.grid
        lengths = self.lengths or [whole // part for part in (8, 4, 2, 1)]
        return pairs, [(needles, asked, length) for length in sorted(set(lengths))]

    def cells(self, trained: int | None) -> list[AskedNeedlesCell]:
        """All cells, the pairs' first; none twice."""
        pairs, grid = self.kinds(trained)
        return [
            AskedNeedlesCell(*kind, depth) for kind in dict.fromkeys([*pairs, *grid]) for depth in self.depths
        ]

    def new_tokens(self, asked: int) -> int:
        return self.max_new_tokens or PER_NUMBER * asked


@dataclass(frozen=True)
class AskedNeedlesCell:
    """What one number of the results is over."""

    needles: int
    asked: int
    length: int
    depth: float

    def name(self) -> str:
        return f"{self.needles} needles, {self.asked} asked, {self.length} tokens, depth {self.depth:.0%}"


class MultiNeedle(Evaluation[MultiNeedleConfig, MultiNeedleResult]):
    name = "multi_needle"
    Config = MultiNeedleConfig
    Result = MultiNeedleResult

    def result(
        self, subject: Subject, config: MultiNeedleConfig, progress: Say | None = None
    ) -> MultiNeedleResult:
        tokenizer = fast_tokenizer(subject)
        form = config.form or ("completion" if tokenizer.chat_template is None else "chat")
        cells = config.cells(subject.training_length)
        try:
            surroundings(form, tokenizer, CITIES[:1])
        except ValueError as error:
            raise Unmeasured(reason_of(error)) from error
        documents = documents_of(subject, tokenizer, config.haystack)
        asking = Asking(subject, tokenizer, config, form, documents)
        skipped: dict[str, str] = {}
        about = {"config": config.model_dump(mode="json"), "text": digest(documents)}
        with answer_log(subject, self.name, about, KEYS, progress) as log:
            # A scaling that grows is settled for prompt and answer, and no other cell may have a say in that.
            apart = subject.adapter.frequencies_depend_on_length(config.rope_parameters)
            kinds = {cell: (cell.length, config.new_tokens(cell.asked) if apart else 0) for cell in cells}
            for kind in dict.fromkeys(kinds.values()):
                todo = [cell for cell in cells if kinds[cell] == kind]
                for cell, reason in measure(asking, todo, log).items():
                    skipped[cell.name()] = reason
            values = [self._values(cell, log.records) for cell in cells if cell.name() not in skipped]
            examples = [FoundNeedles.model_validate(row) for row in shown(log.records)]
        if not values:
            raise Unmeasured(all_of(skipped))
        pairs, grid = config.kinds(subject.training_length)
        return MultiNeedleResult(
            cells=values,
            pairs=pairs,
            grid=grid,
            skipped_cells=skipped,
            examples=examples,
            form=form,
            bos=tokenizer.bos_token,
            haystacks=config.haystacks,
            training_length=subject.training_length,
            rope_parameters=config.rope_parameters,
            n=sum(cell.n for cell in values),
        )

    def _values(self, cell: AskedNeedlesCell, records: Sequence[dict[str, Any]]) -> MultiNeedleCell:
        rows = sorted(
            (
                r
                for r in records
                if AskedNeedlesCell(r["needles"], r["asked"], r["length"], r["depth"]) == cell
            ),
            key=lambda r: int(r["index"]),
        )
        return MultiNeedleCell(
            needles=cell.needles,
            asked=cell.asked,
            length=cell.length,
            depth=cell.depth,
            n=len(rows),
            found=[sum(row["found"]) for row in rows],
            any_needle=any_needle(cell.needles, cell.asked),
        )

    def section(self, run: RunResults) -> Section:
        title, question = "Multi-needle retrieval", "Does it find several facts in a long text?"
        values = self.results(run)
        if not values:
            return self.missing(run, title, question)
        return multi_needle_section(self.name, title, question, run, values)


def documents_of(
    subject: Subject, tokenizer: PreTrainedTokenizerFast, sources: Sequence[str] | None
) -> list[str]:
    """The texts to hide needles in; as they are in `sources`, else what the evaluation's documents decode to."""
    return read_documents(sources) if sources else store_documents(subject.documents, tokenizer)


def haystack_rng(seed: int, draw: int) -> np.random.Generator:
    """Draws haystack `draw`; the same text at every length, more or less of it."""
    return np.random.default_rng([seed, draw, 1])


def cell_prompts(
    tokenizer: PreTrainedTokenizerFast,
    haystack: Haystack,
    cell: AskedNeedlesCell,
    indices: Sequence[int],
    seed: int,
    form: FormName,
) -> Iterator[NeedlesPrompt]:
    """The prompts of a cell's samples `indices` in one haystack: a function of the arguments alone."""
    for index in indices:
        facts = draw_facts(seed, index, cell.needles, cell.asked)
        yield multi_needle_prompt(tokenizer, haystack, facts, cell.length, cell.depth, form)


@dataclass(frozen=True, eq=False)
class Asking:
    """Who is asked, and how."""

    subject: Subject
    tokenizer: PreTrainedTokenizerFast
    config: MultiNeedleConfig
    form: FormName
    documents: Sequence[str]


Todo = list[tuple[AskedNeedlesCell, int, NeedlesPrompt]]


def measure(asking: Asking, cells: Sequence[AskedNeedlesCell], log: SampleLog) -> dict[AskedNeedlesCell, str]:
    """Answers all samples of cells of one length that `log` does not have; why cells were left out."""
    subject, config, length = asking.subject, asking.config, cells[0].length
    whole = length + max(config.new_tokens(cell.asked) for cell in cells)
    if reason := subject.too_long(whole):
        return dict.fromkeys(cells, reason)
    skipped: dict[AskedNeedlesCell, str] = {}
    scaling, trained = config.rope_parameters, subject.training_length
    try:
        with (
            rescaled(subject.model, scaling, trained=trained, length=whole),
            inference(subject.model),
            greedy(subject.model) as settings,
        ):
            for draw in range(min(config.haystacks, config.samples)):
                haystack = make_haystack(
                    asking.documents, asking.tokenizer, length, haystack_rng(config.seed, draw)
                )
                todo, unmade = prompts_of(asking, cells, haystack, draw, log)
                skipped |= unmade
                todo = [one for one in todo if one[0] not in skipped]
                for row, text in said(asking, haystack, length, todo, settings):
                    cell, index, prompt = todo[row]
                    log.add(record(cell, index, draw, prompt, text, config.save_prompts))
    except torch.OutOfMemoryError as error:
        return {**dict.fromkeys(cells, reason_of(error)), **skipped}
    except ValueError as error:
        return dict.fromkeys(cells, reason_of(error))
    return skipped


def prompts_of(
    asking: Asking, cells: Sequence[AskedNeedlesCell], haystack: Haystack, draw: int, log: SampleLog
) -> tuple[Todo, dict[AskedNeedlesCell, str]]:
    """The prompts in one haystack that `log` has no answers to; why cells have none."""
    config = asking.config
    todo: Todo = []
    skipped: dict[AskedNeedlesCell, str] = {}
    for cell in cells:
        indices = [i for i in range(draw, config.samples, config.haystacks) if not log.has(_key(cell, i))]
        try:
            made = list(cell_prompts(asking.tokenizer, haystack, cell, indices, config.seed, asking.form))
        except ValueError as error:
            skipped[cell] = reason_of(error)
            continue
        todo += [(cell, i, prompt) for i, prompt in zip(indices, made, strict=True)]
    return todo, skipped


def said(
    asking: Asking, haystack: Haystack, length: int, todo: Todo, settings: GenerationConfig
) -> Iterator[tuple[int, str]]:
    """(index in `todo`, answer)."""
    if not todo:
        return
    tokenizer, config, form = asking.tokenizer, asking.config, asking.form
    asked = [
        AskedPrompt(
            prompt.ids,
            prompt.numbers,
            form == "completion",
            config.new_tokens(cell.asked),
            encode(tokenizer, expected(form, prompt.cities, prompt.numbers)),
        )
        for cell, _, prompt in todo
    ]
    common = None
    if config.share_prefix:
        before = surroundings(form, tokenizer, CITIES[:1])[0]
        text = before + haystack.between(0, haystack.down(min(length, haystack.tokens)))
        common = encode(tokenizer, text)
    yield from answer(
        asking.subject.model, tokenizer, asked, settings, common=common, batch_tokens=config.batch_tokens
    )


def _key(cell: AskedNeedlesCell, index: int) -> tuple[Any, ...]:
    return (cell.needles, cell.asked, cell.length, cell.depth, index)


def record(
    cell: AskedNeedlesCell, index: int, draw: int, prompt: NeedlesPrompt, text: str, whole: bool
) -> dict[str, Any]:
    """One line of the samples' file."""
    return {
        "needles": cell.needles,
        "asked": cell.asked,
        "length": cell.length,
        "depth": cell.depth,
        "index": index,
        "haystack": draw,
        "cities": list(prompt.cities),
        "numbers": list(prompt.numbers),
        "starts": list(prompt.starts),
        "answer": text,
        "found": found(text, prompt.numbers),
        "prompt": prompt.text if whole else None,
    }


def shown(records: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """A few right and wrong answers for the report, of as many kinds as possible."""
    kept: list[dict[str, Any]] = []
    for wanted in (True, False):
        kinds: Counter[tuple[int, int]] = Counter()
        rows = [row for row in records if all(row["found"]) == wanted]
        chosen: list[dict[str, Any]] = []
        for row in sorted(rows, key=lambda r: (r["index"], r["length"], r["depth"], r["needles"])):
            if kinds[row["needles"], row["asked"]] == 0 and len(chosen) < SHOWN:
                kinds[row["needles"], row["asked"]] += 1
                chosen.append({key: value for key, value in row.items() if key not in ("prompt", "starts")})
        kept += chosen
    return kept

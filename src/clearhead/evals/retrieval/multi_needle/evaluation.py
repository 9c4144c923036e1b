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
from collections.abc import Generator, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from pydantic import Field, field_validator
from transformers import GenerationConfig, PreTrainedTokenizerFast

from clearhead.analysis.sections import Section
from clearhead.evals.asking.answering import encode, fast_tokenizer
from clearhead.evals.asking.decoding import AskedPrompt, answer, found, greedy
from clearhead.evals.asking.haystack import Haystack, digest, make_haystack, read_documents, store_documents
from clearhead.evals.asking.running import inference
from clearhead.evals.asking.sample_log import Key, Row
from clearhead.evals.cells import Asked, Cell, Measured, SampleEvaluation, grouped
from clearhead.evals.evaluation import EvaluationConfig
from clearhead.evals.probing.rescaling import rescaled
from clearhead.evals.reasons import Unmeasured, reason_of
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

    def key(self, index: int) -> Key:
        """What tells sample `index` from the others."""
        return (self.needles, self.asked, self.length, self.depth, index)


@dataclass(frozen=True, eq=False)
class Asking:
    """Who is asked, and how."""

    tokenizer: PreTrainedTokenizerFast
    form: FormName
    documents: Sequence[str]


@dataclass(frozen=True, kw_only=True)
class NeedlesInText(Cell):
    """The samples of one place. new: the most tokens of an answer of those that are asked together with it."""

    place: AskedNeedlesCell
    new: int
    asking: Asking


class MultiNeedle(SampleEvaluation[MultiNeedleConfig, MultiNeedleResult, NeedlesInText]):
    name = "multi_needle"
    Config = MultiNeedleConfig
    Result = MultiNeedleResult
    keys = KEYS

    def cells(self, subject: Subject, config: MultiNeedleConfig) -> Iterator[NeedlesInText]:
        tokenizer = fast_tokenizer(subject)
        form = config.form or ("completion" if tokenizer.chat_template is None else "chat")
        try:
            surroundings(form, tokenizer, CITIES[:1])
        except ValueError as error:
            raise Unmeasured(reason_of(error)) from error
        asking = Asking(tokenizer, form, documents_of(subject, tokenizer, config.haystack))
        places = config.cells(subject.training_length)
        # A scaling that grows is settled for prompt and answer, and no other cell may have a say in that.
        apart = subject.adapter.frequencies_depend_on_length(config.rope_parameters)
        for place in places:
            same = [one for one in places if one.length == place.length]
            new = max(config.new_tokens(one.asked) for one in ([place] if apart else same))
            yield NeedlesInText(
                name=f"{place.needles} needles, {place.asked} asked, {place.length} tokens, depth {place.depth:.0%}",
                length=place.length + new,
                place=place,
                new=new,
                asking=asking,
            )

    def about(
        self, subject: Subject, config: MultiNeedleConfig, cells: Sequence[NeedlesInText]
    ) -> dict[str, Any]:
        return {"config": config.model_dump(mode="json"), "text": digest(cells[0].asking.documents)}

    def samples(self, config: MultiNeedleConfig, cell: NeedlesInText) -> list[Key]:
        return [cell.place.key(index) for index in range(config.samples)]

    def together(
        self, subject: Subject, config: MultiNeedleConfig, samples: Sequence[tuple[NeedlesInText, Key]]
    ) -> Iterable[Sequence[tuple[NeedlesInText, Key]]]:
        return grouped(samples, lambda cell, key: (cell.place.length, cell.new)).values()

    def ask(
        self, subject: Subject, config: MultiNeedleConfig, asked: Asked[NeedlesInText]
    ) -> Generator[Row, None, None]:
        """One haystack after the other, among which the samples of each cell are divided."""
        cells = asked.cells
        asking, length = cells[0].asking, cells[0].place.length
        scaling, trained = config.rope_parameters, subject.training_length
        with (
            rescaled(subject.model, scaling, trained=trained, length=length + cells[0].new),
            inference(subject.model),
            greedy(subject.model) as settings,
        ):
            for draw in sorted({int(key[-1]) % config.haystacks for _, key in asked.samples}):
                rng = haystack_rng(config.seed, draw)
                haystack = make_haystack(asking.documents, asking.tokenizer, length, rng)
                todo = prompts_of(config, asked, cells, haystack, draw)
                for row, text in said(subject, config, asking, haystack, length, todo, settings):
                    place, index, prompt = todo[row]
                    yield record(place, index, draw, prompt, text, config.save_prompts)

    def gather(
        self,
        subject: Subject,
        config: MultiNeedleConfig,
        measured: Measured[NeedlesInText, list[Row]],
    ) -> MultiNeedleResult:
        pairs, grid = config.kinds(subject.training_length)
        cells = [values(cell.place, rows) for cell, rows in measured.pairs]
        asking = measured.pairs[0][0].asking
        return MultiNeedleResult(
            cells=cells,
            pairs=pairs,
            grid=grid,
            skipped_cells=measured.skipped,
            examples=[FoundNeedles.model_validate(row) for row in shown(measured.rows)],
            form=asking.form,
            bos=asking.tokenizer.bos_token,
            haystacks=config.haystacks,
            training_length=subject.training_length,
            rope_parameters=config.rope_parameters,
            n=sum(cell.n for cell in cells),
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


Todo = list[tuple[AskedNeedlesCell, int, NeedlesPrompt]]


def prompts_of(
    config: MultiNeedleConfig,
    asked: Asked[NeedlesInText],
    cells: Sequence[NeedlesInText],
    haystack: Haystack,
    draw: int,
) -> Todo:
    """The prompts of `cells` in one haystack; a cell of which they cannot be made is left out."""
    made: dict[str, Todo] = {}
    for cell in cells:
        indices = [int(key[-1]) for key in asked.keys(cell) if int(key[-1]) % config.haystacks == draw]
        tokenizer, form = cell.asking.tokenizer, cell.asking.form
        try:
            prompts = list(cell_prompts(tokenizer, haystack, cell.place, indices, config.seed, form))
        except ValueError as error:
            asked.leave_out(cell, reason_of(error))
            continue
        made[cell.name] = [(cell.place, i, prompt) for i, prompt in zip(indices, prompts, strict=True)]
    return [one for cell in asked.cells for one in made[cell.name]]


def said(
    subject: Subject,
    config: MultiNeedleConfig,
    asking: Asking,
    haystack: Haystack,
    length: int,
    todo: Todo,
    settings: GenerationConfig,
) -> Iterator[tuple[int, str]]:
    """(index in `todo`, answer)."""
    if not todo:
        return
    tokenizer, form = asking.tokenizer, asking.form
    prompts = [
        AskedPrompt(
            prompt.ids,
            prompt.numbers,
            form == "completion",
            config.new_tokens(place.asked),
            encode(tokenizer, expected(form, prompt.cities, prompt.numbers)),
        )
        for place, _, prompt in todo
    ]
    common = None
    if config.share_prefix:
        before = surroundings(form, tokenizer, CITIES[:1])[0]
        text = before + haystack.between(0, haystack.down(min(length, haystack.tokens)))
        common = encode(tokenizer, text)
    yield from answer(
        subject.model, tokenizer, prompts, settings, common=common, batch_tokens=config.batch_tokens
    )


def values(place: AskedNeedlesCell, rows: Sequence[Row]) -> MultiNeedleCell:
    return MultiNeedleCell(
        needles=place.needles,
        asked=place.asked,
        length=place.length,
        depth=place.depth,
        n=len(rows),
        found=[sum(row["found"]) for row in rows],
        any_needle=any_needle(place.needles, place.asked),
    )


def record(
    place: AskedNeedlesCell, index: int, draw: int, prompt: NeedlesPrompt, text: str, whole: bool
) -> Row:
    """One line of the samples' file."""
    return {
        "needles": place.needles,
        "asked": place.asked,
        "length": place.length,
        "depth": place.depth,
        "index": index,
        "haystack": draw,
        "cities": list(prompt.cities),
        "numbers": list(prompt.numbers),
        "starts": list(prompt.starts),
        "answer": text,
        "found": found(text, prompt.numbers),
        "prompt": prompt.text if whole else None,
    }


def shown(records: Sequence[Row]) -> list[Row]:
    """A few right and wrong answers for the report, of as many kinds as possible."""
    kept: list[Row] = []
    for wanted in (True, False):
        kinds: Counter[tuple[int, int]] = Counter()
        rows = [row for row in records if all(row["found"]) == wanted]
        chosen: list[Row] = []
        for row in sorted(rows, key=lambda r: (r["index"], r["length"], r["depth"], r["needles"])):
            if kinds[row["needles"], row["asked"]] == 0 and len(chosen) < SHOWN:
                kinds[row["needles"], row["asked"]] += 1
                chosen.append({key: value for key, value in row.items() if key not in ("prompt", "starts")})
        kept += chosen
    return kept

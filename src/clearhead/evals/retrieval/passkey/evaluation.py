"""Passkey retrieval by length: is one number found again in ever longer filler, inside and outside the trained window?

Forms (`passkey.prompts`): `coca` and `mohtashami`, the published prompts in natural language,
answered by greedy decoding and judged by two rules, "first number" and "substring"; and `native`, one needle of the
kind that a model trained here has seen, in text of its corpus, judged token by token ("exact"): small models with small
vocabularies cannot read the others. By default a model trained here is asked the native form, any other the published
two.

Accuracies of different forms and rules are not comparable (their keys, answer lengths and matches differ). Prompts have
exactly the length that is named, bos included; none is cut, and a model that cannot take a length is left out with the
reason. Decoding ends as soon as both rules are decided. A length-dependent rotary scaling is settled at prompt plus new
tokens for the whole request (see `probing.rescaling`), unlike in the released programs, where keys in the
cache keep the frequencies of the step they were written at.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from pydantic import Field
from torch import Tensor
from transformers import GenerationConfig, PreTrainedTokenizerFast
from transformers.generation.stopping_criteria import StoppingCriteria, StoppingCriteriaList

from clearhead.analysis.sections import Section
from clearhead.data.needles import chance_level
from clearhead.data.store import TokenStore
from clearhead.evals.asking.decoding import greedy
from clearhead.evals.asking.needle_documents import documents, exact_match, marks, too_short
from clearhead.evals.asking.running import batches, inference
from clearhead.evals.cells import Cell, CellEvaluation, Measured
from clearhead.evals.evaluation import EvaluationConfig
from clearhead.evals.probing.rescaling import rescaled
from clearhead.evals.retrieval.passkey.prompts import (
    FORMS,
    KeyPrompt,
    KeyVerdict,
    PasskeyForm,
    judge,
    passkey_prompt,
)
from clearhead.evals.retrieval.passkey.section import PasskeyCell, PasskeyResult, passkey_section
from clearhead.evals.subject import Subject, lengths_past_training
from clearhead.runs.results import RunResults

FormName = Literal["coca", "mohtashami", "native"]
PlaceName = Literal["uniform", "inside", "outside"]


class PasskeyConfig(EvaluationConfig):
    """forms: which prompts (default: native for a model trained here, else coca and mohtashami).

    lengths: tokens of a prompt (default: 1, 2, 4, 8 and 16 times the training length).
    places: of the key: anywhere, in the last training-length tokens, or before them. "uniform" is reported for both
        parts too. native knows "uniform" only.
    samples: prompts per cell. max_new_tokens: of an answer (default: 64 for coca, 10 for mohtashami, as published).
    rope_parameters: evaluate under this rotary scaling, see `clearhead.evals.probing.rescaling`.
    """

    forms: list[FormName] | None = Field(default=None, min_length=1)
    lengths: list[int] | None = Field(default=None, min_length=1)
    places: list[PlaceName] = Field(default=["uniform"], min_length=1)
    samples: int = Field(default=100, ge=1)
    max_new_tokens: int | None = Field(default=None, ge=1)
    rope_parameters: dict[str, Any] | None = None
    batch_tokens: int = Field(default=8192, ge=1)
    seed: int = 4000


@dataclass(frozen=True, kw_only=True)
class KeyPlace(Cell):
    """Prompts of `tokens` tokens in one form, with the key in one place; `new` more for the answer."""

    form: FormName
    tokens: int
    place: PlaceName
    new: int


class Passkey(CellEvaluation[PasskeyConfig, PasskeyResult, KeyPlace, PasskeyCell]):
    name = "passkey"
    Config = PasskeyConfig
    Result = PasskeyResult
    Value = PasskeyCell

    def cells(self, subject: Subject, config: PasskeyConfig) -> Iterator[KeyPlace]:
        trained = subject.training_length or 256
        for form in self._forms(subject, config):
            new = 0 if form == "native" else config.max_new_tokens or FORMS[form].new_tokens
            places: list[PlaceName] = ["uniform"] if form == "native" else config.places
            for length in lengths_past_training(subject, config.lengths):
                for place in places:
                    if place == "uniform" or length > trained:
                        name = f"{form}, {length} tokens, {place}"
                        yield KeyPlace(
                            name=name, length=length + new, form=form, tokens=length, place=place, new=new
                        )

    def _forms(self, subject: Subject, config: PasskeyConfig) -> list[FormName]:
        return config.forms or (["coca", "mohtashami"] if subject.external else ["native"])

    def text(self, subject: Subject, config: PasskeyConfig) -> TokenStore | None:
        return subject.documents if "native" in self._forms(subject, config) else None

    def measure(self, subject: Subject, config: PasskeyConfig, cell: KeyPlace) -> PasskeyCell:
        trained = subject.training_length or 256
        scaling, length = config.rope_parameters, cell.tokens + cell.new
        with rescaled(subject.model, scaling, trained=subject.training_length, length=length):
            if cell.form == "native":
                starts, correct, chance = native(subject, config, cell.tokens)
                rule = "exact"
            else:
                form = FORMS[cell.form]
                prompts = published(subject, config, form, cell.tokens, cell.place, trained)
                verdicts = [r.verdict for r in answers(subject, prompts, cell.new, config.batch_tokens)]
                starts, chance, rule = [prompt.start for prompt in prompts], form.chance, form.rule
                correct = {
                    "first number": [bool(verdict.first) for verdict in verdicts],
                    "substring": [bool(verdict.anywhere) for verdict in verdicts],
                }
        return PasskeyCell(
            form=cell.form,
            length=cell.tokens,
            place=cell.place,
            n=len(starts),
            rule=rule,
            correct={rule: marks(hits) for rule, hits in correct.items()},
            inside=marks([start >= cell.tokens - trained for start in starts]),
            chance=chance,
        )

    def gather(
        self, subject: Subject, config: PasskeyConfig, measured: Measured[KeyPlace, PasskeyCell]
    ) -> PasskeyResult:
        return PasskeyResult(
            cells=measured.values,
            skipped_cells=measured.skipped,
            training_length=subject.training_length,
            rope_parameters=config.rope_parameters,
            n=sum(cell.n for cell in measured.values),
        )

    def section(self, run: RunResults) -> Section:
        title, question = "Passkey", "Does it find a number again?"
        values = self.results(run)
        if not values:
            return self.missing(run, title, question)
        return passkey_section(self.name, title, question, run, values)


def native(
    subject: Subject, config: PasskeyConfig, length: int
) -> tuple[list[int], dict[str, list[bool]], float]:
    """One needle of the training's kind in each of `samples` documents, at random places."""
    spec = subject.needles.spec(length, 1, 1)
    if reason := too_short(spec, subject.tokenizer):
        raise ValueError(reason)
    samples = documents(subject, spec, None, config.samples, config.seed)
    hits = exact_match(subject.model, samples, subject.device, config.batch_tokens)
    starts = [sample.sentence_spans[0].start for sample in samples]
    return starts, {"exact": hits}, chance_level(spec, subject.tokenizer, "validation")


def published(
    subject: Subject, config: PasskeyConfig, form: PasskeyForm, length: int, place: str, trained: int
) -> list[KeyPrompt]:
    """The prompts of one cell: a function of the cell, the tokenizer and the seed, so the same for every arm."""
    tokenizer = subject.tokenizer
    if not isinstance(tokenizer, PreTrainedTokenizerFast):
        raise ValueError(
            "the passkey prompts need a tokenizer with a tokenizer.json, which knows where its tokens lie"
        )
    where = ("uniform", "inside", "outside").index(place)
    inside = {"uniform": None, "inside": True, "outside": False}[place]
    return [
        passkey_prompt(
            form,
            tokenizer,
            length,
            np.random.default_rng([config.seed, length, where, form.keys[0], index]),
            window=trained,
            inside=inside,
        )
        for index in range(config.samples)
    ]


@dataclass(frozen=True)
class KeyReply:
    """What a model said, up to where it was decided or over, and what that is worth."""

    text: str
    verdict: KeyVerdict


def answers(
    subject: Subject, prompts: Sequence[KeyPrompt], new_tokens: int, batch_tokens: int = 8192
) -> list[KeyReply]:
    """Greedy answers, judged. Prompts of a batch are of one length, so that nothing is padded on either side."""
    found: list[KeyReply] = []
    length = len(prompts[0].ids)
    with inference(subject.model), greedy(subject.model) as settings:
        for span in batches(len(prompts), batch_tokens // (length + new_tokens)):
            part = [prompts[i] for i in span]
            ids = torch.from_numpy(np.stack([prompt.ids for prompt in part])).to(subject.device)
            decided = Decided(subject, [prompt.key for prompt in part], length, settings)
            subject.model.generate(  # type: ignore[operator]
                ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=new_tokens,
                stopping_criteria=StoppingCriteriaList([decided]),
            )
            found += decided.replies()
    return found


class Decided(StoppingCriteria):
    """Ends a row as soon as both rules have their verdict, which later tokens cannot change."""

    def __init__(
        self, subject: Subject, keys: Sequence[str], prompt: int, settings: GenerationConfig
    ) -> None:
        self.subject = subject
        self.keys = keys
        self.prompt = prompt
        ends = settings.eos_token_id
        self.ends = set(ends if isinstance(ends, list) else [] if ends is None else [ends])
        self.texts = [""] * len(keys)
        self.done = [False] * len(keys)

    def __call__(self, input_ids: Tensor, scores: Tensor, **unused: Any) -> Tensor:  # type: ignore[override]
        for row, tokens in enumerate(input_ids[:, self.prompt :].tolist()):
            # What follows the end of a row is padding.
            if self.done[row]:
                continue
            over = bool(self.ends & {tokens[-1]})
            self.texts[row] = str(self.subject.tokenizer.decode(tokens[:-1] if over else tokens))
            self.done[row] = over or judge(self.texts[row], self.keys[row], ended=False).decided
        return torch.tensor(self.done, device=input_ids.device)

    def replies(self) -> list[KeyReply]:
        """What the rows have said, with their final verdicts."""
        return [
            KeyReply(text, judge(text, key, ended=True))
            for text, key in zip(self.texts, self.keys, strict=True)
        ]

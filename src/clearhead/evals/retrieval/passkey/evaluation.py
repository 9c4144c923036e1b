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

from collections.abc import Sequence
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
from clearhead.evals.asking.decoding import greedy
from clearhead.evals.asking.needle_documents import documents, exact_match, marks, too_short
from clearhead.evals.asking.running import batches, inference
from clearhead.evals.evaluation import Evaluation, EvaluationConfig
from clearhead.evals.probing.rescaling import rescaled
from clearhead.evals.reasons import reason_of
from clearhead.evals.retrieval.passkey.prompts import FORMS, Form, Prompt, Verdict, judge, passkey_prompt
from clearhead.evals.retrieval.passkey.section import passkey_section
from clearhead.evals.subject import Subject, lengths_past_training
from clearhead.runs.results import RunResults

FormName = Literal["coca", "mohtashami", "native"]
Place = Literal["uniform", "inside", "outside"]


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
    places: list[Place] = Field(default=["uniform"], min_length=1)
    samples: int = Field(default=100, ge=1)
    max_new_tokens: int | None = Field(default=None, ge=1)
    rope_parameters: dict[str, Any] | None = None
    batch_tokens: int = Field(default=8192, ge=1)
    seed: int = 4000


class Passkey(Evaluation[PasskeyConfig]):
    name = "passkey"
    Config = PasskeyConfig

    def run(self, subject: Subject, config: PasskeyConfig) -> dict[str, Any]:
        trained = subject.training_length or 256
        lengths = lengths_past_training(subject, config.lengths)
        forms: Sequence[str] = config.forms or (["coca", "mohtashami"] if subject.external else ["native"])
        cells: list[dict[str, Any]] = []
        skipped: dict[str, str] = {}
        for form in forms:
            for length in lengths:
                for place in ["uniform"] if form == "native" else config.places:
                    if place != "uniform" and length <= trained:
                        continue
                    try:
                        cells.append(self._cell(subject, config, form, length, place, trained))
                    except (ValueError, torch.OutOfMemoryError) as error:
                        skipped[f"{form}, {length} tokens, {place}"] = reason_of(error)
        if not cells:
            return {"skipped": "; ".join(dict.fromkeys(skipped.values()))}
        return {
            "cells": cells,
            "skipped_cells": skipped,
            "training_length": subject.training_length,
            "rope_parameters": config.rope_parameters,
            "n": sum(cell["n"] for cell in cells),
        }

    def _cell(
        self, subject: Subject, config: PasskeyConfig, form: str, length: int, place: str, trained: int
    ) -> dict[str, Any]:
        new = 0 if form == "native" else config.max_new_tokens or FORMS[form].new_tokens
        if reason := subject.too_long(length + new):
            raise ValueError(reason)
        scaling = config.rope_parameters
        with rescaled(subject.model, scaling, trained=subject.training_length, length=length + new):
            if form == "native":
                starts, correct, chance = native(subject, config, length)
            else:
                prompts = published(subject, config, FORMS[form], length, place, trained)
                verdicts = [reply.verdict for reply in answers(subject, prompts, new, config.batch_tokens)]
                starts, chance = [prompt.start for prompt in prompts], FORMS[form].chance
                correct = {
                    "first number": [bool(verdict.first) for verdict in verdicts],
                    "substring": [bool(verdict.anywhere) for verdict in verdicts],
                }
        return {
            "form": form,
            "length": length,
            "place": place,
            "n": len(starts),
            "rule": "exact" if form == "native" else FORMS[form].rule,
            "correct": {rule: marks(hits) for rule, hits in correct.items()},
            "inside": marks([start >= length - trained for start in starts]),
            "chance": chance,
        }

    def section(self, run: RunResults) -> Section:
        title, question = "Passkey", "Does it find a number again?"
        values = run.values(self.name)
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
    subject: Subject, config: PasskeyConfig, form: Form, length: int, place: str, trained: int
) -> list[Prompt]:
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
class Reply:
    """What a model said, up to where it was decided or over, and what that is worth."""

    text: str
    verdict: Verdict


def answers(
    subject: Subject, prompts: Sequence[Prompt], new_tokens: int, batch_tokens: int = 8192
) -> list[Reply]:
    """Greedy answers, judged. Prompts of a batch are of one length, so that nothing is padded on either side."""
    found: list[Reply] = []
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

    def replies(self) -> list[Reply]:
        """What the rows have said, with their final verdicts."""
        return [
            Reply(text, judge(text, key, ended=True)) for text, key in zip(self.texts, self.keys, strict=True)
        ]

"""Documents with needles and their questions, and whether a model's answers match exactly."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch

from clearhead.data.needles import (
    NeedleHaystack,
    NeedleSample,
    NeedleSpec,
    NeedleTokenizer,
    minimum_length,
    needle_document,
)
from clearhead.evals.asking.running import batches, inference
from clearhead.evals.subject import Subject

if TYPE_CHECKING:
    from transformers import PreTrainedModel
from transformers import PreTrainedModel


def marks(hits: Sequence[bool]) -> str:
    """`[True, False]` -> `"10"`: one character a prompt, in an order that all arms share."""
    return "".join("01"[hit] for hit in hits)


def too_short(spec: NeedleSpec, tokenizer: NeedleTokenizer) -> str | None:
    """Why the needles of `spec` do not fit into its length, or `None` if they do."""
    least = minimum_length(spec, tokenizer)
    return (
        None
        if least <= spec.length
        else f"{spec.needles} needles need at least {least} tokens, not {spec.length}"
    )


def documents(
    subject: Subject, spec: NeedleSpec, depth: float | None, count: int, seed: int
) -> list[NeedleSample]:
    """The validation documents of one cell: a function of the cell and the seed alone, so the same for every arm.

    depth: of the asked needle, from 0 to 1; None draws one for each document.
    """
    place = 10**7 if depth is None else round(depth * 1e6)
    cell_seed = int(np.random.SeedSequence([seed, spec.length, spec.needles, place]).generate_state(1)[0])
    return [
        needle_document(
            spec,
            seed=cell_seed,
            index=index,
            haystack=subject.documents,
            split="validation",
            tokenizer=subject.tokenizer,
            depth=depth,
        )
        for index in range(count)
    ]


def exact_match(
    model: PreTrainedModel, samples: Sequence[NeedleSample], device: torch.device, batch_tokens: int = 8192
) -> list[bool]:
    """For each answer of each sample, whether greedy decoding from its question would give it, token by token."""
    hits: list[bool] = []
    with inference(model, length=len(samples[0].input_ids)):
        for span in batches(len(samples), batch_tokens // len(samples[0].input_ids)):
            part = [samples[i] for i in span]
            ids = torch.from_numpy(np.stack([sample.input_ids for sample in part])).to(device)
            # The token at p is predicted at p - 1. Questions stand at the end: logits before the first are not needed.
            first = min(sample.answers[0].start for sample in part) - 1
            logits = model(input_ids=ids, use_cache=False, logits_to_keep=ids.shape[1] - first).logits
            guesses = logits.argmax(dim=-1).cpu().numpy()
            for sample, guess in zip(part, guesses, strict=True):
                for answer in sample.answers:
                    said = guess[answer.start - 1 - first : answer.stop - 1 - first]
                    hits.append(bool((said == sample.input_ids[answer]).all()))
    return hits


def needle_probe(
    model: PreTrainedModel,
    haystack: NeedleHaystack,
    tokenizer: NeedleTokenizer,
    spec: NeedleSpec,
    *,
    samples: int = 64,
    seed: int = 2000,
    batch_tokens: int = 8192,
) -> float:
    """Exact-match accuracy on `samples` validation documents at random depths: fast enough to use during training.

    The model's device, mode and attention implementation are kept. The same seed gives the same documents.
    """
    made = [
        needle_document(spec, seed=seed, index=i, haystack=haystack, split="validation", tokenizer=tokenizer)
        for i in range(samples)
    ]
    return float(np.mean(exact_match(model, made, model.device, batch_tokens)))

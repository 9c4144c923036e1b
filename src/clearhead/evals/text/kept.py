"""What a model that was trained on has kept of the one it began with: how far their predictions are apart.

Both read the same held-out texts. For every token position: the divergence Σ p ln(p/q) of the model's next-token
distribution q from the original's p, in nats; whether both find the same token likeliest; and by how much the model's
loss on the token that follows is above the original's (below zero: it predicts better).
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from clearhead.analysis.comparison import compare
from clearhead.analysis.sections import Section, SectionTable
from clearhead.data.opening import open_pretrained
from clearhead.evals.asking.running import batches, inference
from clearhead.evals.asking.texts import openings
from clearhead.evals.cells import LengthEvaluation, TextLength
from clearhead.evals.evaluation import EvaluationConfig, EvaluationResult
from clearhead.evals.reasons import Unmeasured, reason_of
from clearhead.evals.subject import Subject
from clearhead.runs.results import RunResults

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class KeptConfig(EvaluationConfig):
    """original: the model's directory, in which {seed} stands for the seed of the run. length: of a text, by default
    the training length. texts: files, directories or corpora to read instead of the evaluation's documents.
    """

    original: str = Field(min_length=1)
    length: int | None = Field(default=None, ge=2)
    documents: int = Field(default=64, ge=1)
    texts: list[str] | None = Field(default=None, min_length=1)
    batch_tokens: int = Field(default=4096, ge=1)
    seed: int = 0


class KeptResult(EvaluationResult):
    """Of each text: mean divergence in nats, share of equal likeliest tokens, difference of losses in nats."""

    length: int
    divergence: list[float]
    agreement: list[float]
    loss_difference: list[float]


class Kept(LengthEvaluation[KeptConfig, KeptResult]):
    name = "kept"
    Config = KeptConfig
    Result = KeptResult

    def length(self, subject: Subject, config: KeptConfig) -> int:
        return config.length or subject.training_length or 256

    def measure(self, subject: Subject, config: KeptConfig, cell: TextLength) -> KeptResult:
        original = opened(config.original.replace("{seed}", str(subject.seed)), subject)
        rows = openings(
            subject,
            cell.tokens,
            config.documents,
            config.seed,
            f"{self.name}.length",
            store=subject.texts(config.texts),
        ).rows
        found: list[Tensor] = []
        with inference(subject.model, length=cell.tokens), inference(original, length=cell.tokens):
            for span in batches(len(rows), config.batch_tokens // cell.tokens):
                ids = torch.from_numpy(rows[span.start : span.stop]).to(subject.device)
                found.append(apart(original, subject.model, ids).cpu())
        divergence, agreement, difference = torch.cat(found, dim=1).double().tolist()
        return KeptResult(
            length=cell.tokens, divergence=divergence, agreement=agreement, loss_difference=difference
        )

    def section(self, run: RunResults) -> Section:
        title, question = "What was kept", "How far is it from the model that it began with?"
        values = self.results(run)
        if not values:
            return self.missing(run, title, question)
        samples = {
            arm: {seed: one.divergence for seed, one in seeds.items()} for arm, seeds in values.items()
        }
        result = compare(samples, "lower", digits=4)
        rows = []
        for arm, seeds in values.items():
            mean = [
                float(np.mean([getattr(one, name) for one in seeds.values()]))
                for name in ("divergence", "agreement", "loss_difference")
            ]
            rows.append([arm, f"{mean[0]:.4f}", f"{mean[1]:.1%}", f"{mean[2]:+.4f}"])
        first = next(iter(next(iter(values.values())).values()))
        headers = ["arm", "divergence (nats)", "same likeliest token", "loss above the original's (nats)"]
        notes = [
            f"{len(first.divergence)} held-out texts of {first.length} tokens. A model that predicts better than its "
            "original is far from it too: the last column tells which it is.",
            *run.skipped(self.name),
        ]
        return Section(
            self.name,
            title,
            question,
            result.sentence(),
            measure="divergence ↓",
            digits=4,
            headlines=result.headlines(),
            tables=[SectionTable("Beside the original, mean over texts and seeds", headers, rows)],
            notes=notes,
        )


def opened(path: str, subject: Subject) -> PreTrainedModel:
    """The original, where the subject is; Unmeasured where it cannot be opened or has other tokens."""
    from transformers import AutoModelForCausalLM

    import clearhead.models  # noqa: F401  registers the family with the Auto classes

    if not Path(path).is_dir():
        raise Unmeasured(f"there is no directory {path!r}: set evaluate.kept.original to the original model")
    try:
        model: PreTrainedModel = open_pretrained(AutoModelForCausalLM, path, dtype=subject.model.dtype)
    except (OSError, ValueError, KeyError) as error:
        raise Unmeasured(f"the original {path!r} cannot be opened ({reason_of(error)})") from None
    own, theirs = subject.model.config.vocab_size, model.config.vocab_size
    if own != theirs:
        raise Unmeasured(f"the original {path!r} has {theirs} tokens, the model {own}")
    placed: PreTrainedModel = model.to(subject.device)  # type: ignore[arg-type]
    return placed


def apart(original: PreTrainedModel, model: PreTrainedModel, ids: Tensor) -> Tensor:
    """(3, B): mean divergence, share of equal likeliest tokens, and difference of losses, of each text (B, L)."""
    before, after = (
        one(input_ids=ids, use_cache=False).logits[:, :-1].float().log_softmax(-1)
        for one in (original, model)
    )
    divergence = (before.exp() * (before - after)).sum(-1)
    same = (before.argmax(-1) == after.argmax(-1)).float()
    target = ids[:, 1:, None]
    difference = (before.gather(-1, target) - after.gather(-1, target))[..., 0]
    return torch.stack([part.mean(-1) for part in (divergence, same, difference)])

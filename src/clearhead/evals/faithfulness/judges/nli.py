"""A local classifier of natural language inference as judge: is every sentence entailed by a part of the document?

After SummaC's zero-shot form (Laban et al. 2022, arXiv 2111.09525): the document is cut into chunks of whole sentences,
the answer into sentences; a sentence counts with the chunk that entails it most, and is supported when that probability
is at least `threshold`. The answer is free of hallucination when all of its sentences are supported. Unlike SummaC,
which averages and correlates, this is a verdict; its chunks are longer than one sentence. The reference is not looked
at, and the question only as what stands before the answer.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Sequence

import torch
from pydantic import Field

from clearhead.evals.faithfulness.judges.base import Case, Judge, JudgeConfig, JudgeError, Judgement
from clearhead.evals.faithfulness.judges.loading import load_judge

LABELS = ("entail", "neutral", "contradict")
"""How the labels of an NLI model begin, whatever their case ("ENTAILMENT", "contradiction")."""
ENDS = re.compile(r"(?<=[.!?])[\"'”’)\]]*\s+|\n+")


class NliConfig(JudgeConfig):
    """model: a directory or hub id of a sequence classifier. threshold: probability of entailment that supports.

    chunk_tokens: of a piece of the document at most. max_length: of premise and hypothesis together (default: the
    model's max_position_embeddings, at most 512). batch_size: pairs at a time.
    """

    model: str = Field(min_length=1)
    threshold: float = Field(default=0.5, gt=0, lt=1)
    chunk_tokens: int = Field(default=256, ge=1)
    max_length: int | None = Field(default=None, ge=1)
    batch_size: int = Field(default=16, ge=1)


def sentences(text: str) -> list[str]:
    """Cut after full stops, exclamation and question marks before white space, and at line ends."""
    return [part.strip() for part in ENDS.split(text) if part and part.strip()]


class Nli(Judge[NliConfig]):
    name = "nli"
    Config = NliConfig

    def prepare(self) -> None:
        """Loads the model. Raises JudgeError where that is not possible and for labels that are not those of NLI."""
        from transformers import AutoModelForSequenceClassification

        self.tokenizer, self.model = load_judge(AutoModelForSequenceClassification, self.config.model)
        settings = self.model.config
        names = [str(settings.id2label[i]).lower() for i in range(settings.num_labels)]
        found = [[i for i, name in enumerate(names) if name.startswith(label)] for label in LABELS]
        if any(len(ids) != 1 for ids in found):
            raise JudgeError(
                f"the judge {self.config.model!r} has the labels {', '.join(names)}; an NLI model has entailment, "
                "neutral and contradiction in its id2label"
            )
        self.entails = found[0][0]
        known = getattr(settings, "max_position_embeddings", None) or 512
        self.longest = self.config.max_length or min(known, 512)

    def _tokens(self, text: str, pair: str | None = None) -> int:
        return len(self.tokenizer(text, pair)["input_ids"])

    def _pieces(self, text: str, room: int) -> list[str]:
        """`text` in halves of halves that fit into `room` tokens; between words, as long as there are some."""
        if len(text) < 2 or self._tokens(text) <= room:
            return [text]
        words = text.split()
        if len(words) > 1:
            halves = (" ".join(words[: len(words) // 2]), " ".join(words[len(words) // 2 :]))
        else:
            halves = (text[: len(text) // 2], text[len(text) // 2 :])
        return [piece for half in halves for piece in self._pieces(half, room)]

    def chunks(self, document: str, room: int) -> list[str]:
        """The document in pieces of whole sentences within `room` tokens; a longer sentence is cut."""
        parts = [piece for sentence in sentences(document) for piece in self._pieces(sentence, room)]
        made: list[str] = []
        for part in parts:
            if made and self._tokens(f"{made[-1]} {part}") <= room:
                made[-1] = f"{made[-1]} {part}"
            else:
                made.append(part)
        return made

    def judge(self, cases: Sequence[Case]) -> Iterator[tuple[int, Judgement]]:
        for index, case in enumerate(cases):
            yield index, self._verdict(case)

    def _verdict(self, case: Case) -> Judgement:
        claims = sentences(case.proposed)
        if case.question:
            claims = [f"{case.question} {claim}" for claim in claims]
        if not claims:
            return Judgement(None, "the answer has no sentence")
        least = min(self.longest - self._tokens("", claim) for claim in claims)
        chunks = self.chunks(case.document, min(self.config.chunk_tokens, least)) if least >= 16 else []
        if not chunks:
            return Judgement(
                None, f"a sentence of the answer leaves no room for text in {self.longest} tokens"
            )
        best = []
        for claim in claims:
            probabilities = self._entailment([(chunk, claim) for chunk in chunks])
            if not all(map(math.isfinite, probabilities)):
                return Judgement(None, "the judge's probabilities are not numbers")
            best.append(max(probabilities))
        worst = min(range(len(claims)), key=best.__getitem__)
        said = f"{len(claims)} sentences, the least supported {best[worst]:.3f}: {claims[worst]}"
        return Judgement(best[worst] >= self.config.threshold, said)

    def _entailment(self, pairs: Sequence[tuple[str, str]]) -> list[float]:
        found: list[float] = []
        for start in range(0, len(pairs), self.config.batch_size):
            part = pairs[start : start + self.config.batch_size]
            # Padding is masked out; a pair that is too long was not made.
            batch = self.tokenizer(
                [a for a, _ in part], [b for _, b in part], padding=True, return_tensors="pt"
            ).to(self.model.device)
            with torch.inference_mode():
                logits = self.model(**batch).logits
            found += logits.float().softmax(-1)[:, self.entails].tolist()
        return found

    def described(self) -> str:
        c = self.config
        return f"{c.model}, an NLI classifier, every sentence entailed with at least {c.threshold:g}"

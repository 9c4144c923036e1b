"""Bits per masked byte: how well an encoder says what was hidden in text that it has not seen.

`bits per masked byte = Σ NLL of the hidden tokens / (ln 2 · Σ UTF-8 bytes of the hidden tokens)` over validation
documents, which are read in windows of the training length that do not overlap. A share of the tokens, the same for
every model, is shown as the mask token. It is not bits per byte of a causal language model, which sees one side of a
token and predicts all of them: the two numbers cannot be compared.
"""

from __future__ import annotations

from pydantic import Field

from clearhead.analysis.by_length import first_values
from clearhead.analysis.comparison import compare
from clearhead.analysis.sections import Section, SectionTable
from clearhead.evals.asking.masked import MaskConfig, guess, hide
from clearhead.evals.asking.texts import choose
from clearhead.evals.cells import LengthEvaluation, TextLength
from clearhead.evals.evaluation import EvaluationResult
from clearhead.evals.subject import Subject
from clearhead.runs.results import RunResults


class MaskedLanguageModellingConfig(MaskConfig):
    """length: of a window in tokens (default: the training length). The rest: `MaskConfig`."""

    length: int | None = Field(default=None, ge=4)


class MaskedLanguageModellingResult(EvaluationResult):
    """bits, bytes, right, hidden: of the hidden tokens of each document; right: how many were the first guess."""

    bits_per_byte: float
    accuracy: float
    length: int
    share: float
    n: int
    tokens: int
    documents: list[str]
    bits: list[float]
    bytes: list[float]
    right: list[int]
    hidden: list[int]


class MaskedLanguageModelling(LengthEvaluation[MaskedLanguageModellingConfig, MaskedLanguageModellingResult]):
    name = "masked_language_modelling"
    tasks = ("masked",)
    Config = MaskedLanguageModellingConfig
    Result = MaskedLanguageModellingResult

    def length(self, subject: Subject, config: MaskedLanguageModellingConfig) -> int:
        return config.length or subject.training_length or 256

    def measure(
        self, subject: Subject, config: MaskedLanguageModellingConfig, cell: TextLength
    ) -> MaskedLanguageModellingResult:
        store = subject.documents
        chosen = choose(len(store), config.max_documents, config.seed)
        documents = hide(subject, chosen, config)
        found = guess(subject, documents, cell.tokens, config.batch_tokens)
        sizes = [document.bytes for document in documents]
        return MaskedLanguageModellingResult(
            bits_per_byte=float(found.bits.sum() / sum(sizes)),
            accuracy=float(found.right.sum() / found.hidden.sum()),
            length=cell.tokens,
            share=config.share,
            n=len(documents),
            tokens=int(found.hidden.sum()),
            documents=[store.ids[i] for i in chosen],
            bits=[round(float(value), 4) for value in found.bits],
            bytes=[round(size, 3) for size in sizes],
            right=found.right.tolist(),
            hidden=found.hidden.tolist(),
        )

    def section(self, run: RunResults) -> Section:
        title, question = "Masked language modelling", "Does it say better what was hidden in unseen text?"
        values = self.results(run)
        if not values:
            return self.missing(run, title, question)
        first = first_values(values)
        samples = {arm: {seed: v.bits for seed, v in seeds.items()} for arm, seeds in values.items()}
        result = compare(samples, "lower", denominators=first.bytes, digits=3)
        guessed = compare(
            {arm: {seed: v.right for seed, v in seeds.items()} for arm, seeds in values.items()},
            "higher",
            denominators=first.hidden,
            digits=3,
        )
        rows = [
            [arm, *(f"{v.bits_per_byte:.3f} ({v.accuracy:.1%})" for v in seeds.values())]
            for arm, seeds in values.items()
        ]
        widest = max(len(row) for row in rows)
        seeds = [f"seed {seed}" for seed in next(s for s in values.values() if len(s) == widest - 1)]
        return Section(
            self.name,
            title,
            question,
            result.sentence(),
            measure="bits per masked byte ↓",
            digits=3,
            headlines=result.headlines(),
            tables=[
                SectionTable(
                    "Bits per masked byte of each trained model (share of the tokens that is guessed at once)",
                    ["arm", *seeds],
                    [[*row, *[None] * (widest - len(row))] for row in rows],
                )
            ],
            notes=[
                f"{first.n} validation documents in windows of {first.length} tokens; {first.tokens:,} tokens, a share "
                f"of {first.share:g}, are shown as the mask token, the same ones for every model. Intervals: bootstrap "
                "over documents or Student's t over seeds, whichever is wider; differences are paired by document and "
                "seed. Not comparable with the bits per byte of a causal language model.",
                f"Tokens guessed at once: {guessed.sentence()}",
                *run.skipped(self.name),
            ],
        )

"""All arms of a run beside each other, on one retrieval document that none of them was trained on."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from clearhead.data.needles import NeedleSample
from clearhead.evals.asking.needle_documents import documents, too_short
from clearhead.evals.runner import JobLoader
from clearhead.look.opening import kind_of
from clearhead.look.page import page
from clearhead.look.view import BYTES, Mark, TokenText, make_view
from clearhead.runs.directory import LOOK_PAGE
from clearhead.runs.files import write_text
from clearhead.runs.recipe_io import load_job
from clearhead.train.single import find_jobs

if TYPE_CHECKING:
    from clearhead.evals.subject import Subject

# The asked fact stands here: with text on both sides.
DEPTH = 0.5
FEWEST_NEEDLES, MOST_NEEDLES = 1, 4


@dataclass(frozen=True)
class NeedleText:
    """A document up to its answer, in tokens and characters, and where the asked fact and its value stand."""

    text: TokenText
    marks: list[Mark]


def make_run_page(
    run: Path, *, out: Path | None = None, say: Callable[[str], None] = lambda message: None
) -> Path:
    """Write `look.html` of a run: the first trained seed of every arm, on one document of its needle evaluation.

    The document ends before the answer, so that its last token is the one that looks for it. Raises RunError for what
    is no run with a trained model, and ValueError for a run whose rows are too short for a needle.
    """
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    jobs: dict[str, Path] = {}
    for found in find_jobs(run):
        jobs.setdefault(found.parent.name, found)
    views = []
    for folder in _in_recipe_order(run, jobs):
        job = load_job(folder / "job.json")
        if job.task != "causal":
            raise ValueError(
                f'task = "{job.task}" has no retrieval document to show; clearhead look MODEL --text shows any text'
            )
        subject = JobLoader(job, folder).subject
        name = f"{job.arm}, seed {job.seed}"
        say(f"{name}: looking at one document")
        document = needle_text(subject)
        views.append(
            make_view(
                subject.model,
                document.text,
                name=name,
                kind=kind_of(subject.model),
                marks=document.marks,
                limit=BYTES // len(jobs),
            )
        )
        del subject  # The next model needs the memory.
    target = out or run / LOOK_PAGE
    write_text(target, page(views, f"the arms of {run.resolve().name}"))
    return target


def is_current(run: Path) -> bool:
    """Whether `look.html` of a run is there, and newer than all its models."""
    target = run / LOOK_PAGE
    if not target.exists():
        return False
    written = target.stat().st_mtime
    return all((job / "model" / "config.json").stat().st_mtime <= written for job in find_jobs(run))


def needle_text(subject: Subject) -> NeedleText:
    """One document as the `needles` evaluation asks it, of training length and with a few facts where they fit."""
    length = subject.training_length or 256
    for needles in (MOST_NEEDLES, FEWEST_NEEDLES):
        spec = subject.needles.spec(length, needles, 1)
        reason = too_short(spec, subject.tokenizer)
        if reason is None:
            break
    else:
        raise ValueError(reason)
    sample = documents(subject, spec, DEPTH, 1, seed=0)[0]
    return _read(sample, subject.tokenizer)


def _read(sample: NeedleSample, tokenizer: Any) -> NeedleText:
    ids = [int(token) for token in sample.input_ids[: sample.answers[0].start]]
    ends = [len(_decoded(tokenizer, ids[1 : i + 1])) for i in range(len(ids))]
    text = _decoded(tokenizer, ids[1:])
    # A token that holds a part of a letter alone has no place of its own.
    spans = [(min(a, b), b) for a, b in zip([0, *ends[:-1]], ends, strict=True)]
    fact, value = sample.sentence_spans[0], sample.needle_spans[0]
    answer = _decoded(tokenizer, ids[value.start : value.stop]).strip()
    return NeedleText(
        TokenText(text, ids, spans),
        [Mark("its fact", fact.start, fact.stop), Mark(f"answer: {answer}"[:24], value.start, value.stop)],
    )


def _decoded(tokenizer: Any, ids: list[int]) -> str:
    return str(tokenizer.decode(ids, clean_up_tokenization_spaces=False))


def _in_recipe_order(run: Path, jobs: dict[str, Path]) -> list[Path]:
    """The jobs in the order of the recipe's arms."""
    from clearhead.runs.results import load_run

    return [jobs[arm.slug] for arm in load_run(run).arms if arm.slug in jobs]

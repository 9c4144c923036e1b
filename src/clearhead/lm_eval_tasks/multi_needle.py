"""Multi-needle retrieval as lm-evaluation-harness tasks: the prompts and the score of `clearhead evaluate`.

The harness hands a task its metadata (`--metadata` and the model's arguments) and takes documents back.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import TYPE_CHECKING, Any

from clearhead.evals.asking.decoding import found
from clearhead.evals.asking.haystack import make_haystack, read_documents
from clearhead.evals.retrieval.multi_needle.evaluation import (
    AskedNeedlesCell,
    MultiNeedleConfig,
    cell_prompts,
    haystack_rng,
)
from clearhead.evals.retrieval.multi_needle.prompts import FormName

if TYPE_CHECKING:
    from datasets import DatasetDict
    from transformers import PreTrainedTokenizerFast

DEFAULTS = MultiNeedleConfig()
LENGTH = 4096


def documents(
    needles: int,
    asked: int,
    form: FormName = "completion",
    tokenizer: str | None = None,
    pretrained: str | None = None,
    model: str | None = None,
    lengths: Sequence[int] = (LENGTH,),
    depths: Sequence[float] = tuple(DEFAULTS.depths),
    samples: int = DEFAULTS.samples,
    haystacks: int = DEFAULTS.haystacks,
    haystack: str | Sequence[str] = "stdlib",
    seed: int = DEFAULTS.seed,
    **unused: Any,
) -> DatasetDict:
    """The prompts of one (needles, asked) over lengths and depths; options as in `MultiNeedleConfig`.

    tokenizer: its directory or hub id; without one that of the harness's model (`pretrained` or `model`). Every
        length is counted in its tokens, bos and template included.
    unused: other arguments of the harness's model.
    Raises ValueError for a tokenizer that is missing or not a fast one, and for prompts that cannot be made.
    """
    from datasets import Dataset, DatasetDict

    source = tokenizer or pretrained or model
    if source is None:
        raise ValueError(
            'no tokenizer to count tokens with: give --metadata \'{"tokenizer": "DIRECTORY or hub id"}\''
        )
    words = _tokenizer(source)
    texts = _texts((haystack,) if isinstance(haystack, str) else tuple(haystack))
    rows: list[dict[str, Any]] = []
    for length in lengths:
        for draw in range(min(haystacks, samples)):
            text = make_haystack(texts, words, length, haystack_rng(seed, draw))
            indices = range(draw, samples, haystacks)
            for depth in depths:
                prompts = cell_prompts(
                    words, text, AskedNeedlesCell(needles, asked, length, depth), indices, seed, form
                )
                for index, prompt in zip(indices, prompts, strict=True):
                    where = {"length": length, "depth": depth, "index": index, "haystack": draw}
                    rows.append({**where, "prompt": prompt.text, "numbers": list(prompt.numbers)})
    return DatasetDict({"test": Dataset.from_list(rows)})


@cache
def _tokenizer(source: str) -> PreTrainedTokenizerFast:
    """As `clearhead evaluate` has it: where there is no bos token the eos token begins a text."""
    from clearhead.evals.subjects.external import ExternalLoader, ExternalSpec

    return ExternalLoader(ExternalSpec(source)).tokenizer


@cache
def _texts(sources: tuple[str, ...]) -> list[str]:
    return read_documents(sources)


def score(doc: dict[str, Any], results: list[str]) -> dict[str, float]:
    """exact: all asked numbers occur in the answer; share: of the asked ones."""
    hits = found(results[0], doc["numbers"])
    return {"exact": float(all(hits)), "share": sum(hits) / len(hits)}


def one_of_one(**metadata: Any) -> DatasetDict:
    return documents(1, 1, **metadata)


def two_of_two(**metadata: Any) -> DatasetDict:
    return documents(2, 2, **metadata)


def two_of_four(**metadata: Any) -> DatasetDict:
    return documents(4, 2, **metadata)


def two_of_six(**metadata: Any) -> DatasetDict:
    return documents(6, 2, **metadata)


def one_of_eight(**metadata: Any) -> DatasetDict:
    return documents(8, 1, **metadata)

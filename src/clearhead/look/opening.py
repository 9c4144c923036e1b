"""Opening what is looked at: a model trained here or elsewhere, and a text in its tokens."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from clearhead.evals.subjects.external import ExternalLoader, ExternalSpec, is_external
from clearhead.look.view import Mark, TokenText, check_known, depth_of, heads_of
from clearhead.runs.lock import RunError
from clearhead.train.single import find_jobs

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerFast


def open_source(source: str) -> tuple[ExternalLoader, str]:
    """What loads a source's configuration, tokenizer and model when they are asked for, and a name to show.

    A source is what `clearhead evaluate` takes: a job or its model in a run directory, a directory with a Hugging Face
    model, a GGUF file or a hub id. Raises RunError for a run with several models, which it names; the loader raises
    ValueError for what cannot be loaded.
    """
    folder, name = source, ""
    if not is_external(source):
        jobs = find_jobs(Path(source))
        if len(jobs) > 1:
            shown = ", ".join(str(job) for job in jobs[:12])
            raise RunError(f"{source!r} has {len(jobs)} trained models; name one of them: {shown}")
        folder, name = str(jobs[0] / "model"), f"{jobs[0].parent.name}, {jobs[0].name.replace('-', ' ')}"
    loader = ExternalLoader(ExternalSpec(folder))
    return loader, name or loader.spec.name


def open_model(source: str) -> tuple[PreTrainedModel, PreTrainedTokenizerFast, str]:
    """Model, tokenizer and a name to show; raises what `open_source` and its loader raise."""
    loader, name = open_source(source)
    subject = loader.subject
    tokenizer: Any = subject.tokenizer
    return subject.model, tokenizer, name


def check_layers(config: Any, layers: Sequence[int] | None) -> None:
    """Raise ValueError for a layer that a model of this configuration does not have, and for an encoder."""
    if not getattr(config, "causal", True):
        raise ValueError(
            "pages of attention maps show causal language models; of an encoder output_attentions=True gives the maps"
        )
    check_known("layer", layers, int(config.get_text_config().num_hidden_layers))


def kind_of(model: PreTrainedModel) -> str:
    """The model in a few words: its attention, layers and heads."""
    config = model.config.get_text_config()
    kinds = getattr(config, "layer_kinds", ())
    attention = " and ".join(dict.fromkeys(kind.attention for kind in kinds)) or model.config.model_type
    if len(set(kinds)) > 1:
        return f"{attention}, {depth_of(model)} layers that differ"
    return f"{attention}, {depth_of(model)} layers of {heads_of(model)} heads"


def opens_with_bos(config: Any) -> bool:
    """Whether every text that the model was trained on began with the first token, which its tokenizer does not add."""
    return bool(config.model_type == "clearhead")


def read_text(tokenizer: Any, text: str, with_bos: bool = True) -> TokenText:
    """The text in tokens as the tokenizer reads it; with_bos: behind the token that begins a text, where it has one.

    Raises ValueError for a tokenizer that does not know where its tokens lie in a text.
    """
    if not getattr(tokenizer, "is_fast", False):
        raise ValueError(
            "the tokenizer has no tokenizer.json, so it does not know where its tokens lie in a text"
        )
    found = tokenizer(text, return_offsets_mapping=True, add_special_tokens=True)
    ids, spans = list(found["input_ids"]), [tuple(span) for span in found["offset_mapping"]]
    bos = tokenizer.bos_token_id
    if with_bos and bos is not None and (not ids or ids[0] != bos):
        ids, spans = [int(bos), *ids], [(0, 0), *spans]
    return TokenText(text, ids, spans)


def find_marks(text: TokenText, wanted: list[str]) -> list[Mark]:
    """The first place of each of `wanted` in the text; ValueError for what is not in it."""
    marks = []
    for one in wanted:
        at = text.text.find(one)
        if not one or at < 0:
            raise ValueError(f"--mark {one!r} is not in the text")
        start, end = text.tokens_of(at, at + len(one))
        marks.append(Mark(one if len(one) <= 24 else f"{one[:23]}…", start, end))
    return marks

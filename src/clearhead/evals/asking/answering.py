"""Asking a model: prompts in its form, greedy answers to prompts of any lengths, likelihoods of given answers.

Legend: B batch, L tokens. What a model says never depends on what else stands in its batch: answers are decoded in
batches of one length, likelihoods are read in batches padded on the right, behind everything a causal model sees.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import NDArray
from transformers import PreTrainedTokenizerFast

from clearhead.evals.asking.decoding import AskedPrompt, answer, greedy
from clearhead.evals.asking.losses import suffix_losses
from clearhead.evals.asking.running import batches, inference, to_batch
from clearhead.evals.asking.sample_log import SampleLog, Say
from clearhead.evals.probing.adapter import adapter_of
from clearhead.evals.probing.rescaling import rescaled
from clearhead.evals.reasons import NEEDS_FAST, Unmeasured
from clearhead.evals.subject import Subject

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Ids = NDArray[np.int64]
FormName = Literal["chat", "completion"]
MARK = "⟦document⟧"
"""Stands for the document while a template is looked at; no question spells it."""


def fast_tokenizer(subject: Subject) -> PreTrainedTokenizerFast:
    """The subject's tokenizer, which can say where each token lies in a text. Raises Unmeasured for any other."""
    tokenizer = subject.tokenizer
    if not isinstance(tokenizer, PreTrainedTokenizerFast):
        raise Unmeasured(NEEDS_FAST)
    return tokenizer


def answer_log(
    subject: Subject,
    name: str,
    about: Mapping[str, Any],
    keys: tuple[str, ...],
    progress: Say | None = None,
    *,
    reopened: bool = False,
) -> SampleLog:
    """The kept answers of evaluation `name`; earlier ones count only with the same weights and the same `about`.

    about: the options, as "config", and what tells the data. reopened: see `SampleLog.open`.
    """
    told = {**about, "weights": weights_digest(subject.model)}
    return SampleLog.open(subject.folder, name, told, keys, reopened=reopened, progress=progress)


def encode(tokenizer: Any, text: str) -> Ids:
    """The tokens of a text in which bos and template are spelled out."""
    return np.array(tokenizer(text, add_special_tokens=False)["input_ids"], np.int64)


def form_of(tokenizer: PreTrainedTokenizerFast, asked: FormName | None) -> FormName:
    """`asked`, or chat where the tokenizer has a template. ValueError for chat without one."""
    if asked == "chat" and tokenizer.chat_template is None:
        raise ValueError("the tokenizer has no chat template: ask in the form 'completion'")
    return asked or ("completion" if tokenizer.chat_template is None else "chat")


def frame(
    tokenizer: PreTrainedTokenizerFast, form: FormName, intro: str, outro: str, cue: str
) -> tuple[str, str]:
    """The text before a document and the text after it.

    intro, outro: what is said around the document. cue: how the answer begins in the completion form.
    Raises ValueError for a chat template that changes the message.
    """
    if form == "completion":
        return f"{tokenizer.bos_token or ''}{intro}", f"{outro}{cue}"
    shown = str(
        tokenizer.apply_chat_template(
            [{"role": "user", "content": intro + MARK + outro}], tokenize=False, add_generation_prompt=True
        )
    )
    before, _, after = shown.rpartition(MARK)
    if not before.endswith(intro) or not after.startswith(outro.rstrip()):
        raise ValueError("the chat template does not give the message as it is: ask in the form 'completion'")
    return before, after


def greedy_answers(
    subject: Subject,
    prompts: Sequence[Ids],
    new_tokens: int,
    *,
    one_line: bool,
    batch_tokens: int = 8192,
    rope_parameters: Mapping[str, Any] | None = None,
) -> Iterator[tuple[int, str]]:
    """(index in `prompts`, answer), by length: to the end of the text, of its first line if asked, or `new_tokens`.

    White space before an answer is not part of it.
    """
    tokenizer: Any = subject.tokenizer
    for length in sorted({len(ids) for ids in prompts}):
        rows = [i for i, ids in enumerate(prompts) if len(ids) == length]
        asked = [AskedPrompt(prompts[i], (), one_line, new_tokens) for i in rows]
        with (
            rescaled(
                subject.model, rope_parameters, trained=subject.training_length, length=length + new_tokens
            ),
            inference(subject.model),
            greedy(subject.model) as settings,
        ):
            for row, text in answer(subject.model, tokenizer, asked, settings, batch_tokens=batch_tokens):
                yield rows[row], text


def continued(tokenizer: Any, prompt: str, continuation: str) -> tuple[Ids, int]:
    """The tokens of both texts together, and where those of the continuation begin.

    Where the two texts share a token it counts to the continuation, with what it holds of the prompt.
    """
    alone, whole = encode(tokenizer, prompt), encode(tokenizer, prompt + continuation)
    size = min(len(alone), len(whole))
    differ = np.nonzero(alone[:size] != whole[:size])[0]
    start = int(differ[0]) if differ.size else size
    return whole, min(start, len(whole) - 1)


def likelihoods(
    model: PreTrainedModel, rows: Sequence[tuple[Ids, int]], *, batch_tokens: int = 8192
) -> list[list[float]]:
    """Log-likelihood in nats of each token of a row from `start` on, given all tokens before it.

    rows: (tokens, start), start >= 1. Sorted by length and padded on the right; one length at a time where the rotary
    frequencies depend on the length of a call.
    """
    found: list[list[float]] = [[] for _ in rows]
    order = sorted(range(len(rows)), key=lambda i: len(rows[i][0]))
    apart = adapter_of(model).frequencies_depend_on_length()
    lengths = sorted({len(ids) for ids, _ in rows}) if apart else [0]
    for length in lengths:
        same = [i for i in order if len(rows[i][0]) == length] if apart else order
        longest = max((len(rows[i][0]) for i in same), default=1)
        with rescaled(model, length=length or None), inference(model):
            for span in batches(len(same), batch_tokens // longest):
                part = [same[k] for k in span]
                first = min(rows[i][1] for i in part)
                losses = suffix_losses(model, to_batch([rows[i][0] for i in part], model.device), first)
                for i, row in zip(part, losses.tolist(), strict=True):
                    ids, start = rows[i]
                    found[i] = [-nats for nats in row[start - first : len(ids) - first]]
    return found


def weights_digest(model: PreTrainedModel) -> str:
    """sha256 of a model's parameters: names, types, shapes and every byte."""
    import torch

    found = hashlib.sha256()
    for name, weight in model.named_parameters():
        found.update(f"{name} {weight.dtype} {tuple(weight.shape)}\n".encode())
        found.update(weight.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return found.hexdigest()

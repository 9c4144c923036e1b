"""Instruction data: conversations in JSON lines become rows whose loss is on the completions alone.

A line is {"messages": [{"role": ..., "content": ...}, ...]} or {"prompt": ..., "completion": ...}. The tokenizer's chat
template writes them; what the assistant says, with the template's end of its turn, is learned.
"""

from __future__ import annotations

import gzip
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from clearhead.data.readers import CorpusError, decode, parse, suffix_of

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

Example = dict[str, NDArray[np.int64]]
IGNORE = -100


@dataclass(frozen=True)
class Conversation:
    """Token ids, and which of them are learned."""

    ids: NDArray[np.int64]
    learned: NDArray[np.bool_]


def read_conversations(path: Path, tokenizer: PreTrainedTokenizerFast) -> list[Conversation]:
    """Every conversation of a .jsonl or .jsonl.gz file.

    Raises CorpusError, naming file and line, for what is no conversation, for a template that writes earlier messages
    in another way once later ones follow, and for a file without any.
    """
    if suffix_of(path) not in (".jsonl", ".jsonl.gz"):
        raise CorpusError(f"'{path}' is not .jsonl or .jsonl.gz: data.instructions are JSON lines")
    try:
        found = [
            encoded(record, tokenizer, f"line {number} of '{path}'") for number, record in _records(path)
        ]
    except FileNotFoundError:
        raise CorpusError(f"'{path}' is missing: restore it or correct data.instructions") from None
    except OSError as error:
        raise CorpusError(f"'{path}' cannot be read ({error.strerror or error})") from error
    if not found:
        raise CorpusError(f"'{path}' holds no conversation")
    return found


def _records(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    opener: Callable[..., Any] = gzip.open if suffix_of(path) == ".jsonl.gz" else open
    offset = 0
    with opener(path, "rb") as file:
        for number, raw in enumerate(file, start=1):
            line = decode(raw, path, offset).strip()
            offset += len(raw)
            if line:
                yield number, parse(line, path, number)


def encoded(record: dict[str, Any], tokenizer: PreTrainedTokenizerFast, where: str) -> Conversation:
    """One record as tokens. Without a chat template a prompt and its completion are written one after the other."""
    if "messages" not in record and not {"prompt", "completion"} <= set(record):
        raise CorpusError(f"{where} has neither 'messages' nor 'prompt' and 'completion'")
    if tokenizer.chat_template is None:
        if "messages" in record or not all(isinstance(record[key], str) for key in ("prompt", "completion")):
            raise CorpusError(
                f"{where} has messages, but the tokenizer has no chat template: give prompt and completion"
            )
        begin, end = tokenizer.bos_token or "", tokenizer.eos_token or ""
        text = begin + record["prompt"] + record["completion"] + end
        spans = [(len(begin) + len(record["prompt"]), len(text))]
    else:
        text, spans = templated(_messages(record, where), tokenizer, where)
    made = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    starts = np.array([first for first, _ in made["offset_mapping"]], dtype=np.int64)
    learned = np.zeros(len(starts), dtype=bool)
    for first, last in spans:
        learned |= (starts >= first) & (starts < last)
    # Nothing comes before the first token, so it cannot be asked for.
    learned[:1] = False
    return Conversation(np.array(made["input_ids"], dtype=np.int64), learned)


def templated(
    messages: Sequence[dict[str, Any]], tokenizer: PreTrainedTokenizerFast, where: str
) -> tuple[str, list[tuple[int, int]]]:
    """The conversation as the chat template writes it, and the characters that the assistant wrote."""

    def written(count: int, ask: bool) -> str:
        return str(
            tokenizer.apply_chat_template(list(messages[:count]), tokenize=False, add_generation_prompt=ask)
        )

    text, spans = written(len(messages), False), []
    for index, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        before = written(index, True) if index else ""
        after = written(index + 1, False)
        if not (after.startswith(before) and text.startswith(after)):
            raise CorpusError(
                f"{where}: the chat template writes message {index + 1} in another way once others follow, so what is "
                "learned cannot be told apart; split the conversation"
            )
        spans.append((len(before), len(after)))
    return text, spans


def _messages(record: dict[str, Any], where: str) -> list[dict[str, Any]]:
    if "messages" in record:
        found = record["messages"]
    else:
        found = [
            *_turn(record["prompt"], "user"),
            *_turn(record["completion"], "assistant"),
        ]
    fine = isinstance(found, list) and all(
        isinstance(one, dict) and isinstance(one.get("role"), str) and isinstance(one.get("content"), str)
        for one in found
    )
    if not fine or not any(one["role"] == "assistant" for one in found):
        raise CorpusError(
            f"{where}: messages must be a list of objects with a role and a content, one of them the assistant's"
        )
    return found


def _turn(value: Any, role: str) -> list[Any]:
    return value if isinstance(value, list) else [{"role": role, "content": value}]


class InstructionRows:
    """Rows of `length` tokens that hold whole conversations, each a document of its own; row i depends on seed and i.

    Every epoch takes the conversations in another order, one after the other into a row while there is room; a longer
    one is cut at `length`, and what is left of a row is padding. Conversations that teach nothing within `length`
    tokens are left out; CorpusError where that is all of them.
    """

    def __init__(
        self, conversations: Sequence[Conversation], length: int, rows: int, seed: int, pad: int
    ) -> None:
        self.conversations = [one for one in conversations if one.learned[:length].any()]
        if not self.conversations:
            raise CorpusError(
                f"data.length: no conversation has a completion within {length} tokens; lengthen the rows"
            )
        self.length = length
        self.rows = rows
        self.seed = seed
        self.pad = pad
        self._epochs: list[list[list[int]]] = []
        self._begin = [0]

    def __len__(self) -> int:
        return self.rows

    def kind(self, index: int) -> str:
        """What the row is, for the log: bits per byte are of text alone."""
        return "instructions"

    def __getitem__(self, index: int) -> Example:
        ids = np.full(self.length, self.pad, dtype=np.int64)
        labels = np.full(self.length, IGNORE, dtype=np.int64)
        positions = np.zeros(self.length, dtype=np.int64)
        at = 0
        for number in self._row(index):
            one = self.conversations[number]
            size = min(len(one.ids), self.length - at)
            here = slice(at, at + size)
            ids[here] = one.ids[:size]
            labels[here] = np.where(one.learned[:size], one.ids[:size], IGNORE)
            positions[here] = np.arange(size)
            at += size
        positions[at:] = np.arange(self.length - at)
        return {"input_ids": ids, "labels": labels, "position_ids": positions}

    def _row(self, index: int) -> list[int]:
        while self._begin[-1] <= index:
            self._epochs.append(self._packed(len(self._epochs)))
            self._begin.append(self._begin[-1] + len(self._epochs[-1]))
        epoch = int(np.searchsorted(self._begin, index, side="right")) - 1
        return self._epochs[epoch][index - self._begin[epoch]]

    def _packed(self, epoch: int) -> list[list[int]]:
        order = np.random.default_rng((self.seed, epoch)).permutation(len(self.conversations))
        rows: list[list[int]] = []
        left = 0
        for number in order.tolist():
            size = min(len(self.conversations[number].ids), self.length)
            if size > left:
                rows.append([])
                left = self.length
            rows[-1].append(number)
            left -= size
        return rows

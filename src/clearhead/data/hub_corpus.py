"""A data set of Hugging Face as a corpus: streamed, in its own order."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from clearhead.data.hub import without_waiting
from clearhead.data.readers import START, Corpus, CorpusError, Document, Place, encodable, first_line
from clearhead.extras import need


class HubCorpus(Corpus):
    """A Hugging Face dataset, streamed in its own order; `max_bytes` takes its beginning.

    The identity is the name, not the content: data already prepared is used again without asking the network.
    """

    def __init__(
        self, source: str, path: str, config: str | None, split: str, text_field: str, max_bytes: int | None
    ) -> None:
        self.source = source
        self.path = path
        self.config = config
        self.split = split
        self.text_field = text_field
        self.max_bytes = max_bytes

    def identity(self, sources: Mapping[str, str] | None = None) -> dict[str, Any]:
        return {
            "source": self.source,
            "kind": "huggingface",
            "dataset": self.path,
            "config": self.config,
            "split": self.split,
            "text_field": self.text_field,
            "max_bytes": self.max_bytes,
        }

    def read(self, begin: Place = START) -> Iterator[tuple[Document, Place]]:
        read, found = begin.read, begin.document
        if self.max_bytes is not None and read >= self.max_bytes:
            return
        for row, record in enumerate(self._records(begin.document), start=begin.document):
            if self.text_field not in record:
                fields = ", ".join(sorted(map(str, record)))
                raise CorpusError(
                    f"the dataset '{self.path}' has no field '{self.text_field}'; its fields are {fields}: "
                    "set corpus.text_field to one of them"
                )
            text = record[self.text_field]
            if text is None or (isinstance(text, str) and not text.strip()):
                continue
            if not isinstance(text, str):
                raise CorpusError(
                    f"field '{self.text_field}' of the dataset '{self.path}' is not text but "
                    f"{type(text).__name__}: set corpus.text_field to a text field"
                )
            found += 1
            document = Document(
                f"{self.path}:{row}", encodable(text, f"row {row} of the dataset '{self.path}'")
            )
            read += len(text.encode())
            yield document, Place(0, row + 1, read)
            if self.max_bytes is not None and read >= self.max_bytes:
                return
        if not found:
            raise CorpusError(
                f"the dataset '{self.path}' (split '{self.split}') holds no text: choose another split"
            )

    def _records(self, skipped: int) -> Iterator[dict[str, Any]]:
        name = f"the Hugging Face dataset '{self.path}'"
        need(f"reading {name}", "train")
        if not Path(self.path).exists():
            without_waiting()
        import datasets

        try:
            stream = datasets.load_dataset(self.path, self.config, split=self.split, streaming=True)
        except Exception as error:  # the library raises a dozen unrelated types for a wrong name
            hint = (
                ""
                if self.source.startswith("hf:")
                else f"; there is no file or directory '{self.source}' either"
            )
            raise CorpusError(f"{name} cannot be opened ({first_line(error)}){hint}") from error
        try:
            yield from stream.skip(skipped) if skipped else stream
        except OSError as error:
            raise CorpusError(f"{name} broke off while streaming ({first_line(error)}): try again") from error

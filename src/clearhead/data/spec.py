"""What is to be prepared of a text, and what it becomes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from clearhead.data.readers import CorpusError
from clearhead.data.store import TokenStore
from clearhead.data.streamed import StreamedText
from clearhead.data.tokenizer import check_vocab_size

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

Progress = Callable[[str], None]


@dataclass(frozen=True)
class TextSource:
    """One text of a mixture; its weight is its part of the rows, in proportion to the others' weights."""

    source: str
    weight: float = 1.0
    text_field: str = "text"
    max_bytes: int | None = None


@dataclass(frozen=True)
class DataSpec:
    """What to read and how to split and tokenize it; equal specs over an equal corpus give equal data.

    `validation_fraction` is a share of the documents, `seed` chooses which; `vocab_size` belongs to the
    tokenizer `"bpe"` and is ignored for others. `mask`: the tokenizer has a mask token.

    sources: several texts with weights in place of `source`. tokenized: the folder for shards of tokens; with it, or
    with `sources`, the text is read in shards and never held as a whole (`streamed`).
    """

    source: str = "stdlib"
    text_field: str = "text"
    max_bytes: int | None = None
    validation_fraction: float = 0.05
    tokenizer: str = "bpe"
    vocab_size: int = 1024
    seed: int = 0
    mask: bool = False
    sources: tuple[TextSource, ...] = ()
    tokenized: str | None = None

    @property
    def streamed(self) -> bool:
        """Whether the text becomes shards that are streamed, rather than one store."""
        return bool(self.sources) or self.tokenized is not None

    @property
    def texts(self) -> tuple[TextSource, ...]:
        """The sources, one or several."""
        return self.sources or (TextSource(self.source, 1.0, self.text_field, self.max_bytes),)

    def __post_init__(self) -> None:
        if not 0 < self.validation_fraction < 1:
            raise CorpusError(
                f"corpus.validation_fraction is {self.validation_fraction}: it must lie between 0 and 1, such as 0.05"
            )
        if self.tokenizer == "bpe":
            check_vocab_size(self.vocab_size)

    def identity(self) -> dict[str, Any]:
        """As JSON; what a key says that came later stands only where it is not the default, so that names stay."""
        later = {"mask", "sources"}
        found = {name: value for name, value in asdict(self).items() if name not in later or value}
        # Where shards lie says nothing of what they are.
        del found["tokenized"]
        return found


@dataclass(frozen=True)
class PreparedData:
    """Tokenizer, training and validation documents, and what they were made from (JSON-able `identity`)."""

    tokenizer: PreTrainedTokenizerFast
    train: TokenStore | StreamedText
    validation: TokenStore
    identity: dict[str, Any]

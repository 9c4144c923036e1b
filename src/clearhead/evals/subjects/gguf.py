"""Models in GGUF files: read by transformers, dequantised to float32, with nothing silently left out.

What the file says is all that counts: it is opened alone, so that no tokenizer or configuration of another model that
lies beside it has a part in it. Differs from a plain `from_pretrained(..., gguf_file=...)`: weights never stay packed
where a kernel for them is installed, missing weights are an error and not random numbers, and so is a rotary scaling,
which transformers does not read from GGUF files but for a few architectures.
"""

from __future__ import annotations

import json
import math
import os
import struct
import tempfile
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, NamedTuple

from clearhead.data.opening import open_pretrained
from clearhead.evals.reasons import reason_of
from clearhead.extras import need

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerFast

SUFFIX = ".gguf"
MAGIC = b"GGUF"
VERSIONS = (2, 3)
SCALED = ("rope_freqs.weight", "rope_factors_long.weight", "rope_factors_short.weight")
"""Tensors in which llama.cpp keeps the frequencies of llama3 scaling and LongRoPE."""


def is_gguf(source: str) -> bool:
    """Whether `source` names a GGUF file, there or not."""
    return source.lower().endswith(SUFFIX) and not Path(source).is_dir()


@dataclass(frozen=True)
class GgufFile:
    """What a GGUF file says of itself.

    architecture: llama.cpp's name of it. types: quantisation type -> how many tensors, most frequent first.
    scaling: the rotary scaling that is named or held in it, None without. tokens: of its vocabulary.
    """

    path: Path
    architecture: str
    types: dict[str, int]
    scaling: str | None
    tokens: int

    def sentence(self) -> str:
        """Of which numbers the weights were made."""
        counts = [f"{count} {name}" for name, count in self.types.items()]
        listed = f"{', '.join(counts[:-1])} and {counts[-1]}" if counts[1:] else counts[0]
        return f"Its weights are dequantised to float32 from {listed} tensors."


def open_gguf(path: Path) -> GgufFile:
    """The header of a GGUF file.

    Raises ValueError, in one sentence, without the package gguf, for a file that is missing, of another format or
    damaged, and for one without tensors.
    """
    if not path.is_file():
        raise ValueError(f"there is no GGUF file {str(path)!r}")
    with path.open("rb") as file:
        if file.read(len(MAGIC)) != MAGIC:
            raise ValueError(f"{str(path)!r} is not a GGUF file: it does not begin with {MAGIC.decode()!r}")
    need("reading GGUF files", "gguf")
    from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

    try:
        with path.open("rb") as file:
            metadata, tensors = _header(file)
            align = int(metadata.get("general.alignment", 32))
            begin = -(-file.tell() // align) * align
        architecture = str(metadata["general.architecture"])
        types = Counter(GGMLQuantizationType(tensor.kind).name for tensor in tensors)
        ends = []
        for tensor in tensors:
            numbers, size = GGML_QUANT_SIZES[GGMLQuantizationType(tensor.kind)]
            ends.append(begin + tensor.offset + tensor.numbers // numbers * size)
    except (ValueError, LookupError, struct.error) as error:
        raise ValueError(
            f"the GGUF file {str(path)!r} is damaged or of an unknown version ({type(error).__name__}: {error}); "
            "get it again"
        ) from error
    if not tensors:
        raise ValueError(f"the GGUF file {str(path)!r} holds no tensors: it is not a model")
    if max(ends) > path.stat().st_size:
        raise ValueError(
            f"the GGUF file {str(path)!r} ends before its tensors do: it is incomplete; get it again"
        )
    named = metadata.get(f"{architecture}.rope.scaling.type", "none")
    held = [tensor.name for tensor in tensors if tensor.name in SCALED]
    scaling = str(named) if named != "none" else held[0] if held else None
    return GgufFile(
        path, architecture, dict(types.most_common()), scaling, int(metadata.get("tokenizer.ggml.tokens", 0))
    )


NUMBERS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
"""GGUF's types of single values as struct knows them; beside them there are strings and lists."""
STRING, LIST = 8, 9


class GgufTensor(NamedTuple):
    """One line of the table of tensors. offset: in bytes from where the first one begins."""

    name: str
    numbers: int
    kind: int
    offset: int


def _header(file: BinaryIO) -> tuple[dict[str, Any], list[GgufTensor]]:
    """Metadata, with a list's length in its place, and the table of tensors.

    The package's own reader keeps every word of the vocabulary as an array, which takes seconds.
    """

    def numbers(form: str) -> tuple[Any, ...]:
        return struct.unpack(f"<{form}", file.read(struct.calcsize(f"<{form}")))

    def text() -> str:
        (size,) = numbers("Q")
        return file.read(size).decode("utf-8", "replace")

    def value(kind: int) -> Any:
        if kind == STRING:
            return text()
        if kind != LIST:
            return numbers(NUMBERS[kind])[0]
        inner, count = numbers("IQ")
        if inner in NUMBERS:
            file.seek(count * struct.calcsize(NUMBERS[inner]), os.SEEK_CUR)
        else:
            for _ in range(count):
                value(inner)
        return count

    file.seek(len(MAGIC))
    version, tensors, keys = numbers("IQQ")
    if version not in VERSIONS:
        raise ValueError(f"version {version}")
    metadata = {}
    for _ in range(keys):
        key = text()
        metadata[key] = value(*numbers("I"))
    found = []
    for _ in range(tensors):
        name = text()
        (axes,) = numbers("I")
        *sizes, kind, offset = numbers(f"{axes}QIQ")
        found.append(GgufTensor(name, math.prod(sizes), kind, offset))
    return metadata, found


def load_gguf(kind: Any, path: Path, what: str) -> Any:
    """`kind.from_pretrained` of the file: a configuration, a tokenizer or a causal language model in float32.

    Raises ValueError, in one sentence, for what transformers cannot read, for missing weights and for a rotary
    scaling that was not taken over.
    """
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    file = open_gguf(path)
    with _alone(path) as folder:
        try:
            if kind is AutoModelForCausalLM:
                return _model(folder, path)
            found = open_pretrained(kind, folder, gguf_file=path.name)
        except (OSError, ValueError, LookupError, NotImplementedError, RuntimeError) as error:
            import transformers

            raise ValueError(
                f"{what} in {str(path)!r}, of GGUF's architecture {file.architecture!r}, cannot be loaded by "
                f"transformers {transformers.__version__} ({reason_of(error)}); give the original model's directory "
                "or hub id"
            ) from error
    if kind is AutoTokenizer and len(found) > file.tokens:
        found = _within(found, file.tokens)
    if kind is AutoConfig:
        refuse_lost_scaling(file, found)
    found.name_or_path = str(path)
    return found


def refuse_lost_scaling(file: GgufFile, config: Any) -> None:
    """Raise ValueError for a configuration that lacks the rotary scaling of its file."""
    rotary = config.get_text_config().to_dict().get("rope_parameters") or {}
    if file.scaling and rotary.get("rope_type", "default") == "default":
        raise ValueError(
            f"{str(file.path)!r} has a rotary scaling ({file.scaling}) that transformers does not read from GGUF "
            "files, and would be computed without it; give the original model's directory or hub id"
        )


def _model(folder: str, path: Path) -> PreTrainedModel:
    import torch
    from transformers import AutoModelForCausalLM, GgufConfig

    loaded: Any = open_pretrained(
        AutoModelForCausalLM,
        folder,
        gguf_file=path.name,
        dtype=torch.float32,
        # Else installed kernels would keep the blocks, and what computes would depend on the machine.
        quantization_config=GgufConfig(dequantize=True),
        output_loading_info=True,
    )
    model, report = loaded
    if missing := sorted(report["missing_keys"]):
        raise ValueError(f"{len(missing)} weights are not in the file, {missing[0]!r} the first")
    model.config.name_or_path = model.name_or_path = str(path)
    return model


def _within(tokenizer: Any, size: int) -> PreTrainedTokenizerFast:
    """The tokenizer without tokens that are not in the file: transformers adds the special ones that it is used to."""
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast

    spelled = json.loads(tokenizer.backend_tokenizer.to_str())
    spelled["added_tokens"] = [token for token in spelled["added_tokens"] if token["id"] < size]
    known = {name: token for name, token in tokenizer.special_tokens_map.items() if isinstance(token, str)}
    kept = {name: token for name, token in known.items() if tokenizer.convert_tokens_to_ids(token) < size}
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(json.dumps(spelled)),
        chat_template=tokenizer.chat_template,
        **kept,
    )


@contextmanager
def _alone(path: Path) -> Iterator[str]:
    """A directory that holds nothing but this file."""
    with tempfile.TemporaryDirectory(prefix="clearhead-gguf-") as folder:
        Path(folder, path.name).symlink_to(path.resolve())
        yield folder

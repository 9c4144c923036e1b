"""What a converter is: the names, permutations and configuration of one format.

A third party adds a format with one file, a subclass of `Converter`, and one entry point in the group
`clearhead.converters` (in this project: one line of the registry).
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Protocol

import torch
from huggingface_hub.errors import StrictDataclassError
from torch import Tensor

from clearhead.convert.computing import WeightReader
from clearhead.convert.weights import ConversionError, FileWeights, MemoryWeights, TensorRecipe, Weights, same
from clearhead.models.config import ClearheadConfig

LAYER = "{layer}"
# What a configuration of transformers raises for values that are not possible.
INVALID = (ValueError, TypeError, KeyError, AttributeError, ZeroDivisionError, StrictDataclassError)


@dataclass(frozen=True)
class Source:
    """An opened checkpoint.

    name:    how it was asked for.        folder: where its tokenizer is, None where `tokenizer` is at hand.
    config:  its configuration as plain values; empty where there is none.
    files:   the files that its weights and configuration are in, for sums.
    """

    name: str
    config: Mapping[str, Any]
    weights: FileWeights | MemoryWeights
    files: tuple[Path, ...]
    folder: Path | None = None
    tokenizer: Any = None
    generation: Mapping[str, Any] | None = None

    @property
    def model_type(self) -> str | None:
        """The configuration's, if it has one."""
        return self.config.get("model_type")

    def has(self, ending: str) -> bool:
        """Whether a tensor's name ends so."""
        return any(name.endswith(ending) for name in self.weights.names())


class Computation(Protocol):
    """How a format computes: everything between the token embedding and the output matrix.

    embedding, head: the names of these two matrices, which may be one.
    """

    embedding: str
    head: str

    def hidden(self, embedded: Tensor, read: WeightReader) -> Tensor:
        """(B, L, hidden_size) embedded tokens to the states that the output matrix is multiplied with.

        read: a weight by its name in this format, in the dtype of `embedded`.
        """
        ...


@dataclass(frozen=True)
class NameLine:
    """One row of a table of names; `{layer}` stands for the layer's number.

    into, back: the order of the rows here made of theirs, and theirs made of ours.
    """

    ours: str
    theirs: str
    into: Callable[[Tensor], Tensor] = same
    back: Callable[[Tensor], Tensor] = same


@dataclass(frozen=True)
class NameTable:
    """Lines for one model, with its number of layers."""

    lines: tuple[NameLine, ...]
    layers: int

    def expanded(self) -> Iterable[NameLine]:
        """A line a tensor."""
        for line in self.lines:
            count = self.layers if LAYER in line.ours else 1
            for layer in range(count):
                yield NameLine(
                    line.ours.replace(LAYER, str(layer)),
                    line.theirs.replace(LAYER, str(layer)),
                    line.into,
                    line.back,
                )

    def incoming(self) -> dict[str, TensorRecipe]:
        """Our tensors by their name here."""
        return {line.ours: TensorRecipe((line.theirs,), line.into) for line in self.expanded()}

    def outgoing(self) -> dict[str, TensorRecipe]:
        """Their tensors by their name there."""
        return {line.theirs: TensorRecipe((line.ours,), line.back) for line in self.expanded()}


class Converter(ABC):
    """One format. Class attributes say what it can do; methods that it cannot are left out.

    exports:  whether a model of this library can be written in it.
    ignored:  endings of tensors that carry nothing, for example tables of angles.
    """

    exports: ClassVar[bool] = False
    ignored: ClassVar[tuple[str, ...]] = ("rotary_emb.inv_freq", "attn.masked_bias", "attn.bias")

    @abstractmethod
    def claims(self, source: Source) -> bool:
        """Whether the source is of this format; by its configuration and the names of its tensors."""

    @abstractmethod
    def configuration(self, source: Source) -> ClearheadConfig:
        """This library's configuration of the same model; ConversionError, naming the key, where there is none."""

    @abstractmethod
    def table(self, config: ClearheadConfig) -> NameTable:
        """Which tensor is which."""

    @abstractmethod
    def computation(self, config: Mapping[str, Any], weights: Weights, dtype: torch.dtype) -> Computation:
        """How a model in this format computes, independently of this library where it can be."""

    def incoming(self, config: ClearheadConfig, source: Source) -> dict[str, TensorRecipe]:
        """How each of our tensors is made of theirs."""
        return self.table(config).incoming()

    def written(self, config: ClearheadConfig) -> dict[str, Any]:
        """Their configuration of one of our models; ConversionError, naming the key, where there is none."""
        raise NotImplementedError

    def beside(self) -> dict[str, str]:
        """Text files of this format beside weights and configuration, by name."""
        return {}

    def outgoing(self, config: ClearheadConfig, weights: Weights) -> dict[str, TensorRecipe]:
        """How each of their tensors is made of ours."""
        return self.table(config).outgoing()

    def shapes(self, config: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
        """The tensors of a model with this configuration, without those that are tied to others."""
        raise NotImplementedError


def refuse(key: str, found: object, why: str) -> ConversionError:
    """An error about one key of a configuration."""
    return ConversionError(f"the configuration's {key} is {found!r}: {why}")

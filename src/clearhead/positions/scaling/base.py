"""What a rope scaling is: frequencies, and a factor on cos and sin, as pure functions of the request's length.

Legend: D key width, T tables.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Self

import torch
from torch import Tensor

from clearhead.registry import did_you_mean

# The keys of `rope_parameters` that no scaling has to itself.
COMMON_KEYS = ("rope_type", "rope_theta", "layout")


@dataclass(frozen=True, kw_only=True)
class RopeScaling(ABC):
    """Pair j of a head of width D turns by position · θ'_j; `frequencies` gives θ', `attention_factor` what multiplies
    cos and sin.

    head_dim:        D, even.        theta: the base of θ_j = theta^(−2j/D).
    trained_length:  L0, tokens; None where the scaling does not need it.
    keys:            the scaling's own keys of `rope_parameters`.
    depends_on_length: whether frequencies or factor depend on the request's length beyond `trained_length`.

    A subclass gives `tables`, what does not depend on the length and is kept on the model's device, and, where the
    length matters, `at`, which makes frequencies of them.
    """

    head_dim: int
    theta: float
    trained_length: int | None = None

    keys: ClassVar[tuple[str, ...]] = ()
    depends_on_length: ClassVar[bool] = False

    @classmethod
    @abstractmethod
    def from_parameters(
        cls, head_dim: int, theta: float, parameters: Mapping[str, Any], max_positions: int | None
    ) -> Self:
        """From the scaling's own keys of `rope_parameters` and the model's `max_position_embeddings`; ValueError for
        values that are missing or out of range, naming the key."""

    @abstractmethod
    def tables(self, dtype: torch.dtype = torch.float32, device: torch.device | None = None) -> Tensor:
        """(T, D/2) frequencies; the first row is for requests within the trained length."""

    def at(self, tables: Tensor, length: Tensor | None) -> Tensor:
        """(D/2,), or (..., D/2) for lengths (..., 1), in the tables' dtype and on their device."""
        return tables[0]

    def frequencies(self, length: Tensor | None = None, dtype: torch.dtype = torch.float32) -> Tensor:
        """θ'_j in radians a token: (D/2,), or (..., D/2) for request lengths (..., 1), in tokens, where they matter."""
        return self.at(self.tables(dtype, None if length is None else length.device), length)

    def attention_factor(self, length: Tensor | None = None) -> float | Tensor:
        """What multiplies cos and sin, so that logits are multiplied by its square: a number, or (..., 1)."""
        return 1.0


def plain_frequencies(head_dim: int, theta: float, dtype: torch.dtype, device: torch.device | None) -> Tensor:
    """(D/2,) θ_j = theta^(−2j/D)."""
    return 1.0 / (theta ** (torch.arange(0, head_dim, 2, dtype=dtype, device=device) / head_dim))


def base_change(
    head_dim: int, growth: float | Tensor, dtype: torch.dtype, device: torch.device | None
) -> Tensor:
    """(D/2,) or (..., D/2): what multiplies θ_j when the base becomes theta · growth^(D/(D−2)), growth^(−2j/(D−2)).

    In this form a growth of 1 changes no bit, and float32 is enough.
    """
    exponents = torch.arange(0, head_dim, 2, dtype=dtype, device=device) / (head_dim - 2)
    if isinstance(growth, Tensor):
        return growth.to(dtype) ** -exponents
    return torch.pow(growth, -exponents)


def number(
    rope_type: str,
    parameters: Mapping[str, Any],
    key: str,
    default: float | None = None,
    *,
    at_least: float | None = None,
    above: float | None = None,
) -> float:
    """The number under `key`, or `default`; ValueError naming the key if it is missing, no number or too small."""
    value = parameters.get(key)
    value = default if value is None else value
    if value is None:
        raise ValueError(f"rope_type {rope_type!r} needs the rope_parameters key {key!r}")
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise ValueError(f"rope_parameters key {key!r} must be a finite number, not {value!r}")
    if at_least is not None and value < at_least:
        raise ValueError(f"rope_parameters key {key!r} must be at least {at_least:g}, not {value}")
    if above is not None and value <= above:
        raise ValueError(f"rope_parameters key {key!r} must be greater than {above:g}, not {value}")
    return float(value)


def original_length(rope_type: str, parameters: Mapping[str, Any], max_positions: int | None) -> int:
    """L0: `original_max_position_embeddings`, or else the model's `max_position_embeddings`."""
    value = parameters.get("original_max_position_embeddings")
    if value is None:
        value = max_positions
    if value is None:
        raise ValueError(
            f"rope_type {rope_type!r} must know the trained length: give the rope_parameters key "
            "'original_max_position_embeddings'"
        )
    if isinstance(value, bool) or not isinstance(value, int) or value < 2:
        raise ValueError(
            f"rope_parameters key 'original_max_position_embeddings' must be an integer of at least 2, not {value!r}"
        )
    return value


def check_base_change(rope_type: str, head_dim: int) -> None:
    """Raise ValueError where the exponent D/(D − 2) of a changed base has no value."""
    if head_dim < 4:
        raise ValueError(f"rope_type {rope_type!r} changes the base of pairs: head_dim must be at least 4")


def check_keys(owner: str, parameters: Mapping[str, Any], known: Iterable[str]) -> None:
    """Raise ValueError for a key that `owner` does not have, with the nearest one that it has."""
    known = tuple(known)
    for key in parameters:
        if key not in known:
            raise ValueError(f"{owner} has no rope_parameters key {key!r}: {did_you_mean(key, known)}")

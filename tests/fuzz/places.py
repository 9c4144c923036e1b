"""Random position methods, and the exact place of every query and key for them."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tests.fuzz.draw import Draw
from tests.fuzz.exact import Place, Turn, turn_of

# Scalings count from here. The base is small, so that slow pairs turn enough to be seen.
TRAINED = 8
BY_LENGTH = ("dynamic", "longrope")
KINDS = ("linear", "ntk", "dynamic", "yarn", "llama3", "longrope")


@dataclass(frozen=True)
class Method:
    """A position method by name, with its `rope_parameters`."""

    name: str = "rope"
    parameters: dict[str, Any] | None = None

    @property
    def rotates(self) -> bool:
        return self.name in ("rope", "xpos")

    @property
    def layout(self) -> str:
        return str((self.parameters or {}).get("layout", "half"))

    @property
    def by_length(self) -> bool:
        """Whether the length of the request decides how its tokens turn."""
        return self.name == "rope" and (self.parameters or {}).get("rope_type") in BY_LENGTH

    @property
    def xpos(self) -> dict[str, float]:
        """γ and the scale base of xPos, as `exact.Spec` takes them."""
        given = self.parameters or {}
        return {
            "gamma": given.get("xpos_gamma", 0.4),
            "scale_base": given.get("xpos_scale_base", 512.0),
        }


def method_for(draw: Draw, width: int, must_rotate: bool) -> Method:
    """One that heads of `width` can have; collinear attention `must_rotate`."""
    names = [] if must_rotate else ["nope", "alibi"]
    if width % 2 == 0:
        names += ["rope", "rope", "rope", "xpos"]
    name = draw.among(names)
    if name in ("nope", "alibi"):
        return Method(name)
    parameters: dict[str, Any] = {"rope_theta": draw.one(10_000.0, 50.0, 50.0)}
    if draw.chance(0.3):
        parameters["layout"] = "interleaved"
    if name == "xpos":
        if draw.chance(0.5):
            parameters |= {"xpos_gamma": draw.number(0.2, 1.0), "xpos_scale_base": draw.number(16, 64)}
        return Method(name, parameters)
    if draw.chance(0.6) and width >= 4:
        parameters["rope_theta"] = 50.0
        parameters |= _scaling(draw, draw.among(KINDS), width)
    return Method(name, parameters)


def _scaling(draw: Draw, kind: str, width: int) -> dict[str, Any]:
    made: dict[str, Any] = {"rope_type": kind, "factor": draw.one(1.0, 2.0, 4.0)}
    if kind == "yarn":
        made |= {"beta_fast": 1.2, "beta_slow": 0.1, "truncate": draw.chance(0.5)}
        if draw.chance(0.3):
            made["attention_factor"] = draw.number(0.7, 1.4)
    if kind == "llama3":
        made |= {"low_freq_factor": 0.1, "high_freq_factor": 1.4}
    if kind == "longrope":
        made["short_factor"] = [draw.number(1.0, 1.5) for _ in range(width // 2)]
        made["long_factor"] = [draw.number(1.5, 4.0) for _ in range(width // 2)]
    return made


def turn(method: Method, width: int, lengths: Tensor) -> Turn:
    """How tokens turn whose requests are `lengths` (B or 1, N) tokens long."""
    if not method.rotates:
        shape = (*lengths.shape, max(1, width // 2))
        return Turn(torch.zeros(shape, dtype=torch.float64), torch.ones(*lengths.shape, 1).double())
    return turn_of(width, method.parameters or {}, TRAINED, lengths)


def place_of(
    method: Method,
    width: int,
    positions: Tensor,
    key_positions: Tensor,
    see: Tensor,
    lengths: Tensor,
    key_lengths: Tensor,
    bias: Tensor | None = None,
    distance: Tensor | None = None,
) -> Place:
    """`exact.Place`; positions and lengths are (B or 1, L) and (B or 1, S).

    distance: (B or 1, L, S) between places, for ALiBi; by default that of the last L of S places.
    """
    L, S = positions.shape[1], key_positions.shape[1]
    if distance is None:
        distance = (torch.arange(S)[None] - (torch.arange(L) + S - L)[:, None]).abs().double()[None]
    turned, key_turned = turn(method, width, lengths), turn(method, width, key_lengths)
    return Place(positions, key_positions, turned, key_turned, see, bias, distance)


def request_lengths(positions: Tensor, documents: Tensor | None, real: Tensor | None) -> Tensor:
    """(B, N): the longest real position + 1 of each token's row or document."""
    rows = []
    for b in range(positions.shape[0]):
        here = positions[b] if real is None else torch.where(real[b], positions[b], 0)
        if documents is None:
            rows.append(torch.full_like(here, int(here.max()) + 1))
            continue
        rows.append(torch.stack([here[documents[b] == documents[b, i]].max() + 1 for i in range(len(here))]))
    return torch.stack(rows)

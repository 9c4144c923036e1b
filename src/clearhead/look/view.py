"""A model's view of one text, small enough for a page: the largest weights of every row and exact shares of all.

What is kept of a row are the keys with the largest weight in either stream (the second times λ); what they leave out is
stated. Weights have 16 bits: a step is 1.5e-5.
"""

from __future__ import annotations

import base64
import zlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray

from clearhead.look.maps import Rows, see_maps

if TYPE_CHECKING:
    from transformers import PreTrainedModel

STEPS = 65535
FEWEST_KEYS = 4
MOST_KEYS = 512
BYTES = 4_200_000
"""Of packed weights by default, which make a page of less than 5 MB."""


@dataclass(frozen=True)
class TokenText:
    """A text in a model's tokens: ids, and where each lies in the text (characters from, to)."""

    text: str
    ids: list[int]
    spans: list[tuple[int, int]]

    def tokens_of(self, start: int, end: int) -> tuple[int, int]:
        """The tokens that hold the characters from `start` to `end`."""
        inside = [i for i, (a, b) in enumerate(self.spans) if a < end and b > start]
        return (inside[0], inside[-1] + 1) if inside else (0, 0)


@dataclass(frozen=True)
class Mark:
    """A part of the text that one wants to know the share of, such as the answer to its question."""

    name: str
    start: int
    end: int


@dataclass
class View:
    """Everything a page needs of one model. Shapes: layers, H heads, rows (queries from `first` on), marks.

    heads: the numbers of each layer's heads; a block is one head of one layer, layer after layer.
    keys, weights: what is kept, flat, row after row; a row at position p keeps min(most, p + 1) keys, in their order.
    shares: (blocks, rows, streams, marks), the mass of each stream on each mark. The first mark is the first token.
    gates: (blocks, rows), λ; None where all layers have one stream. kept: (blocks, rows, streams), the kept keys' mass.
    single: for each layer whether it has one stream, in a view that has two: the second and λ are zero there.
    """

    name: str
    kind: str
    text: TokenText
    marks: list[Mark]
    first: int
    most: int
    streams: int
    heads: list[list[int]]
    single: list[bool]
    keys: NDArray[np.uint16]
    weights: list[NDArray[np.uint16]]
    shares: NDArray[np.uint16]
    kept: NDArray[np.uint16]
    gates: NDArray[np.float32] | None
    layers: list[int] = field(default_factory=list)

    def packed(self) -> dict[str, Any]:
        """As JSON: numbers in the open, arrays packed. Places in the text count as JavaScript does, in UTF-16."""
        sizes = [2 if ord(letter) > 0xFFFF else 1 for letter in self.text.text]
        places = [0, *np.cumsum(sizes).tolist()]
        arrays: dict[str, NDArray[Any]] = {"keys": self.keys, "shares": self.shares, "kept": self.kept}
        arrays |= {f"weights{i}": w for i, w in enumerate(self.weights)}
        if self.gates is not None:
            arrays["gates"] = self.gates
        return {
            "name": self.name,
            "kind": self.kind,
            "text": self.text.text,
            "spans": [(places[a], places[b]) for a, b in self.text.spans],
            "marks": [[mark.name, mark.start, mark.end] for mark in self.marks],
            "first": self.first,
            "most": self.most,
            "streams": self.streams,
            "heads": self.heads,
            "single": self.single,
            "layers": self.layers,
            "arrays": {name: _packed(array) for name, array in arrays.items()},
        }


def make_view(
    model: PreTrainedModel,
    text: TokenText,
    *,
    name: str,
    kind: str,
    marks: Sequence[Mark] = (),
    layers: Sequence[int] | None = None,
    heads: Sequence[int] | None = None,
    last: int | None = None,
    limit: int = BYTES,
    every_key: bool = False,
) -> View:
    """Read the text once and keep what fits into `limit` bytes.

    layers, heads: those to show, by default all. last: only the last so many tokens as queries; by default all, or as
    many as leave room for FEWEST_KEYS keys each. every_key: leave no key of a row out, whatever the limit.
    Raises ValueError for a layer or head that is not there, and for a text of no or too many tokens.
    """
    length = len(text.ids)
    if not 1 <= length <= STEPS:
        raise ValueError(f"the text has {length} tokens; between 1 and {STEPS:,} can be shown")
    for what, asked in (("layers", layers), ("heads", heads)):
        if asked is not None and not list(asked):
            raise ValueError(f"{what} is empty; name at least one, or leave it out for all")
    if last is not None and last < 1:
        raise ValueError(f"last must be at least 1, not {last}")
    keeper = _Keeper(text, [Mark("first token", 0, 1), *marks], layers, heads, last, limit, every_key)
    keeper.prepare(model)
    see_maps(model, torch.tensor(text.ids), keeper.see, keeper.first)
    return keeper.view(name, kind)


def depth_of(model: PreTrainedModel) -> int:
    """Layers."""
    return int(model.config.get_text_config().num_hidden_layers)


def heads_of(model: PreTrainedModel) -> int:
    """Heads that have a map of their own: those of one stream, half of the twin's in V1."""
    layers: Any = getattr(model.base_model, "layers", None)
    variant = getattr(getattr(layers[0], "self_attn", None), "variant", None) if layers else None
    if variant is not None:
        return int(variant.sizes.heads)
    return int(model.config.get_text_config().num_attention_heads)


class _Keeper:
    """Takes one layer's rows after the other and keeps the little of them that is shown."""

    def __init__(
        self,
        text: TokenText,
        marks: list[Mark],
        layers: Sequence[int] | None,
        heads: Sequence[int] | None,
        last: int | None,
        limit: int,
        every_key: bool,
    ) -> None:
        self.text, self.marks, self.limit, self.every_key = text, marks, limit, every_key
        self.wanted = None if layers is None else list(dict.fromkeys(layers))
        self.heads = None if heads is None else list(dict.fromkeys(heads))
        self.last = last
        self.first = self.most = 0
        self.parts: dict[int, list[dict[str, Any]]] = {}
        self.shown: dict[int, list[int]] = {}
        self.streams = 1

    def prepare(self, model: PreTrainedModel) -> None:
        """Choose how many rows and keys there is room for."""
        depth, width = depth_of(model), heads_of(model)
        check_known("layer", self.wanted, depth)
        shown = len(self.wanted if self.wanted is not None else range(depth)) * (
            len(self.heads) if self.heads is not None else width
        )
        length = len(self.text.ids)
        # A key and up to two weights of two bytes each, and what a row has once.
        room = self.limit // shown
        rows = min(length, self.last or length, max(1, room // (6 * FEWEST_KEYS + 4 * (len(self.marks) + 2))))
        self.first = length - rows
        kept = (room // rows - 4 * (len(self.marks) + 2)) // 6
        self.most = length if self.every_key else int(np.clip(kept, FEWEST_KEYS, MOST_KEYS))

    def see(self, rows: Rows) -> None:
        if self.wanted is not None and rows.layer not in self.wanted:
            return
        there = rows.streams[0].shape[0]
        check_known("head", self.heads, there)
        pick = list(range(there)) if self.heads is None else self.heads
        self.shown[rows.layer] = pick
        streams = [stream[pick].float() for stream in rows.streams]
        gates = None if rows.weights is None else rows.weights[pick].float()
        self.streams = max(self.streams, len(streams))
        # What draws the eye in either stream: the second counts as it is subtracted.
        size = streams[0] if gates is None else torch.maximum(streams[0], gates.abs()[..., None] * streams[1])
        most = min(self.most, size.shape[-1])
        positions = torch.arange(rows.first, rows.first + size.shape[1], device=size.device)[:, None]
        later = torch.arange(size.shape[-1], device=size.device) > positions
        # A key after the query is chosen last, and then sorted behind the others.
        keys = size.masked_fill(later, -1.0).topk(most, dim=-1).indices
        keys = torch.where(keys > positions, size.shape[-1], keys).sort(-1).values
        keys = keys.clamp_max(size.shape[-1] - 1).cpu()
        places = torch.arange(most) <= positions.cpu()
        taken = [stream.cpu().gather(-1, keys) for stream in streams]
        marked = [
            torch.stack([stream[..., mark.start : mark.end].sum(-1) for mark in self.marks], -1).cpu()
            for stream in streams
        ]
        self.parts.setdefault(rows.layer, []).append(
            {
                "keys": [keys[h][places] for h in range(len(pick))],
                "weights": [[one[h][places] for h in range(len(pick))] for one in taken],
                "shares": torch.stack(marked, 2),
                "kept": torch.stack([(one * places).sum(-1) for one in taken], -1),
                "gates": None if gates is None else gates.cpu(),
            }
        )

    def view(self, name: str, kind: str) -> View:
        layers = sorted(self.parts)
        blocks: dict[str, list[torch.Tensor]] = {name: [] for name in ("keys", "shares", "kept", "gates")}
        weights: list[list[torch.Tensor]] = [[] for _ in range(self.streams)]
        for layer in layers:
            parts = self.parts[layer]
            for h in range(len(self.shown[layer])):
                blocks["keys"] += [part["keys"][h] for part in parts]
                for s, found in enumerate(weights):
                    for part in parts:
                        there = s < len(part["weights"])
                        found.append(part["weights"][s][h] if there else torch.zeros(len(part["keys"][h])))
                for what in ("shares", "kept"):
                    # (rows, streams, ...): a layer with one stream has zeros for the second.
                    whole = torch.cat([part[what][h] for part in parts])
                    none = torch.zeros_like(whole[:, :1]).repeat_interleave(self.streams - whole.shape[1], 1)
                    blocks[what].append(torch.cat([whole, none], 1))
                for part in parts:
                    gates = torch.zeros(part["kept"].shape[:2]) if part["gates"] is None else part["gates"]
                    blocks["gates"].append(gates[h])
        shares = torch.stack(blocks["shares"])
        gates = torch.cat(blocks["gates"]).view(shares.shape[:2])
        return View(
            name=name,
            kind=kind,
            text=self.text,
            marks=self.marks,
            first=self.first,
            most=self.most,
            streams=self.streams,
            heads=[self.shown[layer] for layer in layers],
            single=[len(self.parts[layer][0]["weights"]) == 1 for layer in layers],
            keys=torch.cat(blocks["keys"]).numpy().astype(np.uint16),
            weights=[_steps(torch.cat(one)) for one in weights],
            shares=_steps(shares),
            kept=_steps(torch.stack(blocks["kept"])),
            gates=gates.numpy().astype(np.float32) if self.streams > 1 else None,
            layers=layers,
        )


def _steps(values: torch.Tensor) -> NDArray[np.uint16]:
    """Weights from 0 to 1 in 16 bits."""
    return (values.double().clamp(0, 1) * STEPS).round().numpy().astype(np.uint16)


def check_known(what: str, asked: Sequence[int] | None, there: int) -> None:
    for one in asked or ():
        if not 0 <= one < there:
            raise ValueError(f"{what} {one} is not there: the model has {what}s 0 to {there - 1}")


def _packed(array: NDArray[Any]) -> str:
    little = np.ascontiguousarray(array).astype(array.dtype.newbyteorder("<"))
    return base64.b64encode(zlib.compress(little.tobytes(), 9)).decode()

"""Attention maps of one text, layer by layer and stream by stream, without holding those of all layers.

Legend: H query heads of one stream, L queries, S keys.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from clearhead.core.streams import repeat_kv
from clearhead.evals.asking.running import inference
from clearhead.evals.probing.attention_rows import diff_llama_lambda
from clearhead.evals.probing.recorder import Recorded, recorded

if TYPE_CHECKING:
    from transformers import PreTrainedModel

MOST_WEIGHTS = 2**28
"""Weights of one map that are held at a time: 1 GB in float32."""


@dataclass(frozen=True)
class Rows:
    """What the queries `first`, `first + 1`, ... of one layer take of every key.

    streams: (H, L, S) a stream, each row a softmax.
    weights: (H, L), what the second stream is multiplied with before it is subtracted; None with one stream.
    """

    layer: int
    first: int
    streams: tuple[Tensor, ...]
    weights: Tensor | None = None

    @property
    def effective(self) -> Tensor:
        """(H, L, S): A1 − λ A2, or the only stream."""
        if self.weights is None:
            return self.streams[0]
        return self.streams[0] - self.weights[..., None] * self.streams[1]


See = Callable[[Rows], None]


def see_maps(model: PreTrainedModel, ids: Tensor, see: See, first: int = 0) -> None:
    """Read `ids` (L,) once and hand the maps of every layer to `see`, in blocks of queries from `first` on.

    Models of this library are read through the backend they have, and their streams come apart. Of other models the
    maps are those they give themselves (`attn_implementation="eager"`): one stream, two for Hugging Face's DiffLlama.
    Raises ValueError for a model that gives none, and for a text whose maps do not fit into memory.
    """
    ids = ids.to(model.device)[None]
    if model.config.model_type == "clearhead":
        with inference(model, length=ids.shape[1]), recorded(model, _blocks(model, see, first)):
            model(input_ids=ids, use_cache=False, logits_to_keep=1)
        return
    heads = int(model.config.get_text_config().num_attention_heads)
    if heads * ids.shape[1] ** 2 > 8 * MOST_WEIGHTS:
        raise ValueError(
            f"{ids.shape[1]} tokens are too many for the maps of {type(model).__name__}, which makes a layer's whole "
            "map at once; give a shorter text"
        )
    with inference(model, "eager", length=ids.shape[1]), _handed_on(model, see, first) as seen:
        maps = model(input_ids=ids, use_cache=False, output_attentions=True).attentions
    if not seen:
        if not maps or any(one is None for one in maps):
            raise ValueError(
                f"{type(model).__name__} gives no attention maps, so there is nothing to look at"
            )
        for layer, one in enumerate(maps):
            see(Rows(layer, first, (one[0, :, first:].float(),)))


def _blocks(model: Any, see: See, first: int) -> Callable[[Recorded], None]:
    """Turns one layer's queries and keys into maps, a block of queries at a time."""

    def record(found: Recorded) -> None:
        _, heads, length, _ = found.q[0].shape
        wide = torch.float64 if found.q[0].dtype == torch.float64 else torch.float32
        gate = None if found.before is None or len(found.q) == 1 else found.before.gate
        block = max(1, MOST_WEIGHTS // (heads * length * len(found.q)))
        keys = [repeat_kv(k, heads)[0].to(wide) for k in found.k]
        for start in range(first, length, block):
            rows = slice(start, min(start + block, length))
            streams = tuple(
                _softmax(q[0, :, rows].to(wide), k, found, rows) for q, k in zip(found.q, keys, strict=True)
            )
            weights = None
            if gate is not None:
                whole = gate.to(wide).broadcast_to(1, heads, length, 1)
                weights = whole[0, :, rows, 0]
            see(Rows(found.layer, start, streams, weights))

    return record


def _softmax(q: Tensor, k: Tensor, found: Recorded, rows: slice) -> Tensor:
    """Causal: queries (H, L, D) of the positions `rows` against all keys (H, S, D)."""
    places = torch.arange(k.shape[1], device=k.device)
    back = places[rows, None] - places[None, :]
    logits = q @ k.mT * found.scale
    if found.slopes is not None:
        logits = logits - found.slopes.to(logits)[:, None, None] * back
    hidden = back < 0 if found.window is None else (back < 0) | (back >= found.window)
    return logits.masked_fill(hidden, float("-inf")).softmax(-1)


@contextmanager
def _handed_on(model: nn.Module, see: See, first: int) -> Iterator[list[int]]:
    """Inside, attention modules hand their maps to `see` and on to the model but a scrap; yields the layers seen."""
    seen: list[int] = []

    def hook(module: Any, arguments: Any, output: Any) -> Any:
        if not isinstance(output, tuple) or len(output) < 2:
            return None
        maps = output[1]
        if not isinstance(maps, Tensor) or maps.dim() != 4:
            return None
        seen.append(module.layer_idx)
        see(_rows(module, maps[0, :, first:].float(), first))
        return (output[0], maps[..., :1, :1], *output[2:])

    with ExitStack() as stack:
        for module in model.modules():
            # What knows its own place among the layers is their attention.
            if isinstance(module.__dict__.get("layer_idx"), int):
                stack.callback(module.register_forward_hook(hook, prepend=True).remove)
        yield seen


def _rows(module: Any, maps: Tensor, first: int) -> Rows:
    if type(module).__name__ != "DiffLlamaAttention":
        return Rows(module.layer_idx, first, (maps,))
    signal, noise = maps.chunk(2, dim=0)
    weight = diff_llama_lambda(module).expand(signal.shape[:2])
    return Rows(module.layer_idx, first, (signal, noise), weight)

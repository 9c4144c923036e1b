"""One row of the attention maps of every layer, without holding the maps of all layers.

Each layer's map is cut to the rows that are wanted as soon as the layer has made it, so at most one whole map (B, H,
L, S) is held, whatever the depth. The maps are those of the attention written out (`attn_implementation="eager"`):
the effective ones, A1 − λ A2, of this library's differential variants. Hugging Face's DiffLlama gives the softmax
maps of both its streams side by side; their difference is taken here.

Legend: B batch, H query heads, L queries, S keys.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def query_rows(model: PreTrainedModel, ids: Tensor, queries: Tensor) -> list[Tensor]:
    """For each layer the weights (B, H, L) of one query of each row, `queries` (B,), in ids (B, L).

    Inside one pass at most one layer's whole map is held, where attention modules hand out their maps (they do in this
    library and in Hugging Face's); else all maps that the model returns. Raises ValueError when there are none.
    """
    with _cut_to(model, queries) as rows:
        maps = model(input_ids=ids, use_cache=False, output_attentions=True).attentions
    if rows:
        return rows
    if not maps or any(layer is None for layer in maps):
        raise ValueError(
            f"{type(model).__name__} gives no attention maps, so their shares cannot be measured"
        )
    return [_rows(layer, queries) for layer in maps]


@contextmanager
def _cut_to(model: nn.Module, queries: Tensor) -> Iterator[list[Tensor]]:
    """Inside, attention modules hand on no map but the rows of `queries`, which are also in the list, by layer."""
    found: list[Tensor] = []

    def hook(module: nn.Module, arguments: Any, output: Any) -> Any:
        if not isinstance(output, tuple) or len(output) < 2:
            return None
        maps = output[1]
        if not isinstance(maps, Tensor) or maps.dim() != 4 or maps.shape[-2] <= int(queries.max()):
            return None
        rows = _effective(module, _rows(maps, queries))
        found.append(rows)
        return (output[0], rows[:, :, None], *output[2:])

    with ExitStack() as stack:
        for module in model.modules():
            # What knows its own place among the layers is their attention.
            if isinstance(module.__dict__.get("layer_idx"), int):
                stack.callback(module.register_forward_hook(hook, prepend=True).remove)
        yield found


def _rows(maps: Tensor, queries: Tensor) -> Tensor:
    """(B, H, L, S) -> (B, H, S): copied, so that the maps can go."""
    return maps[torch.arange(len(maps)), :, queries].clone()


def _effective(module: Any, rows: Tensor) -> Tensor:
    """(B, H, S) of any attention, (B, 2H, S) -> (B, H, S) of Hugging Face's DiffLlama: A1 − λ A2."""
    if type(module).__name__ != "DiffLlamaAttention":
        return rows
    signal, noise = rows.chunk(2, dim=1)
    return signal - diff_llama_lambda(module) * noise


def diff_llama_lambda(module: Any) -> Tensor:
    """λ of one attention layer of Hugging Face's DiffLlama, a scalar in float32."""
    first = (module.lambda_q1 * module.lambda_k1).float().sum().exp()
    second = (module.lambda_q2 * module.lambda_k2).float().sum().exp()
    found: Tensor = first - second + module.lambda_init
    return found

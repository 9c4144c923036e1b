"""Which layers and heads of a plain model a retrofit changes.

Legend: B batch, H heads, L queries, S keys.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from clearhead.convert.check import token_ids
from clearhead.convert.computing import ModelComputation, WeightReader
from clearhead.convert.weights import Weights
from clearhead.models.config import ClearheadConfig
from clearhead.registry import did_you_mean

LAYERS = ("all", "upper", "alternate")
RULE = (
    "in each layer the heads whose attention has the highest entropy over the text, relative to the largest that the "
    "number of visible keys allows, averaged over the tokens"
)


def chosen_layers(asked: str | Sequence[int], depth: int) -> tuple[int, ...]:
    """Layer numbers: "all", "upper" (the upper half), "alternate" (every second, the last among them), or numbers.

    ValueError for another word and for numbers that the model does not have.
    """
    if isinstance(asked, str):
        if asked not in LAYERS:
            raise ValueError(
                f"--layers {asked!r} is neither numbers such as 0,3,5 nor one of {', '.join(LAYERS)}; "
                f"{did_you_mean(asked, LAYERS)}"
            )
        first, step = {"all": (0, 1), "upper": (depth // 2, 1), "alternate": ((depth + 1) % 2, 2)}[asked]
        return tuple(range(first, depth, step))
    found = tuple(sorted(asked))
    if not found or len(set(found)) < len(found) or found[0] < 0 or found[-1] >= depth:
        raise ValueError(f"--layers must name layers from 0 to {depth - 1}, each once; got {list(asked)}")
    return found


def relative_entropy(maps: Tensor) -> Tensor:
    """(H,): the entropy of each head's rows (B, H, L, S) over log(keys that a causal row sees), averaged.

    The first row sees one key and is left out; a row over n keys has at most log(n).
    """
    weights = maps.double()
    entropy = -(weights * weights.clamp(min=1e-300).log()).sum(-1)
    most = torch.arange(1, maps.shape[-2] + 1, dtype=torch.float64).log()
    return (entropy[..., 1:] / most[1:]).mean(dim=(0, 2))


def measured_entropy(
    config: ClearheadConfig, weights: Weights, tokenizer: Any, text: str | None
) -> list[list[float]]:
    """The relative entropy of every head of every layer, on a text or on the one that conversions are checked with."""
    from clearhead.models.causal import ClearheadForCausalLM

    longest = max(2, config.max_position_embeddings)
    if text is None:
        ids = token_ids(tokenizer, config.vocab_size)[:longest]
    elif tokenizer is None:
        raise ValueError("--text needs the model's tokenizer, and there is none beside its weights")
    else:
        ids = tokenizer.encode(text)[: min(longest, 512)]
    if len(ids) < 2:
        raise ValueError("--text has fewer than two tokens")
    computation = ModelComputation(ClearheadForCausalLM, config, torch.float32)
    embedded = weights.take(computation.embedding, ids).float()[None]
    maps = computation.maps(embedded, WeightReader(weights, torch.float32))
    return [relative_entropy(layer).tolist() for layer in maps]


def highest(entropies: Sequence[float], share: float) -> list[int]:
    """The numbers of the ⌈share · H⌉ heads with the highest entropy."""
    count = max(1, math.ceil(share * len(entropies) - 1e-9))
    ranked = sorted(range(len(entropies)), key=lambda head: (-entropies[head], head))
    return sorted(ranked[:count])

"""A key-value cache that keeps some of a prompt's tokens.

Legend: B batch, G key-value heads, N tokens, S keys.
"""

import math
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedConfig
from transformers.cache_utils import (
    Cache,
    DynamicLayer,
    DynamicSlidingWindowLayer,
    get_layer_types_and_kwargs,
)

from clearhead.core.attend import Mix
from clearhead.core.masks import MaskSpec
from clearhead.core.streams import Streams, check_whole
from clearhead.models.config import ClearheadConfig
from clearhead.models.eviction import OF_KEYS, POLICIES, RANKS, Policies, Prompt, kept


class EvictingLayer(DynamicLayer):
    """One layer's keys and values, of the prompt those that are kept: other ones in every key-value head.

    To masks it is a layer that has dropped its first tokens, though what it dropped lay anywhere.
    """

    is_croppable = False

    def __init__(self) -> None:
        super().__init__()
        self.dropped = 0
        # (B, kept): which of the kept ones are no padding; None where none was dropped.
        self.real: Tensor | None = None
        self.done = False

    def get_seq_length(self) -> int:
        """Tokens seen, whether they were kept or not: positions go on from here."""
        return self.dropped + super().get_seq_length()

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.get_seq_length() - self.dropped + query_length, self.dropped

    def keep(self, places: Tensor, real: Tensor | None) -> None:
        """Keep the tokens at `places` (B, G, n) of each head, and note which of them are no padding."""
        self.done = True
        assert self.keys is not None and self.values is not None
        if places.shape[2] == self.keys.shape[2]:
            return
        self.dropped = self.keys.shape[2] - places.shape[2]
        self.keys, self.values = (
            x.gather(2, places[..., None].expand(-1, -1, -1, x.shape[3])) for x in (self.keys, self.values)
        )
        if real is None:
            real = torch.ones(self.keys.shape[0], 1, dtype=torch.bool, device=self.keys.device)
            self.real = real.expand(-1, places.shape[2])
        else:
            self.real = real.gather(1, places[:, 0])

    def crop(self, tokens_to_remove: int) -> None:
        if self.dropped and self.keys is not None and -tokens_to_remove > self.keys.shape[2]:
            raise ValueError(f"crop({tokens_to_remove}) reaches tokens that were evicted")
        super().crop(tokens_to_remove)

    def reset(self) -> None:
        super().reset()
        self.dropped, self.real, self.done = 0, None, False

    def reorder_cache(self, beam_idx: Tensor) -> None:
        super().reorder_cache(beam_idx)  # type: ignore[arg-type]
        self.real = None if self.real is None else self.real.index_select(0, beam_idx.to(self.real.device))

    def batch_repeat_interleave(self, repeats: int) -> None:
        super().batch_repeat_interleave(repeats)
        self.real = None if self.real is None else self.real.repeat_interleave(repeats, 0)

    def batch_select_indices(self, indices: Tensor) -> None:
        super().batch_select_indices(indices)
        self.real = None if self.real is None else self.real[indices]


class EvictingCache(Cache):
    """Of a prompt a part of the tokens, chosen once when it has been read; what is generated is added.

    `model.generate(..., past_key_values=EvictingCache(model.config, "snapkv", budget=0.25))`.

    policy: one of `eviction.POLICIES`, by the names of kvpress.   budget: the part of a prompt's tokens that is kept,
        above 0 and at most 1, in every key-value head of layers without a window.
    rank:   for differential attention, what "attention" is to a policy: "effective", |A1 − λ A2|, or "signal", A1.
    sinks, window, pool, seed: numbers of the policies, see `eviction`.
    The prompt is the first call's tokens, which see one another in full. Positions are those of the whole text.
    Padding is evicted first. Models of other families hand a cache keys and values alone: they take the policies that
    look at keys (streaming_llm, knorm, random), and no padding.
    Raises ValueError for other names and numbers, and for models whose logits need every key's place: compact caches,
    ALiBi.
    """

    def __init__(
        self,
        config: PreTrainedConfig,
        policy: str = "snapkv",
        budget: float = 0.5,
        *,
        rank: str = "effective",
        sinks: int = 4,
        window: int = 64,
        pool: int = 5,
        seed: int = 0,
    ) -> None:
        if policy not in POLICIES:
            raise ValueError(f"policy must be one of {', '.join(POLICIES)}, not {policy!r}")
        if rank not in RANKS:
            raise ValueError(f"rank must be one of {', '.join(RANKS)}, not {rank!r}")
        if isinstance(budget, bool) or not isinstance(budget, (int, float)) or not 0 < budget <= 1:
            raise ValueError(f"budget must be above 0 and at most 1, the part that is kept, not {budget!r}")
        for name, value, least in (("sinks", sinks, 0), ("window", window, 1), ("pool", pool, 1)):
            check_whole(name, value, least)
        if pool % 2 == 0:
            raise ValueError(f"pool must be odd, not {pool}: a token and its neighbours to either side")
        text = config.get_text_config(decoder=True)
        self._own = isinstance(text, ClearheadConfig)
        _check(text, policy)
        self.policy, self.budget, self.rank = policy, budget, rank
        self._policies = Policies(sinks, window, pool, seed)
        super().__init__(
            layers=[
                DynamicSlidingWindowLayer(own["sliding_window"])
                if "sliding_window" in own
                else EvictingLayer()
                for own in get_layer_types_and_kwargs(text)[1]
            ]
        )

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        keys, values = super().update(key_states, value_states, layer_idx, *args, **kwargs)
        if not self._own:
            heads = Streams((), (keys,), values)
            self.evict(heads, MaskSpec(is_causal=True), 1.0, None, layer_idx)
        return keys, values

    def evict(self, heads: Streams, mask: MaskSpec, scale: float, mix: Mix | None, layer_idx: int) -> None:
        """Choose among the tokens of a prompt that layer `layer_idx` has just read; later calls change nothing."""
        layer = self.layers[layer_idx]
        if not isinstance(layer, EvictingLayer) or layer.done:
            return
        if mask.documents is not None:
            raise ValueError("packed documents cannot be evicted from: a cache is of one text a row")
        prompt = Prompt(heads, mask, scale, mix, self.rank)
        with torch.no_grad():
            count = max(1, math.ceil(self.budget * prompt.tokens))
            scores = self._policies.named(self.policy)(prompt)
            real = mask.key_padding
            if real is not None:
                real = real.expand(scores.shape[0], -1)
            layer.keep(kept(scores, real, count), real)

    def kept_padding(self, layer_idx: int) -> Tensor | None:
        """(B, kept): which of a layer's kept tokens are no padding; None where it dropped none."""
        layer = self.layers[layer_idx]
        return layer.real if isinstance(layer, EvictingLayer) else None

    @property
    def nbytes(self) -> int:
        """Bytes of all that is held."""
        held = [layer for layer in self.layers if isinstance(layer, DynamicLayer)]
        return sum(int(x.nbytes) for layer in held for x in (layer.keys, layer.values) if x is not None)


def _check(config: PreTrainedConfig, policy: str) -> None:
    if not isinstance(config, ClearheadConfig):
        if policy not in OF_KEYS:
            raise ValueError(
                f"policy {policy!r} needs queries, which only models of this package hand to a cache; for others take "
                f"{', '.join(OF_KEYS)}"
            )
        return
    if config.compact_cache:
        raise ValueError(
            "an EvictingCache cannot be compact: half keys need the place of each, one for all heads"
        )
    if "alibi" in config.positions_by_layer:
        raise ValueError(
            "an EvictingCache cannot be combined with position 'alibi', which needs every key's place"
        )

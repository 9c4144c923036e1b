"""Which keys of a prompt a smaller cache keeps: scores by token and key-value head, the highest are kept.

The policies have the names of kvpress's presses (github.com/NVIDIA/kvpress), without "Press" and in lower case:

    streaming_llm        the first `sinks` tokens and the last ones (Xiao et al. 2023, arXiv 2309.17453)
    snapkv               what the last `window` queries look at, averaged over `pool` neighbours (Li et al. 2024,
                         arXiv 2404.14469)
    observed_attention   heavy hitters: what a token was given on average by the queries that see it (H2O, Zhang et al.
                         2023, arXiv 2306.14048), and the last `window` tokens
    tova                 what the last query looks at (Oren et al. 2024, arXiv 2401.06104)
    knorm                keys of small norm (Devoto et al. 2024, arXiv 2406.11430)
    random               the floor

Attention is that of the output heads of a group, averaged. Of a difference it is |A1 − λ A2|, what a key's value is
weighed with (`rank="effective"`), or A1 alone (`rank="signal"`). A kept token keeps its keys in all streams and its
value: the kept set is one for a group, so the union over streams and heads is never larger than it.

Legend: B batch, G key-value heads, H output heads, L queries, S keys.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from clearhead.core.attend import Mix
from clearhead.core.masks import MaskSpec
from clearhead.core.streams import Streams, repeat_kv

RANKS = ("effective", "signal")
_ROWS = 256  # queries whose maps exist at a time


@dataclass(frozen=True, slots=True)
class Prompt:
    """What a policy may look at: queries and all keys of a prompt, its mask, and how streams are mixed.

    q is empty where a model of others hands its cache keys alone.
    """

    heads: Streams
    mask: MaskSpec
    scale: float
    mix: Mix | None
    rank: str = "effective"

    @property
    def tokens(self) -> int:
        return self.heads.v.shape[2]

    def maps(self, first: int) -> Iterator[Tensor]:
        """(B, G, L, S) of the queries from `first` on, some at a time: |attention| averaged over a group's heads."""
        queries, keys, groups = self.heads.q[0].shape[2], self.tokens, self.heads.v.shape[1]
        assert self.mix is not None
        for begin in range(first, queries, _ROWS):
            count = min(_ROWS, queries - begin)
            seen = self.mask.rows(begin, count, queries, keys).materialise(
                count, keys, torch.float32, self.heads.v.device
            )
            made = []
            for q, k in zip(self.heads.q, self.heads.own_keys, strict=True):
                part = q[:, :, begin : begin + count].float()
                logits = part @ repeat_kv(k.float(), q.shape[1]).mT * self.scale
                hidden = ~seen if seen.dtype == torch.bool else seen == float("-inf")
                logits = logits if seen.dtype == torch.bool else logits + seen
                # A query that sees nothing gives nothing.
                made.append(logits.masked_fill(hidden, float("-inf")).softmax(-1).nan_to_num(0.0))
            gate = self.heads.gate
            if gate is not None and gate.shape[2] > 1:
                gate = gate[:, :, begin : begin + count]
            mixed = made[0] if self.rank == "signal" else self.mix(tuple(made), gate).abs()
            yield mixed.unflatten(1, (groups, -1)).mean(2)


def kept(scores: Tensor, real: Tensor | None, count: int) -> Tensor:
    """(B, G, count) places of the highest of the scores (B, G, S), in order; padding, where `real` (B, S) is False, is
    kept last of all and comes first, so that it lies alike in all groups."""
    if real is not None:
        scores = scores.masked_fill(~real[:, None], float("-inf"))
    places = scores.topk(count, dim=-1).indices.sort(-1).values
    if real is None:
        return places
    padded = ~real[:, None].expand_as(scores).gather(2, places)
    order = (~padded).to(torch.int8).sort(dim=-1, stable=True).indices
    return places.gather(2, order)


@dataclass(frozen=True, slots=True)
class Policies:
    """The numbers that the policies have, and each as a function of a prompt: (B, G, S) scores in float32."""

    sinks: int = 4
    window: int = 64
    pool: int = 5
    seed: int = 0

    def named(self, name: str) -> Callable[[Prompt], Tensor]:
        found: Callable[[Prompt], Tensor] = getattr(self, name)
        return found

    def streaming_llm(self, prompt: Prompt) -> Tensor:
        scores = torch.arange(prompt.tokens, dtype=torch.float32, device=prompt.heads.v.device)
        scores = scores.expand(*prompt.heads.v.shape[:2], -1).clone()
        first = torch.arange(prompt.tokens, device=scores.device)[None]
        if prompt.mask.key_padding is not None:
            first = prompt.mask.key_padding.long().cumsum(-1) - 1
        return scores.masked_fill((first < self.sinks)[:, None], float("inf"))

    def snapkv(self, prompt: Prompt) -> Tensor:
        window = min(self.window, prompt.tokens)
        first = prompt.heads.q[0].shape[2] - window
        scores = torch.cat(list(prompt.maps(max(first, 0))), 2).mean(2)
        pooled = F.avg_pool1d(scores, self.pool, 1, self.pool // 2)
        return self._with_the_last(pooled, window)

    def observed_attention(self, prompt: Prompt) -> Tensor:
        total = torch.stack([part.sum(2) for part in prompt.maps(0)]).sum(0)
        # Under a causal mask key j is seen by S − j queries.
        looked = torch.arange(prompt.tokens, 0, -1, device=total.device)
        return self._with_the_last(total / looked, min(self.window, prompt.tokens))

    def tova(self, prompt: Prompt) -> Tensor:
        (scores,) = prompt.maps(prompt.heads.q[0].shape[2] - 1)
        return self._with_the_last(scores[:, :, 0], 1)

    def knorm(self, prompt: Prompt) -> Tensor:
        return -torch.stack([k.float().square().sum(-1) for k in prompt.heads.k]).sum(0).sqrt()

    def random(self, prompt: Prompt) -> Tensor:
        generator = torch.Generator().manual_seed(self.seed)
        size = (*prompt.heads.v.shape[:2], prompt.tokens)
        return torch.rand(size, generator=generator).to(prompt.heads.v.device)

    @staticmethod
    def _with_the_last(scores: Tensor, count: int) -> Tensor:
        """The last `count` tokens are kept, whatever their score."""
        scores = scores.clone()
        scores[..., scores.shape[-1] - count :] = float("inf")
        return scores


POLICIES = ("streaming_llm", "snapkv", "observed_attention", "tova", "knorm", "random")
# Those that look at keys alone, which is all that a cache is handed by models of others.
OF_KEYS = ("streaming_llm", "knorm", "random")

"""Models whose behaviour is known exactly, with the call signature of a Hugging Face causal language model."""

from __future__ import annotations

import math
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

Logits = Callable[[Tensor], Tensor]
Maps = Callable[[int], list[Tensor]]


class FakeConfig:
    """The two things that an evaluation asks of a configuration."""

    def __init__(self, limit: int) -> None:
        self._attn_implementation = "sdpa"
        self.max_position_embeddings = limit

    def to_dict(self) -> dict[str, Any]:
        return {"max_position_embeddings": self.max_position_embeddings}


class FakeModel(nn.Module):
    """``logits(input_ids)`` (B, L, V) and ``maps(length)``: (H, L, L) of each layer, the same for every row."""

    def __init__(self, logits: Logits, maps: Maps | None = None, limit: int = 4096) -> None:
        super().__init__()
        self.logits_of = logits
        self.maps_of = maps
        self.config = FakeConfig(limit)
        self.calls: list[tuple[int, ...]] = []
        self.implementations: list[str] = []

    @property
    def device(self) -> torch.device:
        return torch.device("cpu")

    def set_attn_implementation(self, name: str) -> None:
        self.config._attn_implementation = name
        self.implementations.append(name)

    def forward(
        self,
        input_ids: Tensor,
        use_cache: bool = True,
        output_attentions: bool = False,
        logits_to_keep: int = 0,
    ) -> Any:
        assert not use_cache and not self.training and torch.is_inference_mode_enabled()
        self.calls.append(tuple(input_ids.shape))
        attentions = None
        if output_attentions:
            assert self.maps_of is not None and self.config._attn_implementation == "eager"
            attentions = tuple(
                layer.expand(len(input_ids), -1, -1, -1) for layer in self.maps_of(input_ids.shape[1])
            )
        return SimpleNamespace(logits=self.logits_of(input_ids)[:, -logits_to_keep:], attentions=attentions)


def uniform(vocabulary: int) -> Logits:
    """Knows nothing: every token costs ln V."""
    return lambda ids: torch.zeros(*ids.shape, vocabulary)


def constant(vocabulary: int, token: int) -> Logits:
    """Always says the same token."""

    def logits(ids: Tensor) -> Tensor:
        out = torch.zeros(*ids.shape, vocabulary)
        out[..., token] = 10.0
        return out

    return logits


def copier(vocabulary: int, window: int = 10**9, suffix: int = 4) -> Logits:
    """Continues as the longest suffix (up to ``suffix`` tokens) did where it last occurred within ``window`` tokens."""

    def next_token(ids: list[int], end: int) -> int:
        for size in range(min(suffix, end), 0, -1):
            wanted = ids[end - size : end]
            for start in range(end - size - 1, max(-1, end - window), -1):
                if ids[start : start + size] == wanted:
                    return ids[start + size]
        return 0

    def logits(ids: Tensor) -> Tensor:
        out = torch.zeros(*ids.shape, vocabulary)
        for row, tokens in enumerate(ids.tolist()):
            for end in range(1, len(tokens) + 1):
                out[row, end - 1, next_token(tokens, end)] = 10.0
        return out

    return logits


def costing(vocabulary: int, nats: Callable[[int], float]) -> Logits:
    """Gives the token at position p exactly the loss ``nats(p)``, by looking ahead."""

    def logits(ids: Tensor) -> Tensor:
        out = torch.zeros(*ids.shape, vocabulary, dtype=torch.float64)
        for position in range(1, ids.shape[1]):
            # -log softmax = log(1 + (V - 1) e^-c), solved for the logit c of the right token.
            logit = -math.log(math.expm1(nats(position)) / (vocabulary - 1))
            out[torch.arange(len(ids)), position - 1, ids[:, position]] = logit
        return out

    return logits


def uniform_maps(layers: int = 2, heads: int = 3) -> Maps:
    """Every query attends equally to all keys before it and itself."""

    def maps(length: int) -> list[Tensor]:
        rows = torch.ones(length, length).tril()
        return [(rows / rows.sum(-1, keepdim=True)).expand(heads, -1, -1)] * layers

    return maps

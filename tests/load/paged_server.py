"""A small server with vLLM's call: requests laid side by side in one row, pages of keys by layer, one step at a time.

Written from vLLM's published Transformers backend, and sharing no code with this library: `AutoModel.from_config` on
the meta device with the server's own name as attention implementation, one `Attention` object a layer built from the
configuration's head counts, and per step one forward pass whose attention function finds its object by
`module.layer_idx`. Numbers are float64, so that tokens can be compared exactly.

Legend: T tokens of a step, H query heads, G key-value heads, D width.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from accelerate import init_empty_weights
from torch import Tensor, nn
from transformers import AttentionInterface, AutoModel, PreTrainedConfig

NAME = "paged_stand_in"
PAGE = 4


@dataclass
class Request:
    """A prompt, how many tokens it shall get, and what there is of them."""

    prompt: list[int]
    new: int
    done: int = 0  # tokens whose keys are in pages
    made: list[int] = field(default_factory=list)
    pages: list[int] = field(default_factory=list)

    @property
    def text(self) -> list[int]:
        return self.prompt + self.made

    @property
    def finished(self) -> bool:
        return len(self.made) == self.new

    def slots(self, length: int) -> Tensor:
        """Where the first `length` tokens lie in the pages."""
        return torch.tensor([self.pages[i // PAGE] * PAGE + i % PAGE for i in range(length)])


@dataclass
class Step:
    """Which tokens a step has of each request: (request, first, count)."""

    parts: list[tuple[Request, int, int]]


class Attention:
    """One layer's pages, and attention over them; a layer's queries, keys and values come flat."""

    def __init__(self, heads: int, width: int, kv_heads: int, pages: int, window: int | None) -> None:
        self.heads, self.width, self.kv_heads, self.window = heads, width, kv_heads, window
        self.scale = width**-0.5
        self.keys = torch.full((pages * PAGE, kv_heads, width), float("nan"), dtype=torch.float64)
        self.values = self.keys.clone()
        self.calls = 0
        self.step = Step([])

    def forward(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """(T, H·D), (T, G·D), (T, G·D) -> (T, H·D)."""
        self.calls += 1
        # Raises for any other number of heads than the configuration named.
        query = query.view(-1, self.heads, self.width)
        key, value = (x.view(-1, self.kv_heads, self.width) for x in (key, value))
        out, begin = torch.empty_like(query), 0
        for request, first, count in self.step.parts:
            slots, rows = request.slots(first + count), slice(begin, begin + count)
            self.keys[slots[first:]], self.values[slots[first:]] = key[rows], value[rows]
            for place in range(count):
                seen = slots[: first + place + 1][-self.window if self.window else 0 :]
                out[begin + place] = self._one(query[begin + place], seen)
            begin += count
        return out.flatten(1)

    def _one(self, query: Tensor, seen: Tensor) -> Tensor:
        """(H, D), the slots that it sees -> (H, D)."""
        grouped = query.view(self.kv_heads, -1, self.width)
        keys, values = self.keys[seen].transpose(0, 1), self.values[seen].transpose(0, 1)
        weights = (self.scale * grouped @ keys.mT).softmax(-1)
        return (weights @ values).view(self.heads, self.width)


def attention_function(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    attention_instances: dict[int, Attention] | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    assert attention_instances is not None and attention_mask is None
    own = attention_instances[module.layer_idx]
    if scaling is not None:
        own.scale = float(scaling)
    length = query.shape[-2]
    assert value.shape[-1] <= query.shape[-1]
    query, key, value = (x.transpose(1, 2).reshape(length, -1) for x in (query, key, value))
    return own.forward(query, key, value), None


@contextmanager
def registered() -> Iterator[None]:
    AttentionInterface.register(NAME, attention_function)
    try:
        yield
    finally:
        del AttentionInterface._global_mapping[NAME]


class Server:
    """Runs the decoder of a saved model; `weights` by the names of its causal language model."""

    def __init__(self, config: PreTrainedConfig, weights: dict[str, Tensor], pages: int = 64) -> None:
        config._attn_implementation = NAME
        with init_empty_weights(include_buffers=False):
            self.model = AutoModel.from_config(config)
        state = {
            name.removeprefix("model."): value for name, value in weights.items() if name != "lm_head.weight"
        }
        self.model.load_state_dict(state, assign=True)
        self.model.double()
        self.head = weights["lm_head.weight"]
        types = getattr(config, "layer_types", [None] * config.num_hidden_layers)
        self.instances = {
            layer: Attention(
                config.num_attention_heads,
                config.head_dim,
                config.num_key_value_heads,
                pages,
                config.sliding_window if kind == "sliding_attention" else None,
            )
            for layer, kind in enumerate(types)
        }
        self.free = list(range(pages))[::-1]
        self.steps = 0

    def generate(self, prompts: Sequence[list[int]], new: int, budget: int = 17) -> list[list[int]]:
        """Greedy tokens of every prompt, at most `budget` tokens a step: decoding first, then prompts in pieces."""
        requests = [Request(list(prompt), new) for prompt in prompts]
        while waiting := [request for request in requests if not request.finished]:
            waiting.sort(key=lambda request: len(request.text) - request.done > 1)
            parts, left = [], budget
            for request in waiting:
                count = min(left, len(request.text) - request.done)
                if count:
                    parts.append((request, request.done, count))
                    left -= count
            self._step(Step(parts))
        return [request.made for request in requests]

    @torch.no_grad()
    def _step(self, step: Step) -> None:
        ids, positions, ends = [], [], []
        for request, first, count in step.parts:
            while len(request.pages) * PAGE < first + count:
                request.pages.append(self.free.pop())
            ids += request.text[first : first + count]
            positions += range(first, first + count)
            ends.append(len(ids) - 1)
        for own in self.instances.values():
            own.step = step
        states = self.model(
            input_ids=torch.tensor([ids]),
            inputs_embeds=None,
            use_cache=False,
            position_ids=torch.tensor([positions]),
            attention_instances=self.instances,
            return_dict=False,
        )[0][0, ...]
        self.steps += 1
        for end, (request, first, count) in zip(ends, step.parts, strict=True):
            request.done = first + count
            if request.done == len(request.text):
                request.made.append(int((states[end] @ self.head.T).argmax()))
            if request.finished:
                self.free += request.pages
                request.pages = []

"""Random calls on a cache: chunks of any size, padding, rows taken, repeated and reordered, tokens taken back."""

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, StaticCache

from clearhead.models import ClearheadForCausalLM
from tests.fuzz.draw import Draw
from tests.fuzz.judge import Case, compare
from tests.fuzz.layers import tolerances
from tests.fuzz.operations import DTYPES, machine
from tests.fuzz.places import TRAINED
from tests.fuzz.tiny import PAD, Tiny, tokens

CACHES = ("dynamic", "dynamic", "of the configuration", "static", "static", "static, filled")

ROW_STEPS = {
    "reorder": "reorder_cache",
    "repeat": "batch_repeat_interleave",
    "select": "batch_select_indices",
}


@dataclass(frozen=True)
class Cached(Case):
    """A prompt in chunks on one cache; each chunk's logits are those of the whole row without a cache.

    chunks: sizes of the calls, and between them what is done to the cache: "crop" takes the last call's tokens back and
            other tokens follow, "reorder", "repeat" and "select" do with rows what beams and contrastive search do.
    rows:   real tokens of each row; shorter rows are padded on `side`.
    mask:   "as needed", "always", or "whole", which also covers what a cache of fixed size has not written yet.
    """

    seed: int
    tiny: Tiny = field(default_factory=Tiny)
    cache: str = "dynamic"
    rows: tuple[int, ...] = (4,)
    chunks: tuple[int | str, ...] = (4,)
    mask: str = "as needed"
    rope_length: bool = False

    @classmethod
    def draw(cls, draw: Draw) -> "Cached":
        tiny, cache = Tiny.draw(draw), draw.among(CACHES)
        longest = draw.one(draw.between(2, 8), draw.between(4, 13))
        rows = tuple(draw.between(max(1, longest - 3), longest) for _ in range(draw.between(1, 3)))
        if draw.chance(0.5):
            rows = (longest,) * len(rows)
        total, chunks, done = max(rows), [], 0
        while done < total:
            size = min(draw.one(1, 1, 1, 2, 3, total), total - done)
            chunks.append(size)
            done += size
            # A cache of fixed size cannot take tokens back, and its rows are those that it was made for.
            able = ("crop", "reorder", "repeat", "select") if "static" not in cache else ("reorder",)
            if done < total and draw.chance(0.25):
                chunks.append(draw.among(able))
        return cls(
            seed=draw.seed(),
            tiny=tiny,
            cache=cache,
            rows=rows,
            chunks=tuple(chunks),
            mask=draw.one("as needed", "as needed", "always", "whole" if "static" in cache else "always"),
            rope_length=tiny.method.by_length,
        )

    @property
    def may_refuse(self) -> bool:
        # One column a token so far is what is asked for.
        return self.mask == "whole"

    @property
    def padded(self) -> bool:
        return len(set(self.rows)) > 1

    def check(self) -> None:
        dtype = DTYPES[self.tiny.dtype]
        with machine(self.tiny.isa, 1):
            found, ids, starts = self.answers(self.tiny.implementation)
            plain = None if dtype == torch.float64 else self.answers("eager")[0]
        expected = self.expected(ids, starts)
        names = ["logits"] * len(found)
        whole = "whole mask, " * (self.mask == "whole")
        label = f"{self.cache}, {whole} {'compact, ' * self.tiny.compact}{self.tiny.method.name}, "
        compare(names, found, expected, tolerances(expected, plain, dtype, [0.0] * len(found)), label)

    @torch.no_grad()
    def answers(self, implementation: str) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
        """Logits of the real tokens of every call, with the tokens and starts of the rows as they were at that call."""
        draw, model = Draw(self.seed), self.tiny.make(implementation)
        total = max(self.rows)
        ids = torch.full((len(self.rows), total), PAD)
        starts = torch.tensor([total - n for n in self.rows])
        for b, start in enumerate(starts.tolist()):
            ids[b, start:] = tokens(draw, total - start)
        cache = self.empty(model)
        found, whole, firsts, done, last = [], [], [], 0, 0
        for step in self.chunks:
            if isinstance(step, str):
                rows = self._rows(step, draw, len(ids))
                if step == "crop":
                    cache.crop(-last)
                    done -= last
                    ids = ids.clone()
                    fresh = tokens(draw, *ids[:, done:].shape)
                    hidden = torch.arange(done, total)[None] < starts[:, None]
                    ids[:, done:] = torch.where(hidden, PAD, fresh)
                    # The tokens that were taken back are written again in one call.
                    found.append(self.call(model, cache, ids, starts, done, last))
                    whole.append(ids[:, : done + last])
                    firsts.append(starts)
                    done += last
                else:
                    getattr(cache, ROW_STEPS[step])(2 if step == "repeat" else rows)
                    ids, starts = ids[rows], starts[rows]
                continue
            found.append(self.call(model, cache, ids, starts, done, step))
            done, last = done + step, step
            whole.append(ids[:, :done])
            firsts.append(starts)
        return found, whole, firsts

    def _rows(self, step: str, draw: Draw, count: int) -> Tensor:
        if step == "repeat":
            return torch.arange(count).repeat_interleave(2)
        if step == "select":
            return draw.integers(count, draw.between(1, count))
        return draw.integers(count, count)

    def empty(self, model: ClearheadForCausalLM) -> Any:
        room = max(self.rows) + 3
        if self.cache == "dynamic":
            return DynamicCache()
        if self.cache == "of the configuration":
            return DynamicCache(config=model.config)
        made = StaticCache(config=model.config, max_cache_len=room)
        if self.cache == "static, filled":
            # Used before, and reset: what it holds must not be seen.
            length = {"rope_length": room} if self.tiny.method.by_length else {}
            model(torch.full((len(self.rows), 3), 5), past_key_values=made, **length)
            made.reset()
        return made

    def call(
        self, model: ClearheadForCausalLM, cache: Any, ids: Tensor, starts: Tensor, done: int, step: int
    ) -> Tensor:
        """Logits of the real tokens of ids[:, done : done + step], one row after the other."""
        arguments: dict[str, Any] = {}
        end = done + step
        if self.padded or self.mask != "as needed":
            width = max(self.rows) + 3 if self.mask == "whole" else end
            seen = torch.arange(width)[None] >= starts[:, None]
            arguments["attention_mask"] = (seen & (torch.arange(width) < end)).long()
        if self.rope_length:
            arguments["rope_length"] = max(self.rows) + TRAINED // 2
        out = model(ids[:, done:end], past_key_values=cache, use_cache=True, **arguments)
        assert out.past_key_values is cache
        parts = [out.logits[b, max(0, s - done) :] for b, s in enumerate(starts.tolist())]
        return torch.cat(parts).double()

    @torch.no_grad()
    def expected(self, ids: list[Tensor], starts: list[Tensor]) -> list[Tensor]:
        decoder = self.tiny.decoder(self.tiny.make())
        length = max(self.rows) + TRAINED // 2 if self.rope_length else None
        found, before = [], [0, *(x.shape[1] for x in ids)]
        for index, (rows, firsts) in enumerate(zip(ids, starts, strict=True)):
            # A call after tokens were taken back begins where the last one did.
            step = self._sizes()[index]
            done = rows.shape[1] - step
            assert done <= before[index]
            parts = []
            for row, first in zip(rows, firsts.tolist(), strict=True):
                if first >= rows.shape[1]:
                    continue
                logits, _ = self.tiny.row(decoder, row[first:], length=length)
                parts.append(logits[max(0, done - first) :])
            found.append(torch.cat(parts) if parts else torch.zeros(0, 23, dtype=torch.float64))
        return found

    def _sizes(self) -> list[int]:
        """Tokens of each call, those after a "crop" among them."""
        sizes: list[int] = []
        last = 0
        for step in self.chunks:
            if step == "crop":
                sizes.append(last)
            elif isinstance(step, int):
                sizes.append(step)
                last = step
        return sizes

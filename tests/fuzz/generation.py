"""Random calls of `generate`: every token and logit is what the whole row gives without a cache."""

import warnings
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache

from tests.fuzz.draw import Draw
from tests.fuzz.exact import Decoder
from tests.fuzz.judge import Case, Wrong, compare
from tests.fuzz.operations import DTYPES, machine
from tests.fuzz.tiny import PAD, Tiny, tokens

WAYS = ("greedy", "greedy", "beams", "sample", "assisted", "lookup", "continued", "two turns")
# PyTorch's streams, which an offloaded cache moves its layers with, are there on a GPU only.
CACHES = ("dynamic", "dynamic", "static", "static", "none") + ("offloaded",) * torch.cuda.is_available()


@dataclass(frozen=True)
class Generation(Case):
    """One request, or a chat of two turns.

    way:  "continued" hands over a cache that holds the prompt's beginning, "two turns" the cache of a first request.
    rows: real prompt tokens of each row, padded on the left.
    """

    seed: int
    tiny: Tiny = field(default_factory=Tiny)
    way: str = "greedy"
    cache: str = "dynamic"
    rows: tuple[int, ...] = (4,)
    new: int = 3
    beams: int = 2
    ones: bool = True
    rope_length: bool = False

    @classmethod
    def draw(cls, draw: Draw) -> "Generation":
        tiny, way = Tiny.draw(draw, exactly=True), draw.among(WAYS)
        alone = way in ("assisted", "lookup", "continued", "two turns")
        longest = draw.between(2, 12)
        rows = (longest,)
        if not alone:
            rows = tuple(draw.between(max(1, longest - 4), longest) for _ in range(draw.between(1, 3)))
        return cls(
            seed=draw.seed(),
            tiny=tiny,
            way=way,
            cache=draw.among(CACHES) if not alone else "dynamic",
            rows=rows,
            new=draw.between(1, 6),
            beams=draw.between(2, 4),
            ones=len(set(rows)) > 1 or draw.chance(0.6),
            rope_length=tiny.method.by_length and draw.chance(0.3 if way != "two turns" else 0.6),
        )

    @property
    def may_refuse(self) -> bool:
        # A cache that was filled with another length in mind is refused unless the length is told.
        started = self.way in ("continued", "two turns")
        return (self.tiny.method.by_length and started) or self.cache == "offloaded"

    @property
    def tolerance(self) -> float:
        """Of logits, which `generate` keeps in float32; the models are small, and so is what their float32 is off."""
        return 1e-6 if self.tiny.dtype == "float64" else 2e-3

    def check(self) -> None:
        draw = Draw(self.seed)
        prompts = [tokens(draw, size) for size in self.rows]
        with machine(self.tiny.isa, 1), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            if self.way == "two turns":
                self._two_turns(prompts[0], draw)
                return
            out = self._generate(prompts)
        decoder = self.tiny.decoder(self.tiny.make())
        if self.way == "beams":
            self._check_beams(out, prompts, decoder)
            return
        total = max(self.rows)
        for b, prompt in enumerate(prompts):
            self._check_row(out, b, prompt, out.sequences[b, total:], decoder)

    def _check_row(self, out: Any, b: int, prompt: Tensor, new: Tensor, decoder: Decoder) -> None:
        if len(new) != self.new:
            raise Wrong(f"{self.way}, new tokens", str(self.new), str(len(new)))
        row = torch.cat((prompt, new))
        length = self.length(len(prompt)) if self.tiny.method.by_length else None
        logits, _ = self.tiny.row(decoder, row[:-1], length=length)
        exact = logits[len(prompt) - 1 :].detach()
        label = f"{self.way}, {self.cache}, {self.tiny.method.name}, "
        if out.logits is not None and len(out.logits) == self.new:
            found = torch.stack([x[b if len(x) > b else 0] for x in out.logits])
            size = self.tolerance * (1 + float(exact.abs().max()))
            compare(["logits"], [found.double()], [exact], [size], label)
        if self.way == "sample":
            return
        gap = exact.max(-1).values - exact.gather(1, new[:, None])[:, 0]
        compare(
            ["tokens"], [gap], [torch.zeros_like(gap)], [4 * self.tolerance * (1 + exact.abs().max())], label
        )

    def length(self, prompt: int) -> int:
        """Of the request, as `generate` freezes it, or as it is told."""
        return max(self.rows) + self.new + 7 if self.rope_length else prompt + self.new

    def _generate(self, prompts: list[Tensor]) -> Any:
        model, total = self.tiny.make(), max(self.rows)
        ids = torch.stack([torch.nn.functional.pad(p, (total - len(p), 0), value=PAD) for p in prompts])
        call: dict[str, Any] = {
            "max_new_tokens": self.new,
            "do_sample": self.way == "sample",
            "output_logits": True,
            "return_dict_in_generate": True,
        }
        if self.ones:
            call["attention_mask"] = torch.stack(
                [torch.arange(total) >= total - len(p) for p in prompts]
            ).long()
        if self.cache == "none":
            call["use_cache"] = False
        elif self.cache != "dynamic":
            call["cache_implementation"] = self.cache
        if self.rope_length:
            call["rope_length"] = self.length(0)
        if self.way == "beams":
            call |= {"num_beams": self.beams, "num_return_sequences": self.beams, "output_scores": True}
        if self.way == "sample":
            torch.manual_seed(self.seed % 2**31)
            call["top_k"] = 5
        if self.way == "assisted":
            helper = replace(Tiny(seed=self.seed), dtype=self.tiny.dtype).make()
            call["assistant_model"] = helper
        if self.way == "lookup":
            call["prompt_lookup_num_tokens"] = 2
        if self.way == "continued":
            cache = DynamicCache()
            told = {"rope_length": self.length(0)} if self.rope_length else {}
            with torch.no_grad():
                model(ids[:, : Draw(self.seed).between(1, total - 1)], past_key_values=cache, **told)
            call["past_key_values"] = cache
        out = model.generate(ids, **call)
        if out.logits is not None and out.logits[0].dtype not in (DTYPES[self.tiny.dtype], torch.float32):
            raise Wrong("dtype of the logits", self.tiny.dtype, str(out.logits[0].dtype))
        return out

    def _check_beams(self, out: Any, prompts: list[Tensor], decoder: Decoder) -> None:
        """Scores are the mean log-probabilities of their sequences, best first, and the best is a full search's."""
        total, label = max(self.rows), f"beams, {self.cache}, {self.tiny.method.name}, "
        scores = out.sequences_scores.double().view(len(prompts), self.beams)
        for b, prompt in enumerate(prompts):
            length = self.length(len(prompt)) if self.tiny.method.by_length else None
            exact = []
            for i in range(self.beams):
                new = out.sequences[b * self.beams + i, total:]
                exact.append(self._score(decoder, prompt, new, length))
            size = [self.tolerance * (10 + float(abs(min(exact))))]
            compare(["scores"], [scores[b]], [torch.stack(exact)], size, label)
            best = self._search(decoder, prompt, length)
            compare(["best score"], [scores[b, 0]], [best], size, label)

    def _score(self, decoder: Decoder, prompt: Tensor, new: Tensor, length: int | None) -> Tensor:
        logits, _ = self.tiny.row(decoder, torch.cat((prompt, new))[:-1], length=length)
        logs = logits[len(prompt) - 1 :].log_softmax(-1).detach()
        return logs.gather(1, new[:, None]).mean()

    def _search(self, decoder: Decoder, prompt: Tensor, length: int | None) -> Tensor:
        """Beam search as anyone would write it: the best continuations of the best, a token at a time."""
        held: list[tuple[float, Tensor]] = [(0.0, prompt)]
        for _ in range(self.new):
            longer: list[tuple[float, Tensor]] = []
            for score, row in held:
                logits, _ = self.tiny.row(decoder, row, length=length)
                logs, best = logits[-1].log_softmax(-1).detach().topk(self.beams)
                pairs = zip(logs.tolist(), best, strict=True)
                longer += [(score + log, torch.cat((row, token[None]))) for log, token in pairs]
            held = sorted(longer, key=lambda pair: -pair[0])[: self.beams]
        return torch.tensor(held[0][0] / self.new, dtype=torch.float64)

    def _two_turns(self, prompt: Tensor, draw: Draw) -> None:
        """A chat: a second request that extends the first one's answer on its cache."""
        model, cache = self.tiny.make(), DynamicCache()
        more = tokens(draw, draw.between(1, 4))
        whole = len(prompt) + 2 * self.new + len(more)
        told = {"rope_length": whole} if self.rope_length else {}
        call: dict[str, Any] = {
            "max_new_tokens": self.new,
            "do_sample": False,
            "past_key_values": cache,
            "output_logits": True,
            "return_dict_in_generate": True,
            **told,
        }
        first = model.generate(prompt[None], **call).sequences[0]
        row = torch.cat((first, more))
        # Said, because the answer may hold the padding token.
        out = model.generate(row[None], attention_mask=torch.ones_like(row)[None], **call)
        length = None
        if self.tiny.method.by_length:
            length = whole if self.rope_length else len(row) + self.new
        decoder = self.tiny.decoder(model)
        answer = out.sequences[0, len(row) :]
        logits, _ = self.tiny.row(decoder, torch.cat((row, answer))[:-1], length=length)
        exact = logits[len(row) - 1 :].detach()
        found = torch.cat(out.logits).double()
        size = self.tolerance * (1 + float(exact.abs().max()))
        compare(["logits"], [found], [exact], [size], f"two turns, {self.tiny.method.name}, ")

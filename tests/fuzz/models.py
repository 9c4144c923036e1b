"""Random forward passes of tiny models: padding, packing, masks, positions, loss, maps, gradients."""

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from tests.fuzz import exact
from tests.fuzz.draw import Draw
from tests.fuzz.judge import Case, Wrong, compare
from tests.fuzz.layers import tolerances
from tests.fuzz.operations import DTYPES, machine
from tests.fuzz.places import TRAINED
from tests.fuzz.tiny import PAD, Tiny, tokens

FORMS = ("plain", "left", "right", "both", "shifted", "packed", "packed, ones", "mask", "additive", "tree")
WANTED = ("gradients", "gradients", "loss", "maps", "last", "embeds", "loss of a batch")


@dataclass(frozen=True)
class Forward(Case):
    """One forward pass of a model without an earlier cache.

    form:   how rows are laid out: "left", "right", "both" are padded with a 2-D mask; "packed" rows have positions that
            restart, "ones" with a mask of ones beside them; "mask" and "additive" are 4-D; a "tree" is two suffixes
            over one prefix in one row, as tree decoding has it.
    wanted: what is compared besides the logits.
    """

    seed: int
    tiny: Tiny = field(default_factory=Tiny)
    form: str = "plain"
    rows: tuple[int, ...] = (4,)
    wanted: str = "gradients"
    use_cache: bool | None = None
    mask_dtype: str = "int64"
    rope_length: int | None = None

    @classmethod
    def draw(cls, draw: Draw) -> "Forward":
        tiny = Tiny.draw(draw)
        form = draw.among(FORMS)
        longest = draw.one(draw.between(1, 8), draw.between(4, 14))
        rows = tuple(draw.between(max(1, longest - 4), longest) for _ in range(draw.between(1, 3)))
        if form not in ("left", "right", "both"):
            rows = (longest,) * len(rows)
        wanted = draw.among(WANTED)
        if wanted == "last" and form in ("right", "both"):
            wanted = "embeds"
        length = None
        if tiny.method.by_length and not form.startswith("packed") and draw.chance(0.3):
            length = longest + draw.one(0, 3, TRAINED)
        return cls(
            seed=draw.seed(),
            tiny=tiny,
            form=form,
            rows=rows,
            wanted=wanted,
            use_cache=draw.one(None, True, False, False),
            mask_dtype=draw.one("int64", "int64", "bool", "int32", "float32"),
            rope_length=length,
        )

    @property
    def may_refuse(self) -> bool:
        # A compact cache counts positions itself; by name, only "eager" has maps. A mask beside positions that restart
        # may be said to contradict them, and a mask of floating point to be unclear.
        compact = self.tiny.compact and self.use_cache is not False
        counted = self.form in ("plain", "left", "packed")
        maps = self.wanted == "maps" and self.tiny.implementation == "sdpa"
        needs_length = self.tiny.method.by_length and self.use_cache is not False
        return (
            (compact and not counted)
            or maps
            or self.form == "packed, ones"
            or self.mask_dtype == "float32"
            or (needs_length and self.rope_length is None)
        )

    def check(self) -> None:
        dtype = DTYPES[self.tiny.dtype]
        with machine(self.tiny.isa, 1):
            found = self.answers(self.tiny.implementation)
            plain = None if dtype == torch.float64 else self.answers("eager")
        expected, noise = self.expected()
        names = ["logits", *self.extra_names(len(expected) - 1)]
        allowed = tolerances(expected, plain, dtype, noise)
        if self.wanted.startswith("loss"):
            # Hugging Face takes the loss in float32 whatever the model's dtype.
            # The mean over no label is not a number, there as here.
            if self.wanted == "loss" and bool((self.labels()[:, 1:] == -100).all()):
                found, expected, names = found[:1], expected[:1], names[:1]
            allowed = allowed[: len(expected)]
        if len(expected) > 1 and self.wanted.startswith("loss"):
            allowed[1] = max(allowed[1], 8 * torch.finfo(torch.float32).eps * (1 + float(expected[1])))
        compare(names, found, expected, allowed, f"{self.form}, {self.tiny.method.name}, ")

    def extra_names(self, count: int) -> list[str]:
        if self.wanted == "maps":
            return [f"map of layer {i}" for i in range(count)]
        if self.wanted == "gradients":
            return [f"gradient of {name}" for name in exact.named(dict(self.tiny.make().named_parameters()))]
        return ["loss"] * count

    def ids(self) -> list[Tensor]:
        """The rows' tokens, without padding."""
        draw = Draw(self.seed)
        return [tokens(draw, size) for size in self.rows]

    def starts(self) -> list[int]:
        """Where each row's first real token stands."""
        if self.form in ("left", "both"):
            return [max(self.rows) - size for size in self.rows]
        return [0 for _ in self.rows]

    @property
    def total(self) -> int:
        return max(self.rows) + (2 if self.form == "both" else 0)

    def arguments(self) -> dict[str, Any]:
        """What the model is called with."""
        rows, total = self.ids(), self.total
        ids = torch.full((len(rows), total), PAD)
        mask = torch.zeros(len(rows), total, dtype=torch.long)
        for b, (row, start) in enumerate(zip(rows, self.starts(), strict=True)):
            ids[b, start : start + len(row)] = row
            mask[b, start : start + len(row)] = 1
        call: dict[str, Any] = {
            "input_ids": ids,
            "use_cache": self.use_cache,
            "rope_length": self.rope_length,
        }
        if self.form in ("left", "right", "both", "packed, ones"):
            call["attention_mask"] = mask.to(getattr(torch, self.mask_dtype))
        if self.form in ("shifted", "packed", "packed, ones", "tree"):
            call["position_ids"] = self.positions()
        if self.form in ("mask", "additive", "tree"):
            seen = self.seen()
            additive = torch.zeros(seen.shape, dtype=DTYPES[self.tiny.dtype])
            hidden = torch.finfo(additive.dtype).min
            call["attention_mask"] = seen if self.form != "additive" else additive.masked_fill(~seen, hidden)
        if self.wanted.startswith("loss"):
            call["labels"] = self.labels()
        if self.wanted == "loss of a batch":
            call["num_items_in_batch"] = 7
        if self.wanted == "last":
            call["logits_to_keep"] = 1
        if self.wanted == "maps":
            call["output_attentions"] = True
        return call

    def positions(self) -> Tensor:
        """(B or 1, L) of the forms that are given positions."""
        draw, L = Draw(self.seed + 1), self.total
        if self.form == "shifted":
            return torch.arange(L)[None] + draw.between(1, 30)
        if self.form == "tree":
            prefix, branch = self.branches()
            return torch.tensor([[i if i < branch else prefix + i - branch for i in range(L)]])
        found = []
        for _ in self.rows:
            row: list[int] = []
            while len(row) < L:
                row += range(min(draw.between(1, 5), L - len(row)))
            found.append(row)
        return torch.tensor(found)

    def branches(self) -> tuple[int, int]:
        """Length of the common prefix, and where the second suffix begins."""
        draw, L = Draw(self.seed + 2), self.total
        prefix = draw.between(0, max(0, L - 2))
        return prefix, draw.between(prefix, L - 1)

    def seen(self) -> Tensor:
        """(B, 1, L, L) bool of the forms with a 4-D mask; every token sees itself."""
        draw, L = Draw(self.seed + 3), self.total
        causal = torch.ones(L, L).tril() > 0
        if self.form == "tree":
            prefix, branch = self.branches()
            first = torch.arange(L)
            other = (first[:, None] >= branch) & (first[None] >= prefix) & (first[None] < branch)
            return (causal & ~other).expand(len(self.rows), 1, L, L)
        holes = draw.flags(len(self.rows), 1, L, L, share=0.7)
        return (holes & causal) | (torch.eye(L) > 0)

    def labels(self) -> Tensor:
        """(B, total), −100 at padding and at some more."""
        found = torch.full((len(self.rows), self.total), -100)
        kept = Draw(self.seed + 4).flags(len(self.rows), self.total, share=0.8)
        for b, (row, start) in enumerate(zip(self.ids(), self.starts(), strict=True)):
            found[b, start : start + len(row)] = row
            # What stands before a row's first token has no meaning to predict it from.
            found[b, start] = -100
        return found.masked_fill(~kept, -100)

    def cotangents(self) -> list[Tensor]:
        """The weights of each row's logits."""
        draw = Draw(self.seed + 5)
        return [draw.normal(size, 23) for size in self.rows]

    def answers(self, implementation: str) -> list[Tensor]:
        model = self.tiny.make(implementation)
        call = self.arguments()
        if self.wanted == "embeds":
            call["inputs_embeds"] = model.get_input_embeddings()(call.pop("input_ids"))
        with torch.set_grad_enabled(self.wanted == "gradients"):
            out = model(**call)
        if out.logits.dtype != DTYPES[self.tiny.dtype]:
            raise Wrong("dtype of the logits", self.tiny.dtype, str(out.logits.dtype))
        if self.wanted == "last":
            return [out.logits[:, -1].double()]
        parts = [
            out.logits[b, s : s + n] for b, (s, n) in enumerate(zip(self.starts(), self.rows, strict=True))
        ]
        logits = torch.cat(parts)
        if self.wanted == "gradients":
            u = torch.cat(self.cotangents()).to(logits.dtype)
            found = torch.autograd.grad(logits, list(model.parameters()), u, materialize_grads=True)
            return [x.detach().double() for x in (logits, *found)]
        if self.wanted.startswith("loss"):
            return [logits.double(), out.loss.double()]
        if self.wanted == "maps":
            starts = zip(self.starts(), self.rows, strict=True)
            cut = [(b, slice(s, s + n)) for b, (s, n) in enumerate(starts)]
            rows = [torch.cat([m[b, :, c, c].flatten() for b, c in cut]) for m in out.attentions]
            return [logits.double(), *(x.double() for x in rows)]
        return [logits.double()]

    def expected(self) -> tuple[list[Tensor], list[float]]:
        model = self.tiny.make()
        wants = self.wanted == "gradients"
        decoder = self.tiny.decoder(model, wants)
        found, maps = self._rows(decoder)
        logits = torch.cat(found)
        if self.wanted == "last":
            return [torch.stack([x[-1] for x in found])], [0.0]
        if wants:
            leaves = [decoder.weights[name] for name in exact.named(dict(model.named_parameters()))]
            u = torch.cat(self.cotangents()).to(DTYPES[self.tiny.dtype]).double()
            gradients = torch.autograd.grad(logits, leaves, u, materialize_grads=True)
            size = max(float(x.abs().max()) for x in gradients)
            return [x.detach() for x in (logits, *gradients)], [0.0] + [4 * size] * len(gradients)
        if self.wanted.startswith("loss"):
            loss = self._loss(found)
            return [logits, loss], [0.0, 0.0]
        if self.wanted == "maps":
            layers = [torch.cat([row[i].flatten() for row in maps]) for i in range(self.tiny.layers)]
            return [logits, *layers], [0.0] * (1 + len(layers))
        return [logits], [0.0]

    def _rows(self, decoder: exact.Decoder) -> tuple[list[Tensor], list[list[Tensor]]]:
        logits, maps = [], []
        given = self.positions() if self.form in ("shifted", "packed", "packed, ones", "tree") else None
        for b, ids in enumerate(self.ids()):
            settings: dict[str, Any] = {"length": self.rope_length}
            if given is not None:
                settings["positions"] = given[min(b, len(given) - 1)]
            if self.form.startswith("packed"):
                settings["documents"] = (settings["positions"] == 0).cumsum(0)
            if self.form in ("mask", "additive", "tree"):
                settings["see"] = self.seen()[b : b + 1]
            row, layers = self.tiny.row(decoder, ids, **settings)
            logits.append(row)
            maps.append(layers)
        return logits, maps

    def _loss(self, rows: list[Tensor]) -> Tensor:
        labels, total, count = self.labels(), torch.zeros((), dtype=torch.float64), 0
        for b, (logits, start) in enumerate(zip(rows, self.starts(), strict=True)):
            for i in range(len(logits)):
                after = start + i + 1
                target = int(labels[b, after]) if after < self.total else -100
                if target != -100:
                    total, count = total - F.log_softmax(logits[i], 0)[target], count + 1
        return total / (7 if self.wanted == "loss of a batch" else max(count, 1))

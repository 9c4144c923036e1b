"""Random layers of `clearhead.nn`: every class, position and mask, cross-attention, caches of both kinds, gradients."""

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, LlamaConfig, StaticCache

from clearhead import nn
from tests.fuzz import exact
from tests.fuzz.draw import Draw
from tests.fuzz.exact import Place, Spec
from tests.fuzz.judge import Case, Wrong, compare
from tests.fuzz.operations import DTYPES, instruction_sets, machine
from tests.fuzz.places import TRAINED, Method, method_for, place_of, request_lengths

CLASSES: dict[str, type[nn.Attention]] = {
    "softmax": nn.Attention,
    "differential": nn.DifferentialAttention,
    "differential_v2": nn.DifferentialAttentionV2,
    "collinear": nn.CollinearAttention,
    "differential_collinear": nn.DifferentialCollinearAttention,
    "differential_v2_collinear": nn.DifferentialCollinearAttentionV2,
}


def options_of(draw: Draw, attention: str) -> dict[str, Any]:
    """Options of a variant, most often none."""
    found: dict[str, Any] = {}
    if "collinear" in attention:
        found["mode"] = draw.one("exact", "slack", "strict")
        found["activation"] = draw.one("relu", "softplus")
    if attention in ("differential", "differential_collinear"):
        found |= draw.one({}, {}, {"lambda_init": draw.number(0, 0.9)}, {"head_norm": False})
    if attention == "softmax" and draw.chance(0.3):
        found["head_norm"] = True
    return found


def heads_of(draw: Draw, attention: str) -> tuple[int, int]:
    """Query and key-value heads of the twin; V1 pairs both."""
    groups, repeats = draw.one(1, 1, 2, 3), draw.one(1, 2, 3)
    pair = 2 if attention in ("differential", "differential_collinear") else 1
    return pair * groups * repeats, pair * groups


def shake(module: torch.nn.Module, seed: int, spread: float) -> None:
    """Random parameters away from their initial values, so that no term hides behind a one or a zero."""
    draw = Draw(seed)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            size = 0.3 if "lambda_q" in name or "lambda_k" in name else spread
            parameter.copy_(size * draw.normal(*parameter.shape) + (1.0 if "norm" in name else 0.0))


def tolerances(
    expected: list[Tensor], plain: list[Tensor] | None, dtype: torch.dtype, noise: list[float]
) -> list[float]:
    """For each tensor: float64's few digits, or four times what plain arithmetic in `dtype` is off, and some ε.

    Of the largest of all the tensors, as some gradients are zero but for rounding; and of `noise`, the size that a
    gradient has before its terms cancel, where this is known.
    """
    if plain is None:
        return [1e-9 * (1 + _largest(x)) for x in expected]
    epsilon = torch.finfo(dtype).eps
    floor = 64 * epsilon * (1 + max(_largest(x) for x in expected))
    own = [4 * _largest(a.double() - b) for a, b in zip(plain, expected, strict=True)]
    return [a + floor + 64 * epsilon * b for a, b in zip(own, noise, strict=True)]


def _largest(x: Tensor) -> float:
    return float(x.abs().max()) if x.numel() else 0.0


@dataclass(frozen=True)
class Layer(Case):
    """One layer and one call of it.

    kind:      "self", "cross" or "cached"; `chunks` are the calls on a cache.
    positions: "counted" (not given), "shifted", "gaps" or "restart" (with documents).
    padding, documents, dense: as for `Operation`.
    """

    seed: int
    attention: str = "softmax"
    options: dict[str, Any] = field(default_factory=dict)
    heads: int = 2
    kv_heads: int = 2
    width: int = 4
    embed: int = 6
    layer: int = 0
    bias: bool = False
    method: Method = field(default_factory=Method)
    kind: str = "self"
    batch: int = 1
    queries: int = 1
    keys: int = 1
    chunks: tuple[int, ...] = ()
    cache: str = "dynamic"
    causal: bool = True
    window: int | None = None
    padding: str | None = None
    documents: str | None = None
    dense: str | None = None
    positions: str = "counted"
    rope_length: int | None = None
    dtype: str = "float64"
    backend: str = "auto"
    isa: str | None = None
    maps: bool = False

    @classmethod
    def draw(cls, draw: Draw) -> "Layer":
        attention = draw.among(list(CLASSES))
        heads, kv_heads = heads_of(draw, attention)
        width = draw.one(2, 4, 4, 6, 8, 16)
        if "collinear" not in attention:
            width = draw.one(width, width, width, 1, 3, 17)
        method = method_for(draw, width, "collinear" in attention)
        kind = draw.one("self", "self", "self", "cross", "cached")
        queries = draw.one(draw.between(1, 8), draw.between(1, 14))
        keys = queries + (draw.one(0, draw.between(0, 6)) if kind == "cross" else 0)
        chunks: tuple[int, ...] = ()
        while kind == "cached" and sum(chunks) < queries:
            chunks += (min(draw.one(1, 1, 2, 5), queries - sum(chunks)),)
        documents = None if kind != "self" else draw.one(None, None, None, "runs", "scattered")
        length = None
        if method.by_length and (kind == "cached" or draw.chance(0.3)):
            length = keys + draw.one(0, 0, 3, TRAINED)
        dtype = draw.one("float64", "float64", "float32", "float32", "bfloat16")
        backend = draw.one("auto", "auto", "auto", "eager", "sdpa", "cpu")
        if backend == "cpu" and dtype == "float64":
            dtype = "float32"
        shifts = ["counted", "counted", "shifted", "gaps"]
        return cls(
            seed=draw.seed(),
            attention=attention,
            options=options_of(draw, attention),
            heads=heads,
            kv_heads=kv_heads,
            width=width,
            embed=draw.one(3, 6, 10, 16),
            layer=draw.between(0, 3),
            bias=draw.chance(0.2),
            method=method,
            kind=kind,
            batch=draw.one(1, 2, 3),
            queries=queries,
            keys=keys,
            chunks=chunks,
            cache=draw.one("dynamic", "static"),
            causal=kind == "cached" or method.name == "xpos" or draw.chance(0.6),
            window=draw.one(*[None] * 4, 1, 2, 5, 100),
            padding=draw.one(*[None] * 3, "left", "right", "scattered", "all"),
            documents=documents,
            dense=None if kind == "cached" else draw.one(*[None] * 5, "bool", "bias", "bool head"),
            positions="counted" if kind == "cached" else draw.among(shifts + ["restart"] * bool(documents)),
            rope_length=length,
            dtype=dtype,
            backend=backend,
            isa=draw.among(instruction_sets()) if instruction_sets() else None,
            maps=kind != "cached" and draw.chance(0.15),
        )

    @property
    def may_refuse(self) -> bool:
        fused = self.dtype in ("float32", "bfloat16") and self.dense is None and self.method.name != "alibi"
        return (self.backend == "cpu" and not fused) or (self.maps and self.backend in ("cpu", "sdpa"))

    def check(self) -> None:
        dtype = DTYPES[self.dtype]
        module, tensors = self.module(self.backend), self.tensors()
        with machine(self.isa, 1):
            found = self.answers(module, tensors)
            plain = None
            if dtype != torch.float64:
                plain = self.answers(self.module("eager"), tensors)
        weights = {k: v.requires_grad_() for k, v in exact.named(dict(module.named_parameters())).items()}
        expected, noise = self.expected(weights, tensors)
        names = ["map" if self.maps else "output"]
        if len(found) > 1:
            names += ["gradient of x", *(["gradient of the context"] if self.kind == "cross" else [])]
            names += [f"gradient of {name}" for name in weights]
        label = f"{self.attention}, {self.kind}, {self.backend}, {self.dtype}, "
        compare(names, found, expected, tolerances(expected, plain, dtype, noise), label)

    def module(self, backend: str) -> nn.Attention:
        torch.manual_seed(0)
        made = CLASSES[self.attention](
            self.embed,
            self.heads,
            num_kv_heads=self.kv_heads,
            head_dim=self.width,
            layer_idx=self.layer,
            bias=self.bias,
            position=self.method.name,
            rope_parameters=self.method.parameters,
            max_positions=TRAINED,
            backend=backend,
            **self.options,
        ).double()
        shake(made, self.seed + 1, 0.5)
        return made.to(DTYPES[self.dtype])

    def tensors(self) -> list[Tensor]:
        """x and perhaps the context, in float64 but rounded to the dtype."""
        draw = Draw(self.seed)
        shapes = [(self.batch, self.queries, self.embed)]
        if self.kind == "cross":
            shapes.append((self.batch, self.keys, self.embed))
        return [draw.normal(*shape).to(DTYPES[self.dtype]).double() for shape in shapes]

    def cotangent(self) -> Tensor:
        shape = (self.batch, self.queries, self.embed)
        return Draw(self.seed + 2).normal(*shape).to(DTYPES[self.dtype]).double()

    def masks(self) -> dict[str, Any]:
        """`key_padding_mask`, `documents`, `attn_mask`, `positions` and `context_positions`, those that there are."""
        draw, found = Draw(self.seed + 3), {}
        B, L, S = self.batch, self.queries, self.keys
        if self.padding is not None:
            cut = draw.integers(S + 1, B, 1)
            real = torch.arange(S) >= cut if self.padding == "left" else torch.arange(S) < cut
            if self.padding in ("scattered", "all"):
                real = draw.flags(B, S, share=0.7)
            if self.padding == "all":
                real[0] = False
            found["key_padding_mask"] = real
        if self.documents is not None:
            numbers = draw.integers(3, B, S)
            found["documents"] = numbers.sort(1).values if self.documents == "runs" else numbers
        if self.dense is not None:
            heads = self.heads // (2 if self.attention in ("differential", "differential_collinear") else 1)
            shape = (B, heads, L, S) if self.dense == "bool head" else (L, S)
            mask = draw.flags(*shape, share=0.7)
            found["attn_mask"] = draw.normal(L, S).to(DTYPES[self.dtype]) if self.dense == "bias" else mask
        if self.positions == "shifted":
            found["positions"] = torch.arange(L)[None] + draw.between(1, 40)
        if self.positions == "gaps":
            found["positions"] = draw.integers(4, draw.one(1, B), L).cumsum(1)
        if self.positions == "restart":
            runs = found["documents"]
            same = runs[:, :, None] == runs[:, None, :]
            found["positions"] = (same & (torch.ones(L, L).tril(-1) > 0)).sum(-1)
        if self.kind == "cross" and self.positions != "counted":
            found["context_positions"] = torch.arange(S)[None] + draw.between(0, 5)
        return found

    def answers(self, module: nn.Attention, tensors: list[Tensor]) -> list[Tensor]:
        inputs = [x.to(DTYPES[self.dtype]).requires_grad_() for x in tensors]
        masks = self.masks()
        call = {"is_causal": self.causal, "window": self.window, "rope_length": self.rope_length, **masks}
        if self.kind == "cached":
            return [self._cached(module, inputs[0], call)]
        if self.maps:
            return [module.effective_map(*inputs, **call).detach()]
        out = module(*inputs, **call)
        if out.dtype != DTYPES[self.dtype]:
            raise Wrong("dtype of the output", self.dtype, str(out.dtype))
        leaves = [*inputs, *module.parameters()]
        found = torch.autograd.grad(
            out, leaves, self.cotangent().to(out.dtype), materialize_grads=True, allow_unused=True
        )
        return [x.detach() for x in (out, *found)]

    @torch.no_grad()
    def _cached(self, module: nn.Attention, x: Tensor, call: dict[str, Any]) -> Tensor:
        cache: Any = DynamicCache()
        size = self.queries + 2
        if self.cache == "static":
            cache = StaticCache(config=LlamaConfig(num_hidden_layers=4), max_cache_len=size)
        real, parts, start = call.pop("key_padding_mask", None), [], 0
        for chunk in self.chunks:
            end = start + chunk
            if real is not None:
                # A cache of fixed size has keys that are not written yet.
                width = size if self.cache == "static" else end
                call["key_padding_mask"] = torch.nn.functional.pad(real[:, :end], (0, width - end))
            parts.append(module(x[:, start:end], cache=cache, **call))
            start = end
        return torch.cat(parts, 1)

    def expected(self, weights: dict[str, Tensor], tensors: list[Tensor]) -> tuple[list[Tensor], list[float]]:
        """The exact answers, and how large the gradients of the logits alone are where nothing cancels."""
        inputs = [x.clone().requires_grad_() for x in tensors]
        spec = Spec(
            self.attention,
            self.heads,
            self.kv_heads,
            self.width,
            self.layer,
            self.method.name,
            self.method.layout,
            options=self.options,
            **self.method.xpos,
        )
        found = exact.layer(spec, weights, inputs[0], inputs[-1], self.place())
        if self.maps or self.kind == "cached":
            return [(found.map if self.maps else found.output).detach()], [0.0]
        leaves = [*inputs, *weights.values()]
        u, settings = self.cotangent(), {"materialize_grads": True, "retain_graph": True}
        *gradients, of_map = torch.autograd.grad(found.output, [*leaves, found.map], u, **settings)
        draw, size = Draw(self.seed + 4), float(of_map.abs().max())
        along = [size * draw.normal(*x.shape) for x in found.logits]
        sizes = torch.autograd.grad(found.logits, leaves, along, materialize_grads=True)
        answers = [x.detach() for x in (found.output, *gradients)]
        return answers, [0.0, *(float(x.abs().max()) for x in sizes)]

    def place(self) -> Place:
        given, B, L, S = self.masks(), self.batch, self.queries, self.keys
        real, documents = given.get("key_padding_mask"), given.get("documents")
        dense = given.get("attn_mask")
        parts = {"padding": real, "documents": documents, "dense": dense}
        see = exact.visible(L, S, causal=self.causal, window=self.window, **parts)
        positions = given.get("positions", torch.arange(L)[None]).expand(B, L)
        keys = (
            given.get("context_positions", torch.arange(S)[None]).expand(B, S)
            if self.kind == "cross"
            else positions
        )
        if self.rope_length is not None:
            lengths, key_lengths = (torch.full((B, n), self.rope_length) for n in (L, S))
        elif self.kind == "cross":
            longest = torch.maximum(
                request_lengths(positions, None, None)[:, :1], request_lengths(keys, None, real)[:, :1]
            )
            lengths, key_lengths = longest.expand(B, L), longest.expand(B, S)
        else:
            lengths = key_lengths = request_lengths(positions, documents, real)
        bias = None if dense is None or dense.dtype == torch.bool else exact.finite(dense)
        return place_of(self.method, self.width, positions, keys, see, lengths, key_lengths, bias)

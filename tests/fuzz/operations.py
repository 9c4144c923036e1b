"""Random calls of `clearhead.functional`: values and gradients in every form, layout, mask, dtype and backend."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor

from clearhead.functional import attention, differential_attention
from clearhead.kernels import ops
from clearhead.kernels.cpu import library
from tests.fuzz import exact
from tests.fuzz.bounds import bounds, rounding_of
from tests.fuzz.draw import Draw
from tests.fuzz.judge import Case, Wrong, compare
from tests.oracles import alibi

DTYPES = {
    "float32": torch.float32,
    "float64": torch.float64,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}
# What the CPU kernel computes in.
FUSED = ("float32", "bfloat16")
WIDTHS = (1, 2, 3, 8, 16, 17, 33, 64, 65, 128, 255, 256, 257, 512)
NAMES = ("output", "gradient of q", "gradient of k", "gradient of v", "gradient of λ")
# The most rows × keys × width of a problem, so that each takes milliseconds.
MOST = 600_000

# How a tensor (B, H, N, D) may lie in memory: what is stored, and its view.
Layout = tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]
LAYOUTS: dict[str, Layout] = {
    "dense": (lambda x: x, lambda y: y),
    "model": (lambda x: x.transpose(1, 2), lambda y: y.transpose(1, 2)),
    "tokens first": (lambda x: x.permute(2, 0, 1, 3), lambda y: y.permute(1, 2, 0, 3)),
    "width outside": (lambda x: x.transpose(2, 3), lambda y: y.transpose(2, 3)),
    "slice": (lambda x: torch.nn.functional.pad(x, (3, 2, 1, 4)), lambda y: y[:, :, 1:-4, 3:-2]),
    "every other": (lambda x: x.repeat_interleave(2, 1), lambda y: y[:, 1::2]),
    "every other token": (lambda x: x.repeat_interleave(2, 2), lambda y: y[:, :, ::2]),
    "flipped": (lambda x: x.flip(2), lambda y: y.flip(2)),
    "sign noted": (torch.neg, torch._neg_view),
    "same for the batch": (lambda x: x[: min(1, len(x))], lambda y: y),
    "same for all tokens": (lambda x: x[:, :, :1], lambda y: y),
}


@cache
def instruction_sets() -> tuple[str, ...]:
    """Those of the CPU kernel that this processor has; none without a kernel."""
    if library.missing() is not None:
        return ()
    loaded, found = library.load(), []
    best = loaded.isa()
    for name in ("avx512_bf16", "avx512", "avx2", "portable"):
        try:
            loaded.set_isa(name)
        except ValueError:
            continue
        found.append(name)
    loaded.set_isa(best)
    return tuple(found)


@contextmanager
def machine(isa: str | None, threads: int, keep_noise: bool = True) -> Iterator[None]:
    """The instruction set, threads and memory of the CPU kernel during one call."""
    before, most = torch.get_num_threads(), ops.MOST_NOISE
    best = None if isa is None else library.load().isa()
    try:
        if isa is not None:
            library.load().set_isa(isa)
        torch.set_num_threads(threads)
        if not keep_noise:
            ops.MOST_NOISE = 0
        yield
    finally:
        ops.MOST_NOISE = most
        torch.set_num_threads(before)
        if best is not None:
            library.load().set_isa(best)


def _layouts(draw: Draw, own_numbers: bool) -> tuple[str, str, str]:
    # What padding holds differs from row to row, so rows cannot share their numbers.
    names = [name for name in LAYOUTS if not (own_numbers and name.startswith("same"))]
    if draw.chance(0.4):
        return ("dense", "dense", "dense")
    return (draw.among(names), draw.among(names), draw.among(names))


@dataclass(frozen=True)
class Masks:
    """Arguments of the public operation, and the same for `exact.attend`."""

    arguments: dict[str, Any]
    see: Tensor
    bias: Tensor | None


@dataclass(frozen=True)
class Operation(Case):
    """One call of `attention` (one stream) or `differential_attention` (two); fields as their arguments.

    padding:   "left", "right", "scattered", "all" (one row sees nothing), "shared" (one row for the batch).
    documents: "runs", "scattered", "shared".
    dense:     "bool", "bool head", "bool row", "bias", "bias head", "bias -inf", "bias ±1e9", "blind".
    hidden:    what padded keys and values hold in place of numbers: "nan", "inf".
    spread:    standard deviation of the queries; 1e9 makes logits of that size.
    """

    seed: int
    streams: int = 2
    own_keys: bool = False
    batch: int = 1
    groups: int = 1
    repeats: int = 1
    queries: int = 1
    keys: int = 1
    width: int = 8
    value_width: int = 8
    dtype: str = "float32"
    lam: str = "token"
    causal: bool = False
    window: int | None = None
    padding: str | None = None
    documents: str | None = None
    dense: str | None = None
    slopes: bool = False
    scale: float | str | None = None
    layouts: tuple[str, str, str] = ("dense", "dense", "dense")
    spread: float = 1.0
    hidden: str | None = None
    backend: str = "auto"
    isa: str | None = None
    threads: int = 1
    keep_noise: bool = True
    grad: bool = True

    @classmethod
    def draw(cls, draw: Draw) -> "Operation":
        streams = draw.one(1, 2, 2)
        dtype = draw.one("float32", "float32", "float32", "float64", "bfloat16", "bfloat16", "float16")
        backend = draw.one("auto", "auto", "cpu", "cpu", "eager", "sdpa")
        if draw.chance(0.004):
            backend = "flex"
        batch, groups, repeats = draw.one(0, *(1, 2, 2, 3) * 8), draw.one(1, 1, 2, 3), draw.one(1, 1, 2, 3, 8)
        width = draw.among(WIDTHS) if draw.chance(0.5) else draw.between(1, 24)
        value_width = draw.one(width, 2 * width, draw.among(WIDTHS), draw.between(1, 24))
        value_width = min(value_width, 1024 if draw.chance(0.1) else 512)
        queries = draw.between(1, 9) if draw.chance(0.7) else draw.one(15, 31, 32, 33, 63, 64, 65, 127, 129)
        more = draw.one(0, 0, draw.between(0, 9), draw.one(31, 63, 64, 128, 129, 255))
        keys = queries + more
        if draw.chance(0.08):
            queries, keys = keys + draw.between(0, 5), draw.between(1, max(1, keys - 1))
        rows = max(1, batch) * groups * repeats * streams
        while queries > 1 and rows * queries * keys * (width + value_width) > MOST:
            queries, keys = max(1, queries // 2), max(1, keys // 2)
        hidden = None
        padding = draw.one(None, None, None, "left", "right", "scattered", "all", "shared")
        if padding is not None and draw.chance(0.1):
            hidden = draw.one("nan", "inf")
        spread = draw.one(1.0, 1.0, 1.0, 0.0, 8.0, 64.0, 1e9)
        fused = backend == "cpu" and draw.chance(0.9)
        if fused and dtype not in FUSED:
            dtype = "float32"
        kinds = [None] * 8 + ["bool", "bool head", "bool row", "blind"]
        return cls(
            seed=draw.seed(),
            streams=streams,
            own_keys=streams == 2 and draw.chance(0.5),
            batch=batch,
            groups=groups,
            repeats=repeats,
            queries=queries,
            keys=keys,
            width=width,
            value_width=value_width,
            dtype=dtype,
            lam=draw.one("number", "call", "head", "token", "token", "row"),
            causal=draw.chance(0.4),
            window=draw.one(*[None] * 6, 1, 2, 5, 40, 1000, 2**31, 2**63 - 1, 2**63, 2**70),
            padding=padding,
            documents=draw.one(*[None] * 5, "runs", "scattered", "shared"),
            dense=None if fused else draw.one(*kinds, "bias", "bias head", "bias -inf", "bias ±1e9"),
            slopes=not fused and draw.chance(0.1),
            scale=draw.one(*[None] * 6, 0.0, -0.3, 1.0, 1e-3, "tensor"),
            layouts=_layouts(draw, hidden is not None),
            spread=min(spread, 8.0) if dtype == "float16" else spread,
            hidden=hidden,
            backend=backend,
            isa=draw.among(instruction_sets()) if instruction_sets() else None,
            threads=draw.one(*[1] * 8, 2, 3),
            keep_noise=draw.chance(0.8),
            grad=backend != "flex" and draw.chance(0.75),
        )

    @property
    def heads(self) -> int:
        return self.groups * self.repeats

    @property
    def placed(self) -> bool:
        """Whether the mask says where queries stand, which takes at least as many keys."""
        return self.causal or self.window is not None or self.documents is not None or self.slopes

    @property
    def must_refuse(self) -> bool:
        return self.placed and self.queries > self.keys

    @property
    def may_refuse(self) -> bool:
        # A batch of nothing and a scale that is a tensor may be refused everywhere.
        return self.beyond_its_backend or self.batch == 0 or self.scale == "tensor"

    @property
    def beyond_its_backend(self) -> bool:
        """Whether the backend is named and has not what is asked for."""
        if self.backend == "flex":
            return True
        wide = max(self.width, self.value_width) > 512
        return self.backend == "cpu" and (
            self.dtype not in FUSED or self.dense is not None or self.slopes or wide
        )

    def subject(self) -> str:
        return "more queries than keys with places"

    @property
    def recomputes(self) -> bool:
        """Whether gradients come from weights that PyTorch's kernels compute again, as exp(logit − log of the sum).

        In float32 the two are rounded apart by more than 1 from logits of 10⁶ on: such a weight may be anything.
        """
        return self.spread == 1e9 and self.backend in ("auto", "sdpa")

    def check(self) -> None:
        masks = self.masks()
        inputs, cotangent = self.inputs()
        found = self.answers(inputs, cotangent, masks)
        given = [x.double().nan_to_num(0.0, 0.0, 0.0) for x in inputs]
        expected, allowed = self.expected(given, cotangent.double(), masks)
        if not self.grad or self.recomputes:
            expected, allowed, found = expected[:1], allowed[:1], found[:1]
        label = f"{self.backend}, {self.dtype}, "
        compare(self.names[: len(expected)], found, expected, allowed, label)

    @property
    def names(self) -> tuple[str, ...]:
        tensor_scale = ("gradient of the scale",) if self.scale == "tensor" else ()
        lam = NAMES[4:] if self.streams == 2 and self.lam != "number" else ()
        return (*NAMES[:4], *lam, *tensor_scale)

    def masks(self) -> Masks:
        """From the seed alone, whatever else is drawn from it."""
        draw = Draw(self.seed + 1)
        B, L, S = max(1, self.batch), self.queries, self.keys
        arguments: dict[str, Any] = {"is_causal": self.causal, "window": self.window}
        padding = documents = dense = bias = None
        if self.padding is not None:
            rows = 1 if self.padding == "shared" else B
            cut = draw.integers(S + 1, rows, 1)
            padding = torch.arange(S) >= cut if self.padding == "left" else torch.arange(S) < cut
            if self.padding in ("scattered", "shared"):
                padding = draw.flags(rows, S, share=0.7)
            if self.padding == "all":
                padding = draw.flags(rows, S, share=0.7) & (torch.arange(rows) > 0)[:, None]
            arguments["key_padding_mask"] = padding[: self.batch] if rows == B else padding
        if self.documents is not None:
            rows = 1 if self.documents == "shared" else B
            numbers = draw.integers(3, rows, S)
            if self.documents == "runs":
                numbers = numbers.sort(1).values
            # Far apart, negative and in no order; of any integer type.
            numbers = torch.tensor([3, -(2**40), 7])[numbers] if draw.chance(0.5) else numbers.to(torch.int32)
            documents = numbers.long()
            arguments["documents"] = numbers[: self.batch] if rows == B else numbers
        if self.dense is not None:
            dense = self._dense(draw)
            arguments["attn_mask"] = dense
            if dense.is_floating_point():
                bias = exact.finite(dense)
        if self.slopes:
            slopes = [alibi.slope(h, self.heads) for h in range(self.heads)]
            arguments["alibi_slopes"] = torch.tensor(slopes, dtype=torch.float32)
            away = torch.arange(S)[None] - (torch.arange(L) + S - L)[:, None]
            sloped = -arguments["alibi_slopes"].double()[:, None, None] * away.abs()
            bias = sloped[None] if bias is None else bias + sloped
        if self.must_refuse:
            return Masks(arguments, torch.ones(1, 1, L, S, dtype=torch.bool), bias)
        parts = {"padding": padding, "documents": documents, "dense": dense}
        see = exact.visible(L, S, causal=self.causal, window=self.window, **parts)
        return Masks(arguments, see, bias)

    def _dense(self, draw: Draw) -> Tensor:
        B, H, L, S = max(1, self.batch), self.heads, self.queries, self.keys
        name = str(self.dense)
        shape = {"bool": (L, S), "bias": (L, S), "bool row": (1, S)}.get(
            name, (draw.one(1, B), draw.one(1, H), L, S)
        )
        if not name.startswith("bias"):
            seen = draw.flags(*shape, share=0.6)
            if name == "blind":
                seen[..., draw.between(0, L - 1), :] = False
            return seen
        # As a caller would have it: in the queries' dtype, and what it rounds to is what is added.
        bias = draw.normal(*shape).to(DTYPES[self.dtype])
        if name == "bias -inf":
            bias = bias.masked_fill(draw.flags(*shape, share=0.3), -torch.inf)
        if name == "bias ±1e9":
            size = 6e4 if self.dtype == "float16" else 1e9
            bias = bias.masked_fill(draw.flags(*shape, share=0.3), -size)
            bias = bias.masked_fill(draw.flags(*shape, share=0.1), size)
        return bias

    def inputs(self) -> tuple[list[Tensor], Tensor]:
        """q, k, v, perhaps λ and scale as they are handed over, and the output's gradient."""
        draw, dtype = Draw(self.seed), DTYPES[self.dtype]
        B, H, G = self.batch, self.heads, self.groups
        size = (3e4, 3e4) if self.spread == 1e9 else (self.spread, 1.0)
        key_heads = 2 * G if self.own_keys else G
        shapes = (
            (B, self.streams * H, self.queries, self.width),
            (B, key_heads, self.keys, self.width),
            (B, G, self.keys, self.value_width),
        )
        tensors = []
        for shape, name, spread in zip(shapes, self.layouts, (*size, 1.0), strict=True):
            x = (spread * draw.normal(*shape)).to(dtype)
            if self.hidden is not None and len(tensors):
                x = self._poisoned(x)
            stored, view = LAYOUTS[name]
            kept = stored(x)
            kept = kept.clone(memory_format=torch.contiguous_format)
            laid = view(kept)
            tensors.append(laid.expand(shape) if name.startswith("same") else laid)
        if self.streams == 2 and self.lam != "number":
            shape = {"call": (), "head": (H, 1, 1), "token": (B, H, self.queries, 1), "row": (B, 1, 1, 1)}
            wide = torch.promote_types(dtype, torch.float32) if draw.chance(0.7) else dtype
            lam = (0.5 + draw.normal(*shape[self.lam])).to(wide)
            tensors.append(torch._neg_view(-lam) if draw.chance(0.1) else lam)
        if self.scale == "tensor":
            tensors.append(torch.tensor(draw.number(-1, 1), dtype=torch.promote_types(dtype, torch.float32)))
        cotangent = draw.normal(B, H, self.queries, self.value_width).to(dtype)
        return tensors, cotangent

    def _poisoned(self, x: Tensor) -> Tensor:
        real = self.masks().arguments["key_padding_mask"]
        value = torch.nan if self.hidden == "nan" else torch.inf
        return x.masked_fill(~real[:, None, :, None], value)

    def answers(self, inputs: list[Tensor], cotangent: Tensor, masks: Masks) -> list[Tensor]:
        """The output and, if asked, the gradients."""
        leaves = [x.detach().requires_grad_(self.grad) for x in inputs]
        with machine(self.isa, self.threads, self.keep_noise), torch.set_grad_enabled(self.grad):
            out = self.call(leaves, masks)
            if out.dtype != DTYPES[self.dtype]:
                raise Wrong("dtype of the output", self.dtype, str(out.dtype))
            if not self.grad:
                return [out]
            found = torch.autograd.grad(out, leaves, cotangent, allow_unused=True)
        lost = [n for n, g in zip(self.names[1:], found, strict=True) if g is None]
        if lost:
            raise Wrong(f"{self.backend}, {lost[0]}", "a gradient", "None")
        return [out.detach(), *(x for x in found if x is not None)]

    def call(self, leaves: list[Tensor], masks: Masks) -> Tensor:
        """The public operation on q, k, v, perhaps λ and scale."""
        scale: Any = leaves[-1] if self.scale == "tensor" else self.scale
        arguments = {**masks.arguments, "scale": scale, "backend": self.backend}
        if self.streams == 1:
            return attention(*leaves[:3], **arguments)
        lam = self.number if self.lam == "number" else leaves[3]
        return differential_attention(*leaves[:3], lam, **arguments)

    @property
    def number(self) -> float:
        """λ where it is a number."""
        return Draw(self.seed + 2).one(0.0, 1.0, -0.7, 2.5)

    def expected(
        self, given: list[Tensor], cotangent: Tensor, masks: Masks
    ) -> tuple[list[Tensor], list[Tensor]]:
        """The exact answers, and how far off each may be."""
        leaves = [x.detach().clone().requires_grad_() for x in given]
        scale: Any = leaves[-1] if self.scale == "tensor" else self.scale
        lam: Any = None if self.streams == 1 else self.number if self.lam == "number" else leaves[3]
        out = exact.attend(*leaves[:3], lam, masks.see, masks.bias, scale)
        gradients = torch.autograd.grad(out, leaves, cotangent, materialize_grads=True)
        plain = lam.detach() if isinstance(lam, Tensor) else lam
        size = self.width**-0.5 if self.scale is None else float(torch.as_tensor(scale).detach())
        # A tensor's scale multiplies the queries, which rounds them.
        fused = self.backend == "cpu" and self.scale != "tensor"
        rounding = rounding_of(DTYPES[self.dtype], fused)
        allowed = bounds(*given[:3], plain, masks.see, masks.bias, size, cotangent, rounding)
        expected = [out.detach(), *gradients]
        if self.scale == "tensor":
            # scale · dL/dscale is what q · dL/dq sums to.
            slack = (given[0].abs() * allowed[1]).sum() / max(abs(size), 1e-3)
            allowed.append(2 * slack + 64 * rounding.number * (1 + gradients[-1].abs()))
        if self.lam in ("call", "head", "row", "token") and self.streams == 2 and self.grad:
            low = self.inputs()[0][3].dtype
            allowed[4] = allowed[4] + 4 * torch.finfo(low).eps * expected[4].abs()
        return expected, allowed

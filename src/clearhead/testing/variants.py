"""Contract of variants, checked on a layer in float64.

Legend: B batch, H query heads, L tokens, S keys.
"""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from clearhead.core.attend import problem_of
from clearhead.core.dispatch import automatic_backends, load_backend
from clearhead.core.masks import MaskSpec
from clearhead.core.streams import HeadShape
from clearhead.nn.attention import Attention
from clearhead.nn.projections import ProjectedAttention
from clearhead.positions.rope import Rope
from clearhead.testing.backends import relative_error
from clearhead.testing.masks import rand
from clearhead.testing.oracles.softmax import apply_map, attention_map, visible
from clearhead.variants.base import Variant
from clearhead.variants.schedule import TrainingProgress

B, L, HEADS, WIDTH = 2, 7, 4, 8
EXACT = 1e-9
# How far the training of layers with a schedule is: neither its beginning nor its end.
PROGRESS = 0.375
Oracle = Callable[[Tensor, dict[str, Tensor], Tensor], Tensor]


class Cache:
    """The smallest key-value cache: one layer, which grows."""

    def __init__(self) -> None:
        self.held: tuple[Tensor, Tensor] | None = None

    def update(self, key_states: Tensor, value_states: Tensor, layer_idx: int) -> tuple[Tensor, Tensor]:
        """Append and return everything."""
        new = (key_states, value_states)
        old = self.held
        self.held = new if old is None else (torch.cat((old[0], new[0]), 2), torch.cat((old[1], new[1]), 2))
        return self.held

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Tokens held."""
        return 0 if self.held is None else self.held[0].shape[2]


def make_layer(variant: Variant, backend: str = "auto") -> Attention:
    """A float64 layer around `variant` with RoPE and parameters that none is zero."""
    layer = Attention.__new__(Attention)
    ProjectedAttention.__init__(layer, variant, bias=False, context_dim=None)
    layer.position, layer.block_sparse = Rope(variant.shape.head_dim), None
    layer.automatic = backend == "auto"
    layer.backends = automatic_backends() if layer.automatic else (load_backend(backend),)
    generator = torch.Generator().manual_seed(3)
    layer.double()
    with torch.no_grad():
        for parameter in layer.parameters():
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            parameter.copy_(0.3 * noise + (1.0 if parameter.ndim == 1 else 0.0))
        for part in layer.modules():
            if isinstance(part, TrainingProgress):
                part.progress.fill_(PROGRESS)
    return layer


def check_variant(
    cls: type[Variant],
    *,
    options: dict[str, Any] | None = None,
    kv_heads: Iterable[int] = (4, 2),
    engines: Iterable[str] = ("eager", "sdpa"),
    oracle: Oracle | None = None,
) -> None:
    """Raise AssertionError, in a sentence, unless layers and models can use the variant `cls`.

    options:  keyword arguments of the variant.
    kv_heads: key-value heads of its Transformer twin, which has four heads.
    oracle:   x (B, L, embed_dim), the layer's parameters by name and what is visible (B, 1, L, L) -> output, in float64
        and apart from the variant; positions count from 0 and turn by RoPE. Without one the streams' maps are taken
        from the softmax oracle and mixed by the variant, which checks the rest but not the mechanism itself.

    Checked: widths, output and map in every engine, a mix that is linear, gradients to every parameter, no look at
    later tokens, a cache, chunks, padding and packed documents as each text alone, and bfloat16.
    """
    for groups in kv_heads:
        shape = HeadShape(HEADS * WIDTH, HEADS, groups, WIDTH, layer_idx=1)
        variant = cls(shape, **(options or {}))
        name = f"{cls.__name__} with {groups} key-value heads"
        for engine in engines:
            layer = make_layer(variant, engine)
            _check_values(layer, oracle, f"{name} on {engine}")
        layer = make_layer(variant)
        _check_gradients(layer, name)
        with torch.no_grad():
            _check_sequence(layer, name)
            _check_precision(layer, name)


def _input() -> Tensor:
    return rand(B, L, HEADS * WIDTH, seed=9)


def expected(layer: Attention, x: Tensor, see: Tensor) -> tuple[Tensor, Tensor]:
    """Output and effective map of `layer`: the variant's streams, the oracle's softmax, the variant's mix."""
    positions = torch.arange(x.shape[1])[None]
    heads = layer.project(x, x, layer.position(positions, None, None, x.dtype))
    keys = heads.k * len(heads.q) if heads.shares_keys else heads.k
    maps = tuple(
        attention_map(q, k, allowed=see.expand(-1, q.shape[1], -1, -1), scale=layer.scale)
        for q, k in zip(heads.q, keys, strict=True)
    )
    variant = layer.variant
    mixed = variant.mix(tuple(apply_map(weights, heads.v) for weights in maps), heads.gate)
    joined = torch.cat(variant.finish(mixed).unbind(1), dim=-1)
    return layer.o_proj(joined), variant.mix(maps, heads.gate)


def _check_values(layer: Attention, oracle: Oracle | None, name: str) -> None:
    x = _input()
    see = visible(B, L, L, causal=True)[:, None]
    found = layer(x, is_causal=True)
    assert found.shape == x.shape, f"{name}: the output has shape {tuple(found.shape)}, not {tuple(x.shape)}"
    if oracle is not None:
        weights: dict[str, Tensor] = {
            key.rpartition("variant.")[2].removesuffix(".weight"): value
            for key, value in layer.named_parameters()
        }
        _near(found, oracle(x, weights, see), f"{name}: the output is not what its oracle says")
    right, right_map = expected(layer, x, see)
    _near(found, right, f"{name}: the output is not the mix of its softmax streams")
    if not _has_maps(layer):
        return
    effective = layer.effective_map(x, is_causal=True)
    _near(effective, right_map, f"{name}: the effective map is not the mix of its streams' maps")
    heads = layer.project(x, x, layer.position(torch.arange(L)[None], None, None, x.dtype))
    joined = torch.cat(layer.variant.finish(apply_map(effective, heads.v)).unbind(1), dim=-1)
    _near(layer.o_proj(joined), found, f"{name}: mix is not linear, so its map does not give its output")


def _has_maps(layer: ProjectedAttention) -> bool:
    x = _input()
    assert isinstance(layer, Attention)
    heads = layer.project(x, x, layer.position(torch.arange(L)[None], None, None, x.dtype))
    wanted = problem_of(heads, MaskSpec(is_causal=True), layer.variant.mixing, needs_maps=True)
    return any(backend.refusal(wanted) is None for backend in layer.backends)


def _check_gradients(layer: Attention, name: str) -> None:
    x = _input().requires_grad_()
    layer(x, is_causal=True).square().sum().backward()
    assert x.grad is not None and bool(x.grad.isfinite().all()), f"{name}: no finite gradient of its input"
    for key, parameter in layer.named_parameters():
        reached = parameter.grad is not None and bool(parameter.grad.isfinite().all())
        assert reached, f"{name}: no finite gradient reaches {key}"
        assert parameter.grad is not None
        assert bool(parameter.grad.abs().sum() > 0), f"{name}: the gradient of {key} is zero"
    layer.zero_grad()


def _check_sequence(layer: Attention, name: str) -> None:
    x = _input()
    whole = layer(x, is_causal=True)
    later = x.clone()
    later[:, 5:] += 1
    changed = layer(later, is_causal=True)
    _near(changed[:, :5], whole[:, :5], f"{name}: a later token changes an earlier output")
    for sizes in ((1,) * L, (3, 2, 2)):
        cache = Cache()
        steps = [layer(piece, is_causal=True, cache=cache) for piece in x.split(sizes, dim=1)]
        how = "token by token" if sizes[0] == 1 else "in chunks"
        _near(torch.cat(steps, dim=1), whole, f"{name}: with a cache, {how}, the output is another")
    real = torch.ones(B, L, dtype=torch.bool)
    real[0, :2] = False
    counted = torch.stack([(torch.arange(L) - 2).clamp(min=0), torch.arange(L)])
    padded = layer(x, is_causal=True, key_padding_mask=real, positions=counted)
    _near(padded[:1, 2:], layer(x[:1, 2:], is_causal=True), f"{name}: padding on the left changes a text")
    number = torch.tensor([[0] * 3 + [1] * (L - 3)]).expand(B, L)
    restart = torch.cat((torch.arange(3), torch.arange(L - 3)))[None]
    packed = layer(x, is_causal=True, documents=number, positions=restart)
    alone = torch.cat((layer(x[:, :3], is_causal=True), layer(x[:, 3:], is_causal=True)), dim=1)
    _near(packed, alone, f"{name}: a packed document is not as it is alone")


def _check_precision(layer: Attention, name: str) -> None:
    x = _input()
    exact = layer(x, is_causal=True)
    # What a mechanism's own parameters round is measured in float32, which no result may exceed by much.
    for dtype, most in ((torch.float32, 1e-4), (torch.bfloat16, 0.1)):
        found = layer.to(dtype)(x.to(dtype), is_causal=True)
        assert found.dtype == dtype, f"{name}: in {dtype} the output is {found.dtype}"
        _near(found, exact, f"{name}: in {dtype} the output is far from float64", most)
    layer.double()


def _near(found: Tensor, right: Tensor, sentence: str, most: float = EXACT) -> None:
    error = relative_error(found, right)
    assert error <= most, f"{sentence} ({error:.1e})"

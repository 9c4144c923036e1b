"""How models compute with weights that stay on disk: those of transformers, of this library, and plain ones.

Legend: B batch, L tokens, H heads, D width of a head.
"""

import ctypes
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils.hooks import RemovableHandle

from clearhead.convert.weights import Weights
from clearhead.models.config import AUTOMATIC


def give_back() -> None:
    """Return freed memory to the system where the C library would keep it (glibc)."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


class WeightReader:
    """Weights by name in one dtype, and products with matrices of which a few rows are in memory at a time."""

    def __init__(self, weights: Weights, dtype: torch.dtype) -> None:
        self.weights = weights
        self.dtype = dtype

    def __call__(self, name: str) -> Tensor:
        """The tensor, whole."""
        return self.weights.read(name).to(self.dtype)

    def linear(self, x: Tensor, name: str) -> Tensor:
        """x Wᵀ for the matrix W of that name."""
        made = torch.cat([F.linear(x, rows.to(self.dtype)) for rows in self.weights.blocks(name)], dim=-1)
        give_back()
        return made


class _Wide(TorchFunctionMode):
    """Whatever asks for float32 gets float64: norms, angles and softmax of transformers are float32 in any model."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = {key: _wider(value) for key, value in (kwargs or {}).items()}
        if func is Tensor.float:
            return args[0].double()
        return func(*map(_wider, args), **kwargs)


def _wider(value: Any) -> Any:
    return torch.float64 if value is torch.float32 else value


@contextmanager
def _default(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


class ModelComputation:
    """A causal language model of transformers or of this library; its layers have weights only while they run."""

    embedding = "model.embed_tokens.weight"

    def __init__(self, kind: Any, config: Any, dtype: torch.dtype, implementation: str | None = None) -> None:
        self.arguments: dict[str, Any] = {}
        self.head = self.embedding if config.tie_word_embeddings else "lm_head.weight"
        ours = config.model_type == "clearhead"
        # This library computes in float64 of its own accord, and is not to be checked against itself in disguise.
        wide = dtype == torch.float64 and not ours
        self.mode: Callable[[], Any] = _Wide if wide else nullcontext
        with _default(dtype):
            with torch.device("meta"):
                model = kind._from_config(
                    config,
                    attn_implementation=implementation or (AUTOMATIC if ours else "sdpa"),
                    dtype=dtype,
                )
            self.decoder = model.model.eval()
            # Angles are no weights: they are made anew outside of the meta device.
            with self.mode():
                if ours:
                    self.decoder.positions = nn.ModuleDict(config.make_positions()).to(dtype)
                else:
                    self.decoder.rotary_emb = type(self.decoder.rotary_emb)(config=config)

    def hidden(self, embedded: Tensor, read: WeightReader) -> Tensor:
        """The decoder's last states, after its norm."""
        with self._filled(read):
            found = self.decoder(inputs_embeds=embedded, use_cache=False, **self.arguments)
            states: Tensor = found.last_hidden_state
            return states

    def maps(self, embedded: Tensor, read: WeightReader) -> tuple[Tensor, ...]:
        """The attention maps (B, H, L, S) of every layer."""
        with self._filled(read):
            found: tuple[Tensor, ...] = self.decoder(
                inputs_embeds=embedded, use_cache=False, output_attentions=True
            ).attentions
            return found

    @contextmanager
    def _filled(self, read: WeightReader) -> Iterator[None]:
        """The decoder's layers find their weights when they run."""
        blocks = {f"model.layers.{index}": layer for index, layer in enumerate(self.decoder.layers)}
        blocks["model.norm"] = self.decoder.norm
        hooks = []
        for prefix, block in blocks.items():
            matrices = {
                name: unit
                for name, unit in block.named_modules()
                if isinstance(unit, nn.Linear) and unit.bias is None
            }
            for path, unit in matrices.items():
                unit.forward = partial(read.linear, name=f"{prefix}.{path}.weight")  # type: ignore[method-assign]
            rest = [name for name in block.state_dict() if name.rpartition(".")[0] not in matrices]
            hooks += _held(block, {name: f"{prefix}.{name}" for name in rest}, read)
        try:
            with torch.no_grad(), self.mode():
                yield
        finally:
            for hook in hooks:
                hook.remove()


def _held(unit: nn.Module, names: Mapping[str, str], read: WeightReader) -> list[RemovableHandle]:
    """Hooks that give a module the weights `names` (its own name of each: ours) for as long as it runs."""

    def fill(module: nn.Module, inputs: Any) -> None:
        for name, stored in names.items():
            _place(module, name, read(stored))

    def drop(module: nn.Module, inputs: Any, output: Any) -> None:
        for name, value in module.state_dict().items():
            if name in names:
                _place(module, name, value.to("meta"))

    return [unit.register_forward_pre_hook(fill), unit.register_forward_hook(drop)]


def _place(module: nn.Module, name: str, value: Tensor) -> None:
    path, _, leaf = name.rpartition(".")
    owner = module.get_submodule(path)
    if leaf in owner._buffers:
        owner._buffers[leaf] = value
    else:
        owner._parameters[leaf] = nn.Parameter(value, requires_grad=False)


class PlainDecoder:
    """A LLaMA-like decoder around any attention, written with plain functions from a released file.

    attention: (layer, normed states (B, L, hidden_size), read) -> (B, L, hidden_size).
    """

    embedding = "model.embed_tokens.weight"

    def __init__(
        self, attention: Callable[[int, Tensor, WeightReader], Tensor], layers: int, eps: float, tied: bool
    ) -> None:
        self.attention = attention
        self.layers = layers
        self.eps = eps
        self.head = self.embedding if tied else "lm_head.weight"

    def hidden(self, embedded: Tensor, read: WeightReader) -> Tensor:
        """The decoder's last states, after its norm."""
        x = embedded
        for layer in range(self.layers):
            prefix = f"model.layers.{layer}"
            normed = rms_norm(x, read(f"{prefix}.input_layernorm.weight"), self.eps)
            x = x + self.attention(layer, normed, read)
            normed = rms_norm(x, read(f"{prefix}.post_attention_layernorm.weight"), self.eps)
            gated = F.silu(read.linear(normed, f"{prefix}.mlp.gate_proj.weight"))
            inner = gated * read.linear(normed, f"{prefix}.mlp.up_proj.weight")
            x = x + read.linear(inner, f"{prefix}.mlp.down_proj.weight")
        return rms_norm(x, read("model.norm.weight"), self.eps)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x / √(mean(x²) + eps) · weight over the last axis."""
    return x * torch.rsqrt(x.square().mean(dim=-1, keepdim=True) + eps) * weight


def angles(length: int, width: int, parameters: Mapping[str, Any], dtype: torch.dtype) -> Tensor:
    """(L, D/2): position · θ^(−2j/D), positions divided by the factor of linear scaling."""
    theta = float(parameters.get("rope_theta", 10000.0))
    factor = float(parameters["factor"]) if parameters.get("rope_type") == "linear" else 1.0
    frequencies = theta ** (-torch.arange(0, width, 2, dtype=dtype) / width)
    return torch.arange(length, dtype=dtype)[:, None] / factor * frequencies


def causal_softmax(logits: Tensor) -> Tensor:
    """Softmax over the keys (..., L, L) up to each query's own."""
    hidden = torch.ones(logits.shape[-2:], dtype=torch.bool).triu(1)
    return logits.masked_fill(hidden, float("-inf")).softmax(dim=-1)


def spread(heads: Tensor, count: int) -> Tensor:
    """(B, G, ...) -> (B, count, ...): each key-value head for equally many neighbouring query heads."""
    return heads.repeat_interleave(count // heads.shape[1], dim=1)

"""How models compute, one layer's weights in memory at a time: of transformers, of this library, and plain ones.

Legend: B batch, L tokens, H heads, D width of a head.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

Read = Callable[[str], Tensor]


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

    def __init__(self, kind: Any, config: Any, dtype: torch.dtype) -> None:
        self.head = self.embedding if config.tie_word_embeddings else "lm_head.weight"
        ours = config.model_type == "clearhead"
        # This library computes in float64 of its own accord, and is not to be checked against itself in disguise.
        wide = dtype == torch.float64 and not ours
        self.mode: Callable[[], Any] = _Wide if wide else nullcontext
        with _default(dtype):
            with torch.device("meta"):
                model = kind._from_config(config, attn_implementation="sdpa", dtype=dtype)
            self.decoder = model.model.eval()
            # Angles are no weights: they are made anew outside of the meta device.
            with self.mode():
                if ours:
                    self.decoder.positions = nn.ModuleDict(config.make_positions()).to(dtype)
                else:
                    self.decoder.rotary_emb = type(self.decoder.rotary_emb)(config=config)

    def hidden(self, embedded: Tensor, read: Read) -> Tensor:
        """The decoder's last states, after its norm."""
        units = {f"model.layers.{index}": layer for index, layer in enumerate(self.decoder.layers)}
        units["model.norm"] = self.decoder.norm
        hooks = []
        for prefix, unit in units.items():

            def fill(module: nn.Module, inputs: Any, prefix: str = prefix) -> None:
                for name, _ in list(module.named_parameters()):
                    _place(module, name, read(f"{prefix}.{name}"))

            def drop(module: nn.Module, inputs: Any, output: Any) -> None:
                for name, held in list(module.named_parameters()):
                    _place(module, name, held.to("meta"))

            hooks += [unit.register_forward_pre_hook(fill), unit.register_forward_hook(drop)]
        try:
            with torch.no_grad(), self.mode():
                states: Tensor = self.decoder(inputs_embeds=embedded, use_cache=False).last_hidden_state
                return states
        finally:
            for hook in hooks:
                hook.remove()


def _place(module: nn.Module, name: str, value: Tensor) -> None:
    path, _, leaf = name.rpartition(".")
    module.get_submodule(path)._parameters[leaf] = nn.Parameter(value, requires_grad=False)


class PlainDecoder:
    """A LLaMA-like decoder around any attention, written with plain functions from a released file.

    attention: (layer, normed states (B, L, hidden_size), read) -> (B, L, hidden_size).
    """

    embedding = "model.embed_tokens.weight"

    def __init__(
        self, attention: Callable[[int, Tensor, Read], Tensor], layers: int, eps: float, tied: bool
    ) -> None:
        self.attention = attention
        self.layers = layers
        self.eps = eps
        self.head = self.embedding if tied else "lm_head.weight"

    def hidden(self, embedded: Tensor, read: Read) -> Tensor:
        """The decoder's last states, after its norm."""
        x = embedded
        for layer in range(self.layers):
            prefix = f"model.layers.{layer}"
            normed = rms_norm(x, read(f"{prefix}.input_layernorm.weight"), self.eps)
            x = x + self.attention(layer, normed, read)
            normed = rms_norm(x, read(f"{prefix}.post_attention_layernorm.weight"), self.eps)
            gated = F.silu(F.linear(normed, read(f"{prefix}.mlp.gate_proj.weight")))
            inner = gated * F.linear(normed, read(f"{prefix}.mlp.up_proj.weight"))
            x = x + F.linear(inner, read(f"{prefix}.mlp.down_proj.weight"))
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

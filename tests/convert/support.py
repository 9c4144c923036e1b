"""Tiny random checkpoints in other projects' formats, and what a conversion of them is compared with."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from clearhead.models import ClearheadConfig, ClearheadForCausalLM

SIZES: dict[str, Any] = {
    "vocab_size": 61,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 8,
    "head_dim": 4,
    "max_position_embeddings": 128,
    "rms_norm_eps": 1e-5,
    "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
}
IDS = torch.randint(0, 61, (2, 11), generator=torch.Generator().manual_seed(0))


def randomise(model: nn.Module) -> None:
    """Weights of some size everywhere, so that no term is hidden by its initial value."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(1 + 0.3 * noise if "norm" in name else 0.25 * noise)


def save(folder: Path, model: Any, **options: Any) -> Path:
    """A directory with the model, its weights randomised."""
    randomise(model)
    model.save_pretrained(folder, **options)
    return folder


def ours(folder: Path, dtype: torch.dtype = torch.float32, **settings: Any) -> Path:
    """A directory with a model of this library."""
    return save(folder, ClearheadForCausalLM(ClearheadConfig(**{**SIZES, **settings})).to(dtype))


def tensors(folder: Path) -> dict[str, Tensor]:
    """All weights in a directory."""
    return {name: value for file in folder.glob("*.safetensors") for name, value in load_file(file).items()}


def same_bits(first: Path, second: Path) -> bool:
    """Whether two directories hold the same tensors, bit for bit."""
    one, other = tensors(first), tensors(second)
    return one.keys() == other.keys() and all(
        one[name].dtype == other[name].dtype and torch.equal(one[name], other[name]) for name in one
    )


def state(folder: Path, weights: dict[str, Tensor], config: dict[str, Any] | None = None) -> Path:
    """A directory with a bare state dict, and a configuration if there is one."""
    folder.mkdir()
    save_file({name: value.contiguous() for name, value in weights.items()}, folder / "model.safetensors")
    if config is not None:
        (folder / "config.json").write_text(json.dumps(config))
    return folder


def nothing_left(out: Path) -> bool:
    """Whether a failed conversion left neither its output nor anything beside it."""
    return not out.exists() and not list(out.parent.glob(f".{out.name}*"))

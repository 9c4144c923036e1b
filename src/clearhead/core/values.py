"""Values of tensors: when they can be looked at, what must hold of them, and where they are."""

import copy
from collections.abc import Mapping
from dataclasses import fields, is_dataclass, replace
from typing import Any

import torch
from torch import Tensor


def readable(tensor: Tensor) -> bool:
    """Whether Python may look at its values: not while a graph is traced, not where there are none."""
    return not torch.compiler.is_compiling() and tensor.device.type != "meta"


def dtype_name(dtype: torch.dtype) -> str:
    """Its name without the "torch."."""
    return str(dtype).removeprefix("torch.")


def demand(holds: Tensor, message: str) -> None:
    """Raise ValueError(message) unless `holds`, one bool, is true.

    No device is waited for: outside the CPU, and in a traced graph, the assertion travels with the computation and
    fails there, as RuntimeError.
    """
    if holds.device.type == "cpu" and readable(holds):
        if not bool(holds):
            raise ValueError(message)
    else:
        torch._assert_async(holds, message)


def moved(value: Any, device: torch.device) -> Any:
    """`value` with every tensor in it on `device`: in dataclasses, tuples, lists, mappings and plain objects."""
    if isinstance(value, Tensor):
        return value.to(device)
    if isinstance(value, (tuple, list)) and not hasattr(value, "_fields"):
        return type(value)(moved(item, device) for item in value)
    if isinstance(value, Mapping):
        return {key: moved(item, device) for key, item in value.items()}
    if is_dataclass(value) and not isinstance(value, type):
        return replace(
            value, **{f.name: moved(getattr(value, f.name), device) for f in fields(value) if f.init}
        )
    if any(isinstance(item, Tensor) for item in getattr(value, "__dict__", {}).values()):
        twin = copy.copy(value)
        twin.__dict__.update({key: moved(item, device) for key, item in value.__dict__.items()})
        return twin
    return value

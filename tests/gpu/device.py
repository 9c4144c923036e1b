"""A stand-in for a GPU: tensors that say they are on "cuda", hold CPU numbers, and note when the host waits for them.

Whatever a program does with such tensors is really computed, so it goes the ways that it would go on a GPU: it looks at
a value, and the number decides. What would make the host wait for a GPU is noted with the line that asked for it:

    a number is looked at         .item(), bool(x), int(x), float(x), .tolist(), a tensor as an index of Python's
    a shape depends on values     nonzero, x[mask], masked_select, unique
    numbers are copied            to the CPU; from the CPU unless non_blocking, as torch.tensor(..., device="cuda") does

That is what `torch.cuda.set_sync_debug_mode` speaks of, and not what a kernel's launch itself may wait for.
"""

import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_flatten, tree_map, tree_unflatten

CUDA, CPU = torch.device("cuda", 0), torch.device("cpu")
_aten = torch.ops.aten
_LOOKS = {_aten._local_scalar_dense.default, _aten.is_nonzero.default, _aten.equal.default}
_SHAPES = {
    _aten.nonzero.default,
    _aten.masked_select.default,
    _aten._unique2.default,
    _aten.unique_consecutive.default,
    _aten.unique_dim.default,
}
_COPIES = {torch.Tensor.to, torch.Tensor.cpu, torch.Tensor.cuda}
_READS = {torch.Tensor.tolist, torch.Tensor.numpy}
waits: list[str] = []
"""What made the host wait since `waiting` began."""


def note(what: str) -> None:
    parts = ("/clearhead/", "/tests/", "/transformers/")
    here = [f for f in traceback.extract_stack() if any(part in f.filename for part in parts)]
    place = next((f for f in reversed(here) if not f.filename.endswith("gpu/device.py")), None)
    waits.append(what if place is None else f"{what} at {place.filename.rpartition('/')[2]}:{place.lineno}")


class OnCuda(Tensor):
    """A CPU tensor that says it is on "cuda:0"."""

    numbers: Tensor

    @staticmethod
    def __new__(cls, numbers: Tensor) -> "OnCuda":
        made = torch.Tensor._make_wrapper_subclass(
            cls,
            numbers.shape,
            strides=numbers.stride(),
            storage_offset=numbers.storage_offset(),
            dtype=numbers.dtype,
            requires_grad=numbers.requires_grad,
        )
        made.numbers = numbers.detach()
        return made

    @property
    def device(self) -> torch.device:  # type: ignore[override]
        return CUDA

    @property
    def is_cuda(self) -> bool:  # type: ignore[override]
        return True

    @property
    def is_cpu(self) -> bool:  # type: ignore[override]
        return False

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:  # type: ignore[override]
        if id(self) not in memo:
            copied = OnCuda(self.numbers.clone())
            is_parameter = isinstance(self, nn.Parameter)
            memo[id(self)] = nn.Parameter(copied, self.requires_grad) if is_parameter else copied
        return memo[id(self)]

    def __repr__(self) -> str:  # type: ignore[override]
        return f"OnCuda({self.numbers})"

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if kwargs.get("device") is not None:
            # From PyTorch itself, to which every number is on the CPU: what programs ask for is seen in `_Factories`.
            kwargs["device"] = CPU
        flat, spec = tree_flatten((args, kwargs))
        if func in _LOOKS or func in _SHAPES or (func is _aten.index.Tensor and _has_mask(args[1])):
            note(f"{func}")
        elif func is _aten.index.Tensor and not all(i is None or isinstance(i, OnCuda) for i in args[1]):
            note("an index that is on the CPU")
        bare_args, bare_kwargs = tree_unflatten([bare(x) for x in flat], spec)
        found = func(*bare_args, **bare_kwargs)
        if func is _aten.copy_.default and isinstance(args[0], OnCuda) != isinstance(args[1], OnCuda):
            note("a copy between CPU and GPU")
        return _again(func, args, kwargs, found)


def _has_mask(indices: Any) -> bool:
    return any(isinstance(i, Tensor) and i.dtype in (torch.bool, torch.uint8) for i in indices)


def _again(func: Any, args: Any, kwargs: Any, found: Any) -> Any:
    """The results on the device; what an operator gives back of its own arguments stays that object."""
    known = {id(x.numbers): x for x in tree_flatten((args, kwargs))[0] if isinstance(x, OnCuda)}
    return tree_map(lambda x: known.get(id(x), OnCuda(x)) if isinstance(x, Tensor) else x, found)


def bare(x: Any) -> Any:
    return x.numbers if isinstance(x, OnCuda) else x


def on_cuda(x: Tensor) -> Tensor:
    """The same numbers on the stand-in."""
    return x if isinstance(x, OnCuda) else OnCuda(x.detach()).requires_grad_(x.requires_grad)


def moved_to_cuda(module: nn.Module) -> nn.Module:
    """`module` with its parameters and buffers on the stand-in, in place."""
    for part in module.modules():
        for name, parameter in part._parameters.items():
            if parameter is not None:
                moved = nn.Parameter(OnCuda(parameter.detach()), requires_grad=parameter.requires_grad)
                part._parameters[name] = moved
        for name, buffer in part._buffers.items():
            if buffer is not None:
                part._buffers[name] = on_cuda(buffer)
    return module


def _check_devices(func: Any, args: Any, kwargs: Any) -> None:
    """Only single numbers, and indices, may come from the CPU. Inside an operator PyTorch makes what it likes there."""
    if getattr(func, "__name__", "") in (
        "copy_",
        "__getitem__",
        "__setitem__",
        "__get__",
        "__set__",
        "__deepcopy__",
        "_has_compatible_shallow_copy_type",
    ):
        return
    tensors = [x for x in tree_flatten((args, kwargs))[0] if isinstance(x, Tensor) and x.ndim > 0]
    if any(torch._C._functorch.is_functorch_wrapped_tensor(x) for x in tensors):
        return
    if len({isinstance(x, OnCuda) for x in tensors}) > 1:
        raise RuntimeError(f"{func}: expected all tensors to be on the same device, found cuda:0 and cpu")


class _Factories(TorchFunctionMode):
    """Makes what is asked for on "cuda" there, and sees copies between the devices, which PyTorch's own code would not:
    to it every number is on the CPU."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if func in _COPIES:
            return self._copied(func, args, kwargs)
        if func in _READS and isinstance(args[0], OnCuda):
            note(func.__name__)
            return func(args[0].numbers, *args[1:], **kwargs)
        _check_devices(func, args, kwargs)
        device = kwargs.get("device")
        if device is not None and torch.device(device).type == "cuda":
            name = getattr(func, "__name__", "")
            if name in ("tensor", "as_tensor", "asarray"):
                if isinstance(args[0], OnCuda):
                    return args[0]
                if torch.as_tensor(args[0]).numel():
                    note(f"torch.{name}(..., device='cuda')")
            return tree_map(
                lambda x: OnCuda(x) if isinstance(x, Tensor) and not isinstance(x, OnCuda) else x,
                func(*args, **{**kwargs, "device": CPU}),
            )
        return func(*args, **kwargs)

    def _copied(self, func: Any, args: Any, kwargs: Any) -> Any:
        x, *rest = args
        target = {torch.Tensor.cpu: CPU, torch.Tensor.cuda: CUDA}.get(func)
        waits_not = kwargs.pop("non_blocking", False)
        dtype = None
        if func is torch.Tensor.to:
            for given in (*rest, kwargs.get("device"), kwargs.get("dtype")):
                if isinstance(given, torch.dtype):
                    dtype = given
                elif isinstance(given, Tensor):
                    target, dtype = given.device, given.dtype
                elif given is not None and not isinstance(given, bool):
                    target = torch.device(given)
        there = x if dtype is None or x.dtype == dtype else torch.Tensor.to(x, dtype)
        if target is None or target.type == x.device.type:
            return there
        if target.type == "cpu":
            note("a copy to the CPU")
            return bare(there)
        if target.type != "cuda":
            raise RuntimeError(f"the stand-in has no device {target}")
        if not waits_not and there.numel():
            note("a copy from the CPU")
        return on_cuda(there)


@contextmanager
def gpu() -> Iterator[None]:
    """In here "cuda" is a device."""
    with _Factories():
        yield


@contextmanager
def waiting() -> Iterator[list[str]]:
    """What makes the host wait, as it is noted."""
    waits.clear()
    yield waits

"""The compiled CPU kernel, loaded with ctypes.

Nothing is compiled here: the library comes with the installation (`hatch_build.py`), or `missing` says why it did not.
`CTensor` and `CProblem` mirror `src/problem.h`, where every field is explained.
"""

import ctypes
import json
import sys
from ctypes import POINTER, Structure, c_char_p, c_float, c_int32, c_int64, c_void_p
from pathlib import Path

ABI = 4
FOLDER = Path(__file__).parent
FILE = "libclearhead_cpu.dylib" if sys.platform == "darwin" else "libclearhead_cpu.so"
FAILURES = {
    1: "the problem makes no sense to it",
    2: "there is not enough memory",
    3: "it was not given PyTorch's threads",
}


class CTensor(Structure):
    """`clearhead_tensor`: strides in elements over (batch, heads, tokens); the width is contiguous."""

    _fields_ = (
        ("data", c_void_p),
        ("batch", c_int64),
        ("head", c_int64),
        ("token", c_int64),
    )


class CCodes(Structure):
    """`clearhead_codes`: rows of codes, their scales and zeros."""

    _fields_ = (("codes", CTensor), ("scale", CTensor), ("zero", CTensor))


class CProblem(Structure):
    """`clearhead_problem`: one attention, forward or backward. Fields that are not set are zero and null."""

    _fields_ = (
        ("dtype", c_int32),
        ("streams", c_int32),
        ("key_streams", c_int32),
        ("causal", c_int32),
        ("threads", c_int32),
        ("scale", c_float),
        ("batch", c_int64),
        ("heads", c_int64),
        ("groups", c_int64),
        ("queries", c_int64),
        ("keys", c_int64),
        ("key_width", c_int64),
        ("value_width", c_int64),
        ("offset", c_int64),
        ("window", c_int64),
        ("padding", c_void_p),
        ("padding_batch", c_int64),
        ("documents", c_void_p),
        ("documents_batch", c_int64),
        ("q", CTensor * 2),
        ("k", CTensor * 2),
        ("v", CTensor),
        ("table", CTensor),
        ("gate", CTensor),
        ("out", CTensor),
        ("noise", CTensor),
        ("statistics", c_void_p),
        ("grad_out", CTensor),
        ("grad_q", CTensor * 2),
        ("grad_k", CTensor * 2),
        ("grad_v", CTensor),
        ("grad_gate", c_void_p),
        ("bits", c_int64),
        ("held", c_int64),
        ("k_codes", CCodes * 2),
        ("v_codes", CCodes),
        ("left_out", c_float),
        ("estimate", c_int32),
        ("blocks", c_void_p),
    )


class Library:
    """The loaded kernel."""

    def __init__(self, handle: ctypes.CDLL) -> None:
        self._handle = handle
        for name, arguments, result in (
            ("clearhead_init", [c_void_p], None),
            ("clearhead_isa", [], c_char_p),
            ("clearhead_set_isa", [c_char_p], c_int32),
            ("clearhead_forward", [POINTER(CProblem)], c_int32),
            ("clearhead_backward", [POINTER(CProblem)], c_int32),
        ):
            function = getattr(handle, name)
            function.argtypes, function.restype = arguments, result
        # Kept here: `torch.compile` traces the choice of a backend, and cannot follow a call into C.
        self._isa = str(handle.clearhead_isa().decode())

    def isa(self) -> str:
        """The instruction set in use: the best one that was built and that this processor has."""
        return self._isa

    def set_isa(self, name: str) -> None:
        """Use the instruction set `name` from now on; ValueError if it was not built or the processor lacks it."""
        if self._handle.clearhead_set_isa(name.encode()):
            raise ValueError(f"the CPU kernel has no instruction set {name!r} on this processor")
        self._isa = name

    def forward(self, problem: CProblem) -> None:
        """Write `problem.out`, and `noise` and `statistics` where they are wanted. Raises RuntimeError."""
        self._check(self._handle.clearhead_forward(ctypes.byref(problem)))

    def backward(self, problem: CProblem) -> None:
        """Write the gradients of `problem` from what the forward pass left in it. Raises RuntimeError."""
        self._check(self._handle.clearhead_backward(ctypes.byref(problem)))

    def _check(self, code: int) -> None:
        if code:
            raise RuntimeError(f"the CPU kernel failed: {FAILURES.get(code, f'error {code}')}")


# The library or the reason, once looked for. Not functools.cache: `torch.compile` looks inside it.
_found: list[Library | str] = []


def load() -> Library:
    """The kernel; RuntimeError with the reason where there is none."""
    found = _find()
    if isinstance(found, str):
        raise RuntimeError(f"the CPU kernel cannot be used: {found}")
    return found


def missing() -> str | None:
    """Why the kernel cannot be used, or None."""
    found = _find()
    return found if isinstance(found, str) else None


def _find() -> Library | str:
    if not _found:
        _found.append(_open(FOLDER))
    return _found[0]


def _open(folder: Path) -> Library | str:
    try:
        note = json.loads((folder / "build.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return "it was not built with this installation; install again, or run hatch_build.py in a checkout"
    if not note["built"]:
        return f"it was not built: {note['reason']}"
    try:
        handle = ctypes.CDLL(str(folder / FILE))
        abi = handle.clearhead_abi()
    except (OSError, AttributeError) as error:
        return f"its library cannot be loaded: {error}"
    if abi != ABI:
        return f"its library has interface {abi}, this version needs {ABI}; build it again"
    import torch

    try:
        # Found through PyTorch's extension module, which leads to its libraries wherever they are.
        parallel_for = ctypes.CDLL(torch._C.__file__).torch_parallel_for
    except (OSError, AttributeError):
        return f"PyTorch {torch.__version__} has no torch_parallel_for, which came with 2.10"
    library = Library(handle)
    handle.clearhead_init(ctypes.cast(parallel_for, c_void_p))
    return library

"""The Triton kernels run in Triton's interpreter, on CPU tensors."""

from collections.abc import Iterator

import pytest

from clearhead.kernels.triton.kernel import interpreted


@pytest.fixture(autouse=True)
def kernel() -> Iterator[None]:
    """In place of the CPU kernel's fixture of this name."""
    pytest.importorskip("triton", reason="Triton is not installed")
    if not interpreted():
        pytest.skip("TRITON_INTERPRET is not 1: the kernels would not run on CPU tensors")
    yield

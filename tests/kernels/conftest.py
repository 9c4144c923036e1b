"""Every instruction set of this processor, and PyTorch's threads as they were."""

from collections.abc import Iterator

import pytest
import torch

from clearhead.kernels.cpu import library


@pytest.fixture(autouse=True)
def kernel() -> Iterator[None]:
    """The kernel is there, and afterwards uses the instruction set and threads that it used before."""
    reason = library.missing()
    if reason is not None:
        pytest.skip(reason)
    best, threads = library.load().isa(), torch.get_num_threads()
    yield
    library.load().set_isa(best)
    torch.set_num_threads(threads)


@pytest.fixture
def isa(kernel: None, request: pytest.FixtureRequest) -> str:
    """The instruction set in use; see `every_set`."""
    library.load().set_isa(request.param)
    return str(request.param)

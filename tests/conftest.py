"""`--isa NAME`: every test runs on that instruction set of the CPU kernel, as on a processor that has no better one."""

import os
from pathlib import Path

import pytest

# Compiled FlexAttention comes back from Inductor's cache by name, also what another checkout or an imitated processor
# left there (seen: zeros and NaN). A checkout has its own, one for each processor that is imitated.
_CAPABILITY = os.environ.get("ATEN_CPU_CAPABILITY", "own")
_CACHE = Path(__file__).resolve().parents[1] / ".pytest_cache" / f"inductor-{_CAPABILITY}"
os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(_CACHE))

# Triton reads it when it is imported. TRITON_INTERPRET=0 in the environment leaves its kernels to a GPU.
os.environ.setdefault("TRITON_INTERPRET", "1")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--isa",
        metavar="NAME",
        help="instruction set of the CPU kernel to test on: portable, avx2, avx512, avx512_bf16 (default: the best)",
    )


def pytest_configure(config: pytest.Config) -> None:
    name = config.getoption("--isa")
    if name is not None:
        from clearhead.kernels.cpu import library

        try:
            library.load().set_isa(name)
        except ValueError as error:
            # A processor that has no such set has nothing to imitate: its own run was the test.
            pytest.exit(f"--isa: {error}", returncode=0)

"""`--isa NAME`: every test runs on that instruction set of the CPU kernel, as on a processor that has no better one."""

import pytest


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

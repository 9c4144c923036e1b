"""The table of launch configurations: complete, in its own order, and what is looked up in it."""

import itertools
from importlib.resources import files

import pytest

from clearhead.kernels.triton import configs
from clearhead.kernels.triton.configs import ARCHITECTURES, DIRECTIONS, Key


def test_every_problem_has_a_row() -> None:
    for architecture, direction, bits, streams in itertools.product(
        ARCHITECTURES, DIRECTIONS, (16, 32), (1, 2)
    ):
        for width, value_width in itertools.product((16, 32, 64, 128, 256), (16, 32, 64, 128, 256, 512)):
            config = configs.choose(Key(architecture, direction, bits, width, value_width, streams))
            assert config.block_m >= 16 and config.block_n >= 16 and config.warps in (4, 8)
            assert direction != "decode" or config.block_m == 16


def test_the_file_is_what_the_script_writes() -> None:
    text = files("clearhead.kernels.triton").joinpath("configs.json").read_text()
    assert configs.write(configs.read(text)) == text


@pytest.mark.parametrize(("width", "tile"), [(1, 16), (16, 16), (17, 32), (96, 128), (192, 256), (256, 256)])
def test_widths_of_tiles(width: int, tile: int) -> None:
    assert configs.padded(width) == tile


def test_a_gpu_takes_the_row_of_its_own_or_the_next_older_architecture(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    import torch

    for capability, name in (
        ((8, 0), "sm_80"),
        ((8, 9), "sm_80"),
        ((9, 0), "sm_90"),
        ((10, 0), "sm_100"),
        ((12, 0), "sm_100"),
    ):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_, found=capability: found)
        assert configs.architecture(torch.device("cuda")) == name

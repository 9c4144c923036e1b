"""timm's `DiffAttention` beside ours with the same weights, and the numbers that the golden test keeps of it.

    python -m pytest -o python_files=vision.py tests/peers/vision.py     (timm is in tests/peers/vision.txt)
    python -m tests.peers.vision     writes tests/golden/timm_diff_attention.safetensors

timm needs torchvision, of which its attention needs nothing: the layer's files alone are loaded.
"""

import importlib
import importlib.util
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from tests.golden.test_timm import CASES, FILE, KEYS, inputs, ours

DIFF = "timm.layers.diff_attention"


def diff_attention() -> Any:
    """The class `timm.layers.DiffAttention`, without what `import timm` would load."""
    if DIFF in sys.modules:
        return sys.modules[DIFF].DiffAttention  # type: ignore[attr-defined]
    found = importlib.util.find_spec("timm")
    if found is None or found.origin is None:
        import pytest

        pytest.skip("timm is not installed: make test-peers brings it")
    root = Path(found.origin).parent
    for name, folder in (("timm", root), ("timm.layers", root / "layers")):
        package = ModuleType(name)
        package.__path__ = [str(folder)]
        sys.modules[name] = package
    return importlib.import_module(DIFF).DiffAttention


def theirs(case: str) -> Any:
    """timm's layer of a case, with weights of some size everywhere."""
    settings = CASES[case]
    torch.manual_seed(1)
    layer = diff_attention()(
        settings["dim"], settings["heads"], depth=settings["depth"], dual_lambda=settings["dual"],
        qkv_bias=settings["bias"], proj_bias=settings["bias"],
    )  # fmt: skip
    with torch.no_grad():
        for name, weight in layer.named_parameters():
            weight.copy_(torch.randn_like(weight) * (0.5 if "lambda" in name else 0.2) + ("norm" in name))
    return layer.eval()


def measured(case: str) -> dict[str, Tensor]:
    """Weights, input, output, causal output and the gradient of the input of timm's layer, in float64."""
    layer = theirs(case).double()
    x = inputs(case).double().requires_grad_()
    out = layer(x)
    (gradient,) = torch.autograd.grad(out.square().sum(), x)
    found = {name: weight for name, weight in layer.state_dict().items() if name in KEYS}
    found |= {"output": out, "causal": layer(x, is_causal=True), "gradient": gradient}
    return {f"{case}.{name}": value.detach().clone() for name, value in found.items()}


def test_ours_with_timm_s_weights_is_timm_s() -> None:
    for case in CASES:
        layer, x = theirs(case), inputs(case)
        weights = {name: weight for name, weight in layer.state_dict().items() if name in KEYS}
        mine = ours(case, weights)
        with torch.no_grad():
            assert float((mine(x) - layer(x)).abs().max()) < 1e-6
            assert float((mine(x, is_causal=True) - layer(x, is_causal=True)).abs().max()) < 1e-6


def test_the_numbers_that_are_kept_are_timm_s() -> None:
    from safetensors.torch import load_file

    kept = load_file(FILE)
    for case in CASES:
        for name, value in measured(case).items():
            if name.endswith(("output", "causal", "gradient")):
                torch.testing.assert_close(kept[name], value, rtol=1e-12, atol=1e-12)


if __name__ == "__main__":
    from safetensors.torch import save_file

    save_file({name: value for case in CASES for name, value in measured(case).items()}, FILE)

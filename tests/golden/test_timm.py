"""Differential attention V1 as timm's vision Transformers have it (`timm.layers.DiffAttention`, 1.0.31): same weights.

Its numbers are kept in a file, which `tests/peers/vision.py` makes and compares with an installed timm. What is not the
same: timm's λ of `dual_lambda` is exp(a) − exp(b) + λ_init with two numbers in place of four vectors. That is
equation 2 for vectors with λ_q1 · λ_k1 = a and λ_q2 · λ_k2 = b, so its trained values have a place here; training
moves them otherwise. Its norms of queries and keys (`qk_norm`) and before the last matrix (`scale_norm`) have none.
"""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from clearhead.nn import Attention

FILE = Path(__file__).parent / "timm_diff_attention.safetensors"
# The names of the weights, in timm.
KEYS = (
    "qkv.weight", "qkv.bias", "proj.weight", "proj.bias", "sub_norm.weight",
    "lambda_a", "lambda_b", "lambda_q1", "lambda_k1", "lambda_q2", "lambda_k2",
)  # fmt: skip
CASES: dict[str, dict[str, Any]] = {
    "vectors": {"dim": 32, "heads": 4, "depth": 0, "dual": False, "bias": True, "length": 9},
    "dual_lambda": {"dim": 32, "heads": 4, "depth": 3, "dual": True, "bias": True, "length": 9},
    "one head": {"dim": 16, "heads": 1, "depth": 11, "dual": True, "bias": False, "length": 5},
}


def inputs(case: str) -> Tensor:
    """(2, length, dim): numbers that need no generator."""
    settings = CASES[case]
    count = 2 * settings["length"] * settings["dim"]
    return torch.sin(torch.arange(count) * 0.7).view(2, settings["length"], settings["dim"])


def ours(case: str, weights: dict[str, Tensor]) -> Attention:
    """Our layer with timm's weights. timm's head h has streams 2h and 2h + 1, as here, so that no row moves."""
    settings = CASES[case]
    # `num_heads` counts the Transformer's heads, timm's the differential ones.
    layer = Attention(
        settings["dim"], 2 * settings["heads"], variant="differential", layer_idx=settings["depth"],
        position="nope", bias=settings["bias"],
    )  # fmt: skip
    state = dict(layer.state_dict())
    for part in ("weight", "bias") if settings["bias"] else ("weight",):
        for name, rows in zip("qkv", weights[f"qkv.{part}"].chunk(3), strict=True):
            state[f"{name}_proj.{part}"] = rows
        state[f"o_proj.{part}"] = weights[f"proj.{part}"]
    state["variant.head_norm.weight"] = weights["sub_norm.weight"]
    for stream, exponent in (("1", "lambda_a"), ("2", "lambda_b")):
        q, k = f"lambda_q{stream}", f"lambda_k{stream}"
        if settings["dual"]:
            unit = torch.zeros_like(state[f"variant.{q}"])
            unit[0] = 1.0
            state[f"variant.{q}"], state[f"variant.{k}"] = weights[exponent] * unit, unit
        else:
            state[f"variant.{q}"], state[f"variant.{k}"] = weights[q], weights[k]
    layer.load_state_dict(state)
    return layer.to(weights["proj.weight"].dtype)


def kept(case: str) -> dict[str, Tensor]:
    return {
        name.removeprefix(f"{case}."): value
        for name, value in load_file(FILE).items()
        if name.startswith(f"{case}.")
    }


@pytest.mark.parametrize("case", CASES)
def test_outputs_and_gradients_are_timm_s(case: str) -> None:
    found = kept(case)
    layer = ours(case, found).double()
    x = inputs(case).double().requires_grad_()
    out = layer(x)
    # timm takes the exponentials of its vectors in float32, whatever the dtype.
    bound = 1e-12 if CASES[case]["dual"] else 1e-6
    assert float((out - found["output"]).abs().max()) < bound
    assert float((layer(x, is_causal=True) - found["causal"]).abs().max()) < bound
    (gradient,) = torch.autograd.grad(out.square().sum(), x)
    assert float((gradient - found["gradient"]).abs().max()) < 10 * bound


@pytest.mark.parametrize("case", CASES)
def test_in_float32_they_agree_to_rounding(case: str) -> None:
    found = kept(case)
    layer = ours(case, {name: value.float() for name, value in found.items()})
    with torch.no_grad():
        assert float((layer(inputs(case)) - found["output"]).abs().max()) < 1e-6


@pytest.mark.parametrize("name", ["lambda_a", "qkv.weight", "sub_norm.weight", "qkv.bias"])
def test_every_weight_has_its_part(name: str) -> None:
    found = kept("dual_lambda")
    found[name] = found[name] + 0.01
    with torch.no_grad():
        moved = ours("dual_lambda", found).double()(inputs("dual_lambda").double())
    assert float((moved - found["output"]).abs().max()) > 1e-5

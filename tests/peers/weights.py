"""Weights in eight and four bits by torchao, with the CPU kernel and quantised caches. Part of `make test-peers`.

Runs wherever torchao is: `pip install --no-deps --target DIR torchao==0.18.0`, then `PYTHONPATH=DIR pytest
tests/peers/weights.py`.
"""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import TorchAoConfig

from clearhead.models import ClearheadForCausalLM, QuantisedCache
from tests.contracts.model_cases import make_model, tokens
from tests.contracts.support import distance

pytest.importorskip("torchao", reason="torchao is not installed; make test-peers brings it")

NAMES = ("softmax", "differential", "differential_v2", "collinear")
every_model = pytest.mark.parametrize("name", NAMES)
PROMPT = 200  # one block of 128 becomes codes


def configuration(bits: int) -> Any:
    if bits == 8:
        from torchao.quantization import Int8WeightOnlyConfig

        return Int8WeightOnlyConfig()
    from torchao.prototype.quantization.int4.inference_workflow import PrototypeInt4WeightOnlyConfig

    return PrototypeInt4WeightOnlyConfig(group_size=32, set_inductor_config=False)


def takes(bits: int, module: nn.Module) -> bool:
    """What torchao's product on CPUs takes: with four bits rows by sixteen and columns by groups."""
    if not isinstance(module, nn.Linear):
        return False
    return bits == 8 or (module.out_features % 16 == 0 and module.in_features % 32 == 0)


def quantised(model: ClearheadForCausalLM, bits: int) -> ClearheadForCausalLM:
    from torchao.quantization import quantize_

    found = copy.deepcopy(model)
    quantize_(found, configuration(bits), filter_fn=lambda module, name: takes(bits, module))
    return found


def numbers(module: nn.Linear) -> Tensor:
    """What a quantised layer multiplies with: its product with the identity."""
    return module(torch.eye(module.in_features)).T.contiguous()


def rounded(model: ClearheadForCausalLM, like: ClearheadForCausalLM) -> ClearheadForCausalLM:
    """`model` with the numbers that the weights of `like` stand for."""
    found = copy.deepcopy(model)
    for own, other in zip(found.modules(), like.modules(), strict=True):
        if isinstance(own, nn.Linear) and type(other.weight) is not nn.Parameter:
            own.weight = nn.Parameter(numbers(other))  # type: ignore[arg-type]
    return found


def whole_prompt(model: ClearheadForCausalLM, cache: Any, ids: Tensor) -> Tensor:
    """Logits of the last tokens, read one by one behind the others."""
    model(ids[:, :-3], past_key_values=cache)
    found = [model(ids[:, i : i + 1], past_key_values=cache).logits for i in range(-3, -1)]
    return torch.cat([*found, model(ids[:, -1:], past_key_values=cache).logits], 1)


@every_model
@pytest.mark.parametrize("bits", [8, 4])
@torch.no_grad()
def test_with_the_kernel_and_a_cache_of_codes(name: str, bits: int) -> None:
    """Logits are those of the weights that the codes stand for, behind the same codes of keys and values."""
    model = make_model(name, hidden_size=128, max_position_embeddings=256)
    few = quantised(model, bits)
    kinds = {type(module.weight).__name__ for module in few.modules() if isinstance(module, nn.Linear)}
    assert ("Int8Tensor" if bits == 8 else "Int4OpaqueTensor") in kinds
    same, ids = rounded(model, few), tokens(2, PROMPT)
    for found in (few, same, model):
        found.set_attn_implementation("cpu")
    expected = whole_prompt(same, QuantisedCache(same.config), ids)
    cost = distance(expected, whole_prompt(model, QuantisedCache(model.config), ids))
    # The products' rounding may move a key from one code to the next.
    assert distance(whole_prompt(few, QuantisedCache(few.config), ids), expected) < 0.01 * cost
    assert cost > 1e-3
    options: dict[str, Any] = {"max_new_tokens": 4, "do_sample": False}
    written = few.generate(ids, past_key_values=QuantisedCache(few.config), **options)
    assert torch.equal(written, same.generate(ids, past_key_values=QuantisedCache(same.config), **options))


@every_model
@torch.no_grad()
def test_eight_bits_are_saved_and_loaded(name: str, tmp_path: Path) -> None:
    make_model(name).save_pretrained(tmp_path / "plain")
    few = ClearheadForCausalLM.from_pretrained(
        tmp_path / "plain", quantization_config=TorchAoConfig(configuration(8)), dtype=torch.float32
    ).eval()
    few.save_pretrained(tmp_path / "few")
    again, ids = ClearheadForCausalLM.from_pretrained(tmp_path / "few").eval(), tokens(2, 9)
    assert type(again.model.layers[0].self_attn.q_proj.weight).__name__ == "Int8Tensor"
    assert torch.equal(again(ids).logits, few(ids).logits)
    sizes = [(tmp_path / folder / "model.safetensors").stat().st_size for folder in ("plain", "few")]
    assert sizes[1] < sizes[0]


@torch.no_grad()
def test_four_bits_are_made_when_a_model_is_loaded(tmp_path: Path) -> None:
    """torchao has no file for them: the plain checkpoint is what is kept."""
    model = make_model("differential", hidden_size=128)
    model.save_pretrained(tmp_path / "plain")
    few = ClearheadForCausalLM.from_pretrained(
        tmp_path / "plain", quantization_config=TorchAoConfig(configuration(4)), dtype=torch.float32
    ).eval()
    expected = copy.deepcopy(model)
    from torchao.quantization import quantize_

    # transformers leaves the head as it is.
    quantize_(expected.model, configuration(4))
    ids = tokens(2, 9)
    assert distance(few(ids).logits, expected(ids).logits) < 1e-6
    with pytest.raises(ValueError, match="Unsupported tensor type"):
        few.save_pretrained(tmp_path / "few")

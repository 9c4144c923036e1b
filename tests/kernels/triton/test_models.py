"""Whole models on the Triton kernels: `attn_implementation="triton"` gives what eager attention gives."""

from typing import Any

import pytest
import torch
from torch import Tensor

from clearhead.models import ClearheadForCausalLM
from tests.contracts.model_cases import VARIANTS, left_padded, make_model, tokens
from tests.contracts.support import distance


def on(name: str, implementation: str, **changes: Any) -> ClearheadForCausalLM:
    model = make_model(name, initializer_range=0.1, num_hidden_layers=1, **changes)
    model.set_attn_implementation(implementation)
    return model


def results(model: ClearheadForCausalLM, ids: Tensor, **inputs: Any) -> list[Tensor]:
    out = model(input_ids=ids, labels=ids, **inputs)
    return [out.logits, *torch.autograd.grad(out.loss, list(model.parameters()))]


@pytest.mark.parametrize("name", VARIANTS)
def test_logits_and_gradients(name: str) -> None:
    ids = tokens(1, 18)
    found, expected = (results(on(name, way).train(), ids) for way in ("triton", "eager"))
    assert max(distance(a, b) for a, b in zip(found, expected, strict=True)) < 1e-5


@pytest.mark.parametrize("name", ["differential", "differential_v2"])
def test_packed_documents(name: str) -> None:
    ids, positions = tokens(1, 20), torch.cat((torch.arange(13), torch.arange(7)))[None]
    found, expected = (
        results(on(name, way).train(), ids, position_ids=positions) for way in ("triton", "eager")
    )
    assert max(distance(a, b) for a, b in zip(found, expected, strict=True)) < 1e-5


def test_alibi() -> None:
    ids = tokens(1, 18)
    found, expected = (
        results(on("differential", way, position="alibi").train(), ids) for way in ("triton", "eager")
    )
    assert max(distance(a, b) for a, b in zip(found, expected, strict=True)) < 1e-5


@pytest.mark.parametrize("cache", ["dynamic", "static"])
@torch.no_grad()
def test_generation(cache: str) -> None:
    ids, mask = left_padded([tokens(1, length, seed=length)[0] for length in (3, 19)])
    options: dict[str, Any] = {"max_new_tokens": 3, "do_sample": False, "cache_implementation": cache}
    options |= {"attention_mask": mask, "return_dict_in_generate": True, "output_logits": True}
    found, expected = (on("differential", way).generate(ids, **options) for way in ("triton", "eager"))
    assert torch.equal(found.sequences, expected.sequences)
    assert max(distance(a, b) for a, b in zip(found.logits, expected.logits, strict=True)) < 1e-4


def test_a_model_compiles_as_one_graph() -> None:
    torch._dynamo.reset()
    ids = tokens(2, 7)
    model = on("differential", "triton").train()
    expected = results(on("differential", "eager").train(), ids)
    found = [
        (out := torch.compile(model, fullgraph=True, backend="aot_eager")(input_ids=ids, labels=ids)).logits,
        *torch.autograd.grad(out.loss, list(model.parameters())),
    ]
    assert max(distance(a, b) for a, b in zip(found, expected, strict=True)) < 1e-5

"""The fused kernel in models of Hugging Face: what SDPA says, with caches, padding, windows and biases."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import DynamicCache, MistralConfig, MistralForCausalLM, StaticCache

from clearhead.integrations import hf_attention as fused
from clearhead.kernels.cpu import library
from tests.evals import tiny

pytestmark = pytest.mark.skipif(library.missing() is not None, reason="the CPU kernel is not built")
IDS = torch.randint(3, 320, (2, 48), generator=torch.Generator().manual_seed(0))


def mistral() -> Any:
    torch.manual_seed(0)
    sizes = {**tiny.SIZES, "num_key_value_heads": 2, "initializer_range": 0.2, "sliding_window": 16}
    return MistralForCausalLM(MistralConfig(vocab_size=320, **sizes)).eval()


def static(model: Any) -> StaticCache:
    return StaticCache(config=model.config, max_cache_len=64)


def behind(model: Any, cache: Any) -> torch.Tensor:
    """Logits of a prompt read in two parts and a token after it."""
    first = model(IDS[:, :20], past_key_values=cache, use_cache=True)
    second = model(IDS[:, 20:47], past_key_values=first.past_key_values, use_cache=True)
    last = model(IDS[:, 47:], past_key_values=second.past_key_values, use_cache=True)
    return torch.cat((first.logits, second.logits, last.logits), 1)


def padded(model: Any) -> torch.Tensor:
    mask = torch.ones_like(IDS)
    mask[0, :7] = 0
    return model(IDS, attention_mask=mask).logits[mask.bool()]


CASES = {
    "whole": lambda model: model(IDS).logits,
    "behind a cache": lambda model: behind(model, DynamicCache(config=model.config)),
    "behind a static cache": lambda model: behind(model, static(model)),
    "padded": padded,
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("make", [tiny.llama, mistral])
def test_the_numbers_are_those_of_sdpa(make: Any, case: str) -> None:
    model = make()
    with torch.inference_mode():
        theirs = CASES[case](model)
        assert fused.use_fused(model) and model.config._attn_implementation == fused.NAME
        ours = CASES[case](model)
        # Twice what SDPA itself is off, and the rounding of logits of this size.
        exact = CASES[case](make().double())
        bound = 2 * (theirs - exact).abs().max() + 4 * torch.finfo(torch.float32).eps * exact.abs().max()
        assert (ours - exact).abs().max() <= bound


def test_plain_attention_runs_on_the_kernel_and_only_that(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[bool] = []
    sdpa = fused.sdpa_attention_forward
    monkeypatch.setattr(
        fused, "sdpa_attention_forward", lambda *a, **k: (seen.append(True), sdpa(*a, **k))[1]
    )
    model = tiny.llama()
    assert fused.use_fused(model)
    with torch.inference_mode():
        behind(model, DynamicCache(config=model.config))
        assert not seen
        padded(model)
    assert len(seen) == model.config.num_hidden_layers


def test_a_model_that_does_not_run_on_sdpa_is_left_alone() -> None:
    model = tiny.llama()
    model.set_attn_implementation("eager")
    assert not fused.use_fused(model) and model.config._attn_implementation == "eager"

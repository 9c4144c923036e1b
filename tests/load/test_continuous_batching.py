"""Hugging Face's continuous batching, on a CPU: twenty requests of mixed length, and the tokens of `generate`."""

from typing import Any

import pytest
import torch
from transformers import ContinuousBatchingConfig, GenerationConfig

from clearhead.models import ClearheadForCausalLM
from clearhead.models.serving import for_servers
from tests.contracts.model_cases import make_model
from tests.load.test_serving import generated, prompts

NEW = 6
# Pages and steps so small that requests wait, come in pieces and lie in pages of others.
SMALL = {"page_size": 4, "num_blocks": 96, "max_batch_tokens": 32}


def batched(model: ClearheadForCausalLM, asked: list[list[int]]) -> list[list[int]]:
    config = GenerationConfig(max_new_tokens=NEW, do_sample=False, pad_token_id=0)
    found = model.generate_batch(
        asked, generation_config=config, continuous_batching_config=ContinuousBatchingConfig(**SMALL)
    )
    assert [made.error for made in found.values()] == [None] * len(asked)
    return [made.generated_tokens for made in found.values()]


def for_serving(model: ClearheadForCausalLM) -> ClearheadForCausalLM:
    made = ClearheadForCausalLM(for_servers(model.config)).eval()
    made.load_state_dict(model.state_dict())
    return made


CASES: dict[str, tuple[str, str, dict[str, Any]]] = {
    "softmax": ("softmax", "clearhead", {}),
    "softmax_eager": ("softmax", "eager", {}),
    "V2": ("differential_v2", "clearhead", {}),
    "V2_eager": ("differential_v2", "eager", {}),
    "collinear": ("collinear", "clearhead", {}),
    "collinear_softplus": ("collinear", "sdpa", {"attention_options": {"activation": "softplus"}}),
    "V2_collinear": ("differential_v2_collinear", "sdpa", {}),
}


@pytest.mark.parametrize("case", CASES)
def test_the_tokens_are_those_of_generate(case: str) -> None:
    """Any model but V1, as it is; one that chooses its backend itself does so again afterwards."""
    name, implementation, changes = CASES[case]
    model = make_model(name, **changes)
    expected = generated(model, prompts(), NEW)
    model.set_attn_implementation(implementation)
    assert batched(model, prompts()) == expected
    assert model.config._attn_implementation == implementation


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("differential", {}),
        ("differential_v2", {"layers": [{"sliding_window": 5}, {}]}),
        ("softmax", {"sliding_window": 5}),
    ],
)
def test_with_the_configuration_for_servers(name: str, changes: dict[str, Any]) -> None:
    """V1 by stacked heads, and layers of which some have a window."""
    model = make_model(name, **changes)
    assert batched(for_serving(model), prompts()) == generated(model, prompts(), NEW)


def test_layers_with_windows_of_which_the_paged_cache_is_not_told_are_refused() -> None:
    model = make_model("softmax", layers=[{"sliding_window": 5}, {}])
    with pytest.raises(ValueError, match=r"generate_batch .* not told which layers have a window"):
        batched(model, prompts(2))
    assert model.config._attn_implementation == "clearhead"


def test_other_backends_are_refused_by_name_and_kept() -> None:
    model = make_model("softmax")
    model.set_attn_implementation("flex")
    with pytest.raises(ValueError, match="flex"):
        batched(model, prompts(2))
    assert model.config._attn_implementation == "flex"


@torch.no_grad()
def test_a_paged_cache_and_a_backend_of_this_library_do_not_mix() -> None:
    from transformers.generation.continuous_batching import PagedAttentionCache

    model, cache = make_model("softmax"), PagedAttentionCache.__new__(PagedAttentionCache)
    ids = torch.tensor([[5, 6]])
    with pytest.raises(ValueError, match="not with attn_implementation 'clearhead'"):
        model(ids, position_ids=torch.arange(2)[None], cache=cache, use_cache=False)

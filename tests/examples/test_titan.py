"""The torchtitan example, where torchtitan is: TITAN names the folder that it was installed into (see the README).

Its models, made on the meta device as its trainer makes them, compute what `ClearheadForCausalLM` does.
"""

import os
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from clearhead.models import ClearheadConfig, ClearheadForCausalLM

TITAN = os.environ.get("TITAN")
EXAMPLE = Path(__file__).parents[2] / "examples" / "torchtitan"
SIZES: dict[str, Any] = {"dim": 64, "layers": 2, "heads": 4, "hidden": 96, "vocabulary": 50, "length": 32}
OPTIONS: dict[str, dict[str, Any]] = {
    "softmax": {},
    "differential": {},
    "differential_v2": {},
    "collinear": {"mode": "exact"},
    "differential_collinear": {},
}


@pytest.fixture(scope="module")
def titan() -> ModuleType:
    if TITAN is None:
        pytest.skip("TITAN does not name a folder with torchtitan 0.3.0")
    sys.path[:0] = [TITAN, str(EXAMPLE)]
    import clearhead_titan

    found: ModuleType = clearhead_titan
    return found


def built(titan: ModuleType, variant: str) -> Any:
    """As torchtitan's trainer does it."""
    with torch.device("meta"):
        model = titan.model(variant, **SIZES, **OPTIONS[variant]).build()
    model.verify_module_protocol()
    model.to_empty(device="cpu")
    for tensor in (*model.parameters(), *model.buffers()):
        with torch.no_grad():
            tensor.fill_(float("nan") if tensor.is_floating_point() else 0)
    torch.manual_seed(0)
    with torch.no_grad():
        model.init_states(buffer_device=torch.device("cpu"))
    assert all(torch.isfinite(tensor).all() for tensor in (*model.parameters(), *model.buffers()))
    return model


def own(variant: str) -> ClearheadForCausalLM:
    return ClearheadForCausalLM(
        ClearheadConfig(
            vocab_size=SIZES["vocabulary"],
            hidden_size=SIZES["dim"],
            intermediate_size=SIZES["hidden"],
            num_hidden_layers=SIZES["layers"],
            num_attention_heads=SIZES["heads"],
            max_position_embeddings=SIZES["length"],
            attention=variant,
            attention_options=OPTIONS[variant],
            rms_norm_eps=1e-5,
        )
    )


@pytest.mark.parametrize("variant", OPTIONS)
def test_its_model_is_the_library_s(titan: ModuleType, variant: str) -> None:
    """Logits and gradients, rows of one and of two documents; weights there and back."""
    theirs, ours = built(titan, variant), own(variant)
    adapter = titan.ClearheadAdapter(theirs.config, None)
    state = theirs.state_dict()
    ours.load_state_dict(adapter.to_hf(state))
    assert adapter.from_hf(adapter.to_hf(state)).keys() == state.keys()
    ids = torch.randint(SIZES["vocabulary"], (2, 24), generator=torch.Generator().manual_seed(1))
    whole = torch.arange(24).expand(2, -1)
    for positions in (whole, whole % 16):
        theirs.zero_grad()
        ours.zero_grad()
        found, expected = theirs(ids, positions), ours(ids, position_ids=positions, use_cache=False).logits
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
        for logits in (found, expected):
            torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids.flatten()).backward()
        gradients = adapter.to_hf({name: weight.grad for name, weight in theirs.named_parameters()})
        for name, weight in ours.named_parameters():
            torch.testing.assert_close(gradients[name], weight.grad, rtol=1e-3, atol=1e-5)
    # Documents are kept apart: the second one's logits do not see the first.
    changed = ids.clone()
    changed[:, :16] = (changed[:, :16] + 1) % SIZES["vocabulary"]
    torch.testing.assert_close(theirs(changed, whole % 16)[:, 16:], theirs(ids, whole % 16)[:, 16:])


def test_its_trainer_s_configurations(titan: ModuleType) -> None:
    """As `--module clearhead_titan --config NAME` finds them, with what they refuse."""
    from torchtitan.config.manager import ConfigManager

    for name in ("debug_softmax", "debug_differential", "debug_differential_v2", "debug_collinear"):
        config = ConfigManager().parse_args(["--module", "clearhead_titan", "--config", name])
        config.model_spec.model.update_from_config(config=config)
        with torch.device("meta"):
            made = config.model_spec.model.build()
        count, flops = config.model_spec.model.get_nparams_and_flops(made, config.training.seq_len)
        assert count == sum(weight.numel() for weight in made.parameters()) and flops > 0
    config.parallelism.tensor_parallel_degree = 2
    with pytest.raises(NotImplementedError, match="tensor_parallel_degree must be 1"):
        config.model_spec.model.update_from_config(config=config)
    config.parallelism = type(config.parallelism)()
    with pytest.raises(NotImplementedError, match='spmd_backend must be "partial_dtensor"'):
        config.model_spec.model.update_from_config(config=config)
    with pytest.raises(ValueError, match="is no weight of these models"):
        titan.ClearheadAdapter(config.model_spec.model, None).to_hf({"layers.0.moe.w1": None})

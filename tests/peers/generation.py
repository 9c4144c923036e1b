"""Caches in two and four bits (optimum-quanto). Part of `make test-peers`; the rest: tests/contracts/test_generation_modes.py."""

import pytest
import torch

from tests.contracts.model_cases import VARIANTS, make_model, tokens
from tests.contracts.support import distance


@pytest.mark.parametrize("bits", [2, 4])
@pytest.mark.parametrize("name", VARIANTS)
@torch.no_grad()
def test_a_cache_in_few_bits(name: str, bits: int) -> None:
    """The last tokens are held as they are; what is older is rounded, in groups of numbers."""
    model, ids = make_model(name), tokens(2, 9)
    options = {
        "max_new_tokens": 6,
        "do_sample": False,
        "return_dict_in_generate": True,
        "output_logits": True,
    }
    exact = model.generate(ids, **options)
    few = {"backend": "quanto", "nbits": bits, "q_group_size": 4, "axis_key": 0, "axis_value": 0}
    found = {
        residual: model.generate(
            ids, cache_implementation="quantized", cache_config=few | {"residual_length": residual}, **options
        )
        for residual in (1, 64)
    }
    # Where nothing is older than the window only the prompt, which is rounded at once, differs.
    for out in found.values():
        assert distance(out.logits[0], exact.logits[0]) < 1e-5
        assert distance(out.logits[1], exact.logits[1]) > 0
        assert torch.stack(out.logits).isfinite().all()
        assert out.past_key_values.get_seq_length() == exact.past_key_values.get_seq_length()

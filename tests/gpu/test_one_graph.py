"""Decoding with a cache of fixed size: one compiled graph, hence one CUDA graph, serves all tokens of a request."""

from typing import Any

import pytest
import torch
from transformers import CompileConfig

from tests.contracts.model_cases import left_padded, make_model, tokens

CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "V1": ("differential", {}),
    "V2 with windows": ("differential_v2", {"layers": [{"sliding_window": 5}, {}]}),
    "collinear, compact": ("collinear", {"compact_cache": True}),
    "ALiBi": ("softmax", {"position": "alibi"}),
}


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("case", CASES)
def test_one_graph_a_request(case: str, padded: bool) -> None:
    name, changes = CASES[case]
    torch._dynamo.reset()
    counters = torch._dynamo.utils.counters
    counters.clear()
    model = make_model(name, **changes)
    ids, mask = left_padded([tokens(1, length, seed=length)[0] for length in (4 if padded else 7, 7)])
    once = CompileConfig(fullgraph=True, dynamic=False, mode=None)
    once._compile_all_devices, once.backend = True, "eager"
    options: dict[str, Any] = {"attention_mask": mask, "max_new_tokens": 6, "do_sample": False}
    found = model.generate(ids, cache_implementation="static", compile_config=once, **options)
    assert counters["stats"]["unique_graphs"] == 1
    assert torch.equal(found, model.generate(ids, **options))

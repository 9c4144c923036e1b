"""Decoding with a cache of fixed size: one compiled graph, hence one CUDA graph, serves all tokens of a request."""

from typing import Any

import pytest
import torch
from transformers import CompileConfig

from tests.contracts.model_cases import left_padded, make_model, tokens

CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "V1": ("differential", {}),
    "collinear, compact": ("collinear", {"compact_cache": True}),
    "ALiBi": ("softmax", {"position": "alibi"}),
}


def graphs(name: str, rows: tuple[int, int], new: int, dynamic: bool | None, **changes: Any) -> int:
    """How many were compiled to generate `new` tokens, which are those of a cache that grows."""
    torch._dynamo.reset()
    counters = torch._dynamo.utils.counters
    counters.clear()
    model = make_model(name, **changes)
    ids, mask = left_padded([tokens(1, length, seed=length)[0] for length in rows])
    once = CompileConfig(fullgraph=True, dynamic=dynamic, mode=None)
    once._compile_all_devices, once.backend = True, "eager"
    options: dict[str, Any] = {"attention_mask": mask, "max_new_tokens": new, "do_sample": False}
    found = model.generate(ids, cache_implementation="static", compile_config=once, **options)
    assert torch.equal(found, model.generate(ids, **options))
    return counters["stats"]["unique_graphs"]


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("case", CASES)
def test_one_graph_a_request(case: str, padded: bool) -> None:
    name, changes = CASES[case]
    assert graphs(name, (4 if padded else 7, 7), 6, False, **changes) == 1


def test_windows_take_two_however_many_tokens() -> None:
    """Hugging Face's layer with a window counts its tokens in Python: PyTorch compiles once more for any count."""
    found = {graphs("differential_v2", (7, 7), n, None, layers=[{"sliding_window": 5}, {}]) for n in (4, 9)}
    assert found == {2}

"""`clearhead retrofit` on SmolLM2-135M, every way to begin: `make test-retrofit`, or CLEARHEAD_SMOLLM2=FILE.

FILE is a GGUF file or a directory. It takes about a minute of processor time for each way to begin.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from clearhead.convert.check import TEXT
from clearhead.convert.inits import INITS
from clearhead.convert.retrofit import RetrofitPlan, new_numbers, retrofit
from clearhead.convert.run import convert
from clearhead.models import ClearheadForCausalLM
from clearhead.nn import ProjectedAttention
from clearhead.variants.schedule import advance

SOURCE = os.environ.get("CLEARHEAD_SMOLLM2", "")
pytestmark = pytest.mark.skipif(not SOURCE, reason="make test-retrofit fetches SmolLM2-135M and tests on it")
OPTIONS: dict[str, dict[str, Any]] = {"diff_lora": {"rank": 8, "alpha": 16.0}}


class Plain:
    """The source in this library's format, its logits and what it writes; both are asked of transformers too."""

    def __init__(self, folder: Path) -> None:
        from transformers import AutoTokenizer

        self.folder = folder / "plain"
        convert(SOURCE, self.folder)
        tokenizer = AutoTokenizer.from_pretrained(self.folder)
        self.ids: Tensor = tokenizer(TEXT, return_tensors="pt").input_ids
        chat = [{"role": "user", "content": "Tell me what a harbour is for."}]
        self.prompt: Tensor = tokenizer.apply_chat_template(
            chat, add_generation_prompt=True, return_tensors="pt", return_dict=True
        ).input_ids
        self.logits, self.written = found(self, self.folder)


def found(plain: Plain, folder: Path) -> tuple[Tensor, list[int]]:
    model = ClearheadForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    options: dict[str, Any] = {
        "do_sample": False,
        "max_new_tokens": 100,
        "eos_token_id": None,
        "pad_token_id": 0,
    }
    with torch.no_grad():
        logits: Tensor = model(plain.ids).logits
    written: list[int] = model.generate(plain.prompt, **options)[0, plain.prompt.shape[1] :].tolist()
    return logits, written


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Plain:
    return Plain(tmp_path_factory.mktemp("smollm2"))


@pytest.mark.parametrize(
    "init", [init for init in INITS if init.same_function], ids=lambda init: f"{init.attention}-{init.name}"
)
def test_the_same_function_and_a_gradient_to_all_that_is_new(init: Any, plain: Plain, tmp_path: Path) -> None:
    plan = RetrofitPlan(init.attention, init.name, options=OPTIONS.get(init.attention, {}))
    retrofit(str(plain.folder), tmp_path / "out", plan)
    logits, written = found(plain, tmp_path / "out")
    difference = float((logits - plain.logits).abs().max())
    print(f"{init.attention} {init.name}: largest difference of logits {difference:.1e}")
    assert difference <= 1e-4
    assert len(written) == 100 and written == plain.written
    model = ClearheadForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    advance(model, 1)
    model(plain.ids[:, :32], labels=plain.ids[:, :32]).loss.backward()
    reached = 0
    for layer in (part for part in model.modules() if isinstance(part, ProjectedAttention)):
        for name, parameter in layer.variant.named_parameters():
            assert parameter.grad is not None and bool((parameter.grad != 0).any()), name
            reached += parameter.numel()
        for name, rows in layer.variant.new_rows().items():
            assert bool((getattr(layer, name).weight.grad[rows] != 0).any(dim=1).all()), name
            reached += int(rows.sum()) * getattr(layer, name).weight.shape[1]
    assert reached == new_numbers(model)

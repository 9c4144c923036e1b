"""Context parallelism: every variant in two processes is what one process computes; what cannot be is refused."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from pytest import MonkeyPatch
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from clearhead.core.parts import rows_are_shared
from tests.contracts.model_cases import make_model, tokens
from tests.gpu.test_session import GPU, script
from tests.parallel import ranks

SAID = {
    "no positions": "position_ids are missing",
    "documents": "position_ids go back",
    "numbered documents": "seq_idx",
    "padding": "padding before real tokens",
    "mask": "4 dimensions",
    "window": "not a mask with window",
    "slopes": "not a mask with alibi",
    "scaling": "rope_length is missing",
    "engine": "sdpa alone",
    "function": "sdpa alone",
}


def test_rows_shared_out_over_two_processes(tmp_path: Path) -> None:
    """One start of the processes: the script for two GPUs but for the device, all variants in float64, refusals."""
    ranks.run("tests.parallel.context:everything", tmp_path)
    both = [json.loads((tmp_path / f"context.{rank}.json").read_text()) for rank in range(2)]
    for found in both:
        assert [record["variant"] for record in found["script"]] == [
            name for name in script("context_parallel").VARIANTS for _ in range(2)
        ]
        for record in found["script"]:
            assert record["holds"], record
        for name, cases in [*found["variants"].items(), ("trainer", [found["trainer"]])]:
            for loss, gradient in cases:
                # transformers computes a loss in float32 whatever the model's dtype, and its gradient from there.
                assert loss < 5e-7 and gradient < 1e-9, (name, loss, gradient)
    for name, said in SAID.items():
        told = [said in found["refusals"].pop(name) for found in both]
        # What stands in one process's part alone is refused there; whoever started them ends the other.
        assert any(told) if name in ("documents", "padding") else all(told), (name, told)
    assert not any(found["refusals"] for found in both)


def test_another_function_in_sdpas_place_is_no_context_parallelism(monkeypatch: MonkeyPatch) -> None:
    own = F.scaled_dot_product_attention
    monkeypatch.setattr(F, "scaled_dot_product_attention", lambda *args, **kwargs: own(*args, **kwargs))
    assert not rows_are_shared()


def test_ulysses_which_would_share_nothing_is_refused(monkeypatch: MonkeyPatch) -> None:
    def wrapper(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("these models do not call it")

    wrapper.__module__ = "deepspeed.runtime.sequence_parallel.ulysses_sp"
    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS._local_mapping, "sdpa", wrapper)
    with pytest.raises(ValueError, match="cp_backend='torch'"):
        make_model("softmax", attn_implementation="sdpa")(tokens(1, 5))


def test_the_script_says_what_it_needs() -> None:
    check = script("context_parallel")
    assert check.reason_against(2, 2) is None
    assert "and this machine has 1" in check.reason_against(2, 1)
    assert "torchrun --nproc-per-node 2" in check.reason_against(1, 2)
    assert "as many CUDA devices, not 2" in check.reason_against(4, 2)
    if torch.cuda.device_count() < 2:
        done = subprocess.run(
            [sys.executable, GPU / "context_parallel.py"], capture_output=True, text=True, check=False
        )
        assert done.returncode == 1 and "needs two CUDA devices" in done.stderr, done.stderr
        assert len(done.stderr.strip().splitlines()) == 1

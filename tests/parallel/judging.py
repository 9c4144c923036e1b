"""What two processes wrote down (`work`), read and judged: the suite's cases and those of `make test-peers`."""

import json
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from safetensors.torch import load_file

from clearhead.registry import VARIANTS
from tests.parallel import ranks, work


def done(folder: Path, jobs: dict[str, list[str]]) -> Path:
    """The folder with the models, once both processes are through."""
    # A toy variant is registered for the models; no other test is to find it.
    with patch.dict(VARIANTS):
        work.save(folder, jobs)
    ranks.run("tests.parallel.work:everything", folder)
    return folder


def told(folder: Path, job: str, case: str) -> list[dict[str, Any]]:
    """What each process wrote."""
    return [json.loads((folder / f"{job}.{rank}.json").read_text())[case] for rank in range(2)]


def judge_answers(folder: Path, job: str, case: str) -> None:
    """Logits in float64, and tokens through both kinds of cache."""
    for found in told(folder, job, case):
        assert found["logits"] < 1e-12, (job, case, found)
        assert found["dynamic"] and found["static"], (job, case, found)


def judge_tensor_parallel(folder: Path, case: str) -> None:
    """And gradients, and the weights that both processes saved together, from float64."""
    judge_answers(folder, "tensor parallel", case)
    whole = load_file(folder / case / "model.safetensors")
    again = load_file(folder / "again" / case / "model.safetensors")
    if case == "tied":
        # transformers writes a tied matrix twice from several processes, also LLaMA's.
        assert torch.equal(again.pop("lm_head.weight"), again["model.embed_tokens.weight"])
    assert whole.keys() == again.keys(), case
    for name, value in whole.items():
        assert torch.equal(value.double(), again[name]), (case, name)
    for found in told(folder, "tensor parallel", case):
        assert found["rows of keys"] == len(whole["model.layers.0.self_attn.k_proj.weight"]) // 2, case
        assert found["gradients"].keys() == whole.keys(), case
        assert max(found["gradients"].values()) < 1e-10, (case, found["gradients"])


def judge_sharded(folder: Path, case: str) -> None:
    first, second = told(folder, "sharded", case)
    assert first["losses"] == second["losses"], case
    assert len(first["losses"]) == len(first["alone"]) == work.STEPS
    for loss, expected in zip(first["losses"], first["alone"], strict=True):
        assert abs(loss / expected - 1) < 1e-5, (case, loss, expected)
    if "kept" in first:
        assert first["kept"] == ["lambda_k1", "lambda_k2", "lambda_q1", "lambda_q2"], case
        # bfloat16 keeps three digits, and two halves of a batch round differently.
        for loss, expected in zip(first["narrow"], first["narrow alone"], strict=True):
            assert abs(loss / expected - 1) < 0.02, (case, loss, expected)


def judge(folder: Path, jobs: dict[str, list[str]]) -> None:
    for case in jobs["tensor parallel"]:
        judge_tensor_parallel(folder, case)
    for case in jobs["pipeline"]:
        judge_answers(folder, "pipeline", case)
    for case in jobs["sharded"]:
        judge_sharded(folder, case)

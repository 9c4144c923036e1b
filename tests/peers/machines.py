"""Saved models exported, quantised, on disk, launched in two processes. Part of `make test-peers`."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from transformers import TorchAoConfig

from clearhead.models import ClearheadForCausalLM
from tests.contracts.model_cases import make_model, tokens
from tests.contracts.support import distance

NAMES = ("softmax", "differential", "differential_v2", "collinear")
every_model = pytest.mark.parametrize("name", NAMES)


class Step(nn.Module):
    """One token behind a cache, whose layers come and go as tensors."""

    def __init__(self, model: ClearheadForCausalLM) -> None:
        super().__init__()
        self.model = model

    def forward(
        self, token: Tensor, held: list[tuple[Tensor, Tensor]]
    ) -> tuple[Tensor, list[tuple[Tensor, Tensor]]]:
        from transformers import DynamicCache

        cache = DynamicCache(held)
        logits = self.model(token, past_key_values=cache).logits
        return logits, [(layer.keys, layer.values) for layer in cache.layers]


def step_of(name: str) -> tuple[Step, Tensor, Any, Tensor]:
    """The step, its token, what is held before, and the logits that it must give."""
    from transformers import DynamicCache

    model, ids, cache = make_model(name), tokens(1, 8), DynamicCache()
    model.set_attn_implementation("eager")
    with torch.no_grad():
        model(ids[:, :7], past_key_values=cache)
        expected = model(ids, use_cache=False).logits[:, -1:]
    held = [(layer.keys, layer.values) for layer in cache.layers]
    return Step(model), ids[:, 7:], held, expected


@every_model
@torch.no_grad()
def test_a_decoder_step_is_exported(name: str) -> None:
    step, token, held, expected = step_of(name)
    program = torch.export.export(step, (token, held), strict=False)
    logits, grown = program.module()(token, held)
    assert distance(logits, expected) < 1e-5
    assert all(keys.shape[2] == 8 for keys, _ in grown)


@every_model
@torch.no_grad()
def test_a_decoder_step_as_onnx(name: str, tmp_path: Path) -> None:
    """With the implementation "eager": ONNX knows no function for the fused operator."""
    import onnxruntime

    step, token, held, expected = step_of(name)
    torch.onnx.export(step, (token, held), tmp_path / "step.onnx", dynamo=True, verbose=False)
    session = onnxruntime.InferenceSession(tmp_path / "step.onnx", providers=["CPUExecutionProvider"])
    given = [token, *(tensor for pair in held for tensor in pair)]
    names = [entry.name for entry in session.get_inputs()]
    answers = session.run(None, {key: np.asarray(x) for key, x in zip(names, given, strict=True)})
    assert distance(torch.from_numpy(answers[0]), expected) < 1e-4
    assert answers[1].shape[2] == 8


@every_model
@torch.no_grad()
def test_weights_in_eight_bits(name: str, tmp_path: Path) -> None:
    """torchao's integers a row: logits are those of the rounded weights, λ and norms are as they were."""
    from torchao.quantization import Int8WeightOnlyConfig

    make_model(name).save_pretrained(tmp_path)
    quantised = ClearheadForCausalLM.from_pretrained(
        tmp_path, quantization_config=TorchAoConfig(Int8WeightOnlyConfig()), dtype=torch.float32
    ).eval()
    linear = quantised.model.layers[0].self_attn.q_proj.weight
    assert type(linear).__name__ == "Int8Tensor"
    rounded = make_model(name)
    for (key, module), other in zip(quantised.named_modules(), rounded.modules(), strict=True):
        for own, parameter in module.named_parameters(recurse=False):
            value = parameter.dequantize() if type(parameter).__name__ == "Int8Tensor" else parameter
            assert value is not parameter or torch.equal(value, getattr(other, own)), key
            getattr(other, own).copy_(value)
    ids = tokens(2, 9)
    assert distance(quantised(ids).logits, rounded(ids).logits) < 1e-4
    assert distance(rounded(ids).logits, make_model(name)(ids).logits) > 0
    assert quantised.generate(ids, max_new_tokens=3, do_sample=False).shape == (2, 12)


@every_model
@torch.no_grad()
def test_layers_on_disk(name: str, tmp_path: Path) -> None:
    make_model(name).save_pretrained(tmp_path / "model")
    model = ClearheadForCausalLM.from_pretrained(
        tmp_path / "model", device_map="auto", max_memory={"cpu": 35_000}, offload_folder=tmp_path / "disk"
    )
    # What lies in the file already is read from there.
    assert set(model.hf_device_map.values()) == {"cpu", "disk"}
    ids = tokens(2, 9)
    assert torch.equal(model(ids).logits, make_model(name)(ids).logits)
    options = {"max_new_tokens": 4, "do_sample": False}
    assert torch.equal(model.generate(ids, **options), make_model(name).generate(ids, **options))


SCRIPT = """
import json, sys
from pathlib import Path
import torch
from accelerate import Accelerator
from tests.contracts.model_cases import tokens
from clearhead.models import ClearheadForCausalLM

folder = Path(sys.argv[1])
model = ClearheadForCausalLM.from_pretrained(folder)
accelerator = Accelerator(cpu=True)
optimiser = torch.optim.AdamW(model.parameters(), lr=3e-3)
model, optimiser = accelerator.prepare(model, optimiser)
model.train()
losses = []
for step in range(8):
    rows = tokens(4, 12, seed=step).chunk(accelerator.num_processes)[accelerator.process_index]
    loss = model(input_ids=rows, labels=rows).loss
    accelerator.backward(loss)
    optimiser.step()
    optimiser.zero_grad()
    losses.append(float(accelerator.reduce(loss.detach().float(), "mean")))
kinds = {type(module).__name__ for module in model.modules()}
if accelerator.is_main_process:
    (folder / f"{accelerator.num_processes}.json").write_text(json.dumps([losses, sorted(kinds)]))
"""


# --multi_gpu is the launcher of several processes, also of a script that asks for the CPU: no flag says MULTI_CPU.
def launched(folder: Path, processes: int, *options: str) -> Any:
    script = folder / "train.py"
    script.write_text(SCRIPT)
    command = [
        sys.executable,
        "-m",
        "accelerate.commands.accelerate_cli",
        "launch",
        "--num_machines",
        "1",
    ]
    command += [
        "--num_processes",
        str(processes),
        "--mixed_precision",
        "no",
        "--dynamo_backend",
        "no",
        *options,
    ]
    done = subprocess.run(
        [*command, "--main_process_port", "0", str(script), str(folder)],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        stdin=subprocess.DEVNULL,
    )
    assert done.returncode == 0, (done.stdout + done.stderr)[-5000:]
    return json.loads((folder / f"{processes}.json").read_text())


@pytest.mark.parametrize("name", ["differential", "differential_v2", "collinear"])
def test_accelerate_launches_two_processes(name: str, tmp_path: Path) -> None:
    make_model(name).save_pretrained(tmp_path)
    (alone, _), (together, kinds) = launched(tmp_path, 1, "--cpu"), launched(tmp_path, 2, "--multi_gpu")
    assert "DistributedDataParallel" in kinds
    assert together == pytest.approx(alone, rel=1e-5)

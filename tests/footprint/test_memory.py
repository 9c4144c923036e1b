"""The memory model beside measured peaks: whole training steps of small models on this processor, within 15 %.

And what `explain` itself takes for a model of 13 billion parameters. One process measures all of it.
"""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from clearhead.models import ClearheadConfig
from clearhead.models.footprint.activations import activations
from clearhead.models.footprint.memory import ModelSize, training_memory

ROOT = Path(__file__).parents[2]
ROWS, LENGTH = 2, 512
VARIANTS = {"softmax": {}, "differential": {}, "differential_v2": {}, "collinear": {"mode": "exact"}}
TOLERANCE = 0.15
# The kernel forgets a peak when asked, and large blocks go back to it at once.
MEASURE = """
import contextlib, gc, io, json, sys
from clearhead.cli.main import app

def memory(key):
    line = next(line for line in open("/proc/self/status") if line.startswith(key))
    return int(line.split()[1]) * 1024

said = io.StringIO()
with contextlib.redirect_stdout(said):
    app(["explain", "recipes/paper/diff-13.1b.toml", "--on", "8xh100"], standalone_mode=False)
result = {"said": said.getvalue(), "explain": memory("VmHWM"), "peaks": []}

import torch, torch.nn.functional as F
from clearhead.models import ClearheadConfig, ClearheadForCausalLM

torch.set_num_threads(1)
for case in json.loads(sys.argv[1]):
    before = memory("VmRSS")
    model = ClearheadForCausalLM(ClearheadConfig(**case["config"])).train()
    model.config._attn_implementation = "sdpa"
    if case["checkpointing"]:
        model.gradient_checkpointing_enable()
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    tokens = torch.randint(0, case["config"]["vocab_size"], case["shape"])

    def step():
        logits = model(input_ids=tokens, use_cache=False).logits
        loss = F.cross_entropy(logits.flatten(0, 1), tokens.flatten())
        del logits
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    step()
    open("/proc/self/clear_refs", "w").write("5")
    step()
    result["peaks"].append(memory("VmHWM") - before)
    del model, optimizer, tokens
    gc.collect()
print(json.dumps(result))
"""


def small(name: str) -> dict[str, object]:
    return {
        "vocab_size": 2048,
        "hidden_size": 192,
        "num_hidden_layers": 4,
        "num_attention_heads": 6,
        "attention": name,
        "attention_options": VARIANTS[name],
    }


CASES = [
    {"config": small(name), "checkpointing": checkpointing, "shape": [ROWS, LENGTH]}
    for name in VARIANTS
    for checkpointing in (False, True)
]
# A process's first steps load code for good: that is no model's memory.
WARMING = [
    {"config": small("softmax"), "checkpointing": checkpointing, "shape": [1, 16]}
    for checkpointing in (False, True)
]
ON_LINUX = pytest.mark.skipif(
    sys.platform != "linux", reason="the peak of a process can be set back on Linux only"
)


@pytest.fixture(scope="module")
def measured() -> dict[str, Any]:
    environment = {
        **os.environ,
        "PYTHONPATH": str(ROOT / "src"),
        "OMP_NUM_THREADS": "1",
        "COLUMNS": "200",
        "MALLOC_MMAP_THRESHOLD_": "65536",
        "MALLOC_TRIM_THRESHOLD_": "65536",
    }
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", MEASURE, json.dumps([*WARMING, *CASES])],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        check=True,
    )
    found: dict[str, Any] = json.loads(done.stdout)
    return found


@pytest.mark.long
@ON_LINUX
def test_peaks_are_as_the_model_says(measured: dict[str, Any]) -> None:
    for case, peak in zip(CASES, measured["peaks"][len(WARMING) :], strict=True):
        made = ClearheadConfig(**case["config"])  # type: ignore[arg-type]
        kept = activations(made, ROWS, LENGTH, torch.float32, "cpu")
        expected = training_memory(
            ModelSize.of(made),
            kept,
            1,
            "none",
            torch.float32,
            checkpointing=bool(case["checkpointing"]),
            accumulates=False,
        )
        assert peak == pytest.approx(expected.peak, rel=TOLERANCE), case


@pytest.mark.long
@ON_LINUX
def test_explain_knows_a_node_without_having_one(measured: dict[str, Any]) -> None:
    """Imports included."""
    assert "13,098,470,400" in measured["said"] and "A model, not a measurement" in measured["said"]
    assert 1e8 < measured["explain"] < 1e9


def test_what_a_layer_keeps_grows_with_its_tokens() -> None:
    made = ClearheadConfig(**small("differential"))  # type: ignore[arg-type]
    one, two, longer = (
        activations(made, rows, length, torch.bfloat16)
        for rows, length in ((1, LENGTH), (2, LENGTH), (1, 2 * LENGTH))
    )
    assert two.loss == 2 * one.loss and two.inputs == 2 * one.inputs
    # Nothing of a map's size is kept: a row of twice the tokens is as two rows, but for the rotation's tables.
    assert two.layers[0] == pytest.approx(2 * one.layers[0], rel=0.02)
    assert longer.layers[0] == pytest.approx(two.layers[0], rel=0.02)
    assert one.mask == 0
    assert activations(made, 3, 64, torch.bfloat16, documents=True).mask == 3 * 64 * 64 * 2


def test_layers_that_differ_are_counted_apart() -> None:
    made = ClearheadConfig(
        hidden_size=64,
        num_hidden_layers=4,
        num_attention_heads=4,
        layers=[{"attention": "softmax"}, {"attention": "differential_v2"}],
    )
    kept = activations(made, 1, 64, torch.float32, "cpu")
    assert kept.layers[0] == kept.layers[2] < kept.layers[1] == kept.layers[3] == kept.largest


def test_the_peak_is_at_one_end_of_the_backward_pass() -> None:
    made = ClearheadConfig(**small("softmax"))  # type: ignore[arg-type]
    size, kept = ModelSize.of(made), activations(made, 1, 64, torch.float32, "cpu")

    def peak(**changes: bool) -> int:
        options = {"checkpointing": False, "accumulates": False, **changes}
        return training_memory(size, kept, 1, "none", torch.float32, **options).peak

    gradients = 4 * size.parameters
    assert peak(accumulates=True) == 4 * gradients + kept.kept(False) + kept.loss
    # With few tokens the gradients outweigh what was kept.
    assert peak() == max(3 * gradients + kept.kept(False) + kept.loss, 4 * gradients + kept.largest)
    assert size.parameters == size.outside + 4 * size.layer
    half = training_memory(size, kept, 2, "fsdp", torch.float32, checkpointing=False, accumulates=False)
    assert half.weights == 4 * size.parameters // 2 and half.gathered > 0


def test_a_command_builds_each_model_twice_at_most(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Once to check the recipe and once to count: of 13 billion weights that is most of what explain itself takes."""
    from clearhead.cli.main import app
    from clearhead.models import ClearheadForCausalLM

    built, make = [], ClearheadForCausalLM.__init__

    def counted(model: Any, config: Any, *rest: Any, **more: Any) -> None:
        built.append(config.attention)
        make(model, config, *rest, **more)

    monkeypatch.setattr(ClearheadForCausalLM, "__init__", counted)
    monkeypatch.chdir(ROOT)
    app(["explain", "recipes/paper/diff-830m.toml", "--on", "8xh100"], standalone_mode=False)
    assert "Transformer" in capsys.readouterr().out
    assert sorted(built) == ["differential"] * 2 + ["softmax"] * 2


def test_layers_of_a_kind_are_sized_once(monkeypatch: pytest.MonkeyPatch) -> None:
    made = ClearheadConfig(
        hidden_size=64,
        num_hidden_layers=6,
        num_attention_heads=4,
        layers=[{"attention": "softmax"}, {"attention": "differential"}],
    )
    sized, widths = [], ClearheadConfig.widths

    def counted(self: ClearheadConfig, kind: Any) -> Any:
        sized.append(kind.attention)
        return widths(self, kind)

    monkeypatch.setattr(ClearheadConfig, "widths", counted)
    layers = made.per_layer_config
    assert sized == ["softmax", "differential"]
    assert [layer.num_key_value_heads for layer in layers] == [4, 2] * 3

"""What a conversion costs in memory: CLEARHEAD_MEMORY_MB=500 measures it with a checkpoint of that size."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig

from clearhead.convert.llama import Llama
from clearhead.convert.weights import Sheet, write_weights

ROOT = Path(__file__).parents[2]
MEGABYTES = int(os.environ.get("CLEARHEAD_MEMORY_MB", "0"))
SHARDS = 3
MEASURED = """
import re, sys
from clearhead.convert import run
from clearhead.convert.run import convert
from pathlib import Path
import transformers
convert(sys.argv[1], Path(sys.argv[2]), to=sys.argv[3], shard_bytes=int(sys.argv[4]))
# ru_maxrss would count what the process that started this one had in memory.
print(int(re.search(r"VmHWM:\\s+(\\d+)", open("/proc/self/status").read())[1]) * 1024)
"""


@pytest.mark.skipif(not MEGABYTES, reason="set CLEARHEAD_MEMORY_MB to the size of the checkpoint to measure")
def test_peak_memory_is_about_one_shard(tmp_path: Path) -> None:
    """At most 1.5 times the largest shard and 300 MB."""
    size = MEGABYTES * 10**6
    hidden, layers = 1024, 8
    inner = round((0.75 * size / 4 / layers - 4 * hidden**2) / (3 * hidden))
    config = LlamaConfig(
        vocab_size=round(0.125 * size / 4 / hidden),
        hidden_size=hidden,
        intermediate_size=inner,
        num_hidden_layers=layers,
        num_attention_heads=16,
        architectures=["LlamaForCausalLM"],
    )
    folder = tmp_path / "source"
    folder.mkdir()
    config.save_pretrained(folder)
    sheets = [Sheet(name, torch.float32, shape) for name, shape in Llama().shapes(config.to_dict()).items()]
    shapes = {sheet.name: sheet.shape for sheet in sheets}
    files = list(
        write_weights(folder, sheets, lambda name: [torch.randn(shapes[name]) * 0.02], size // SHARDS)
    )
    largest = max(file.stat().st_size for file in files)
    assert len(files) >= SHARDS
    arguments = [str(folder), str(tmp_path / "out"), "clearhead", str(size // SHARDS)]
    done = subprocess.run(
        [sys.executable, "-c", MEASURED, *arguments],
        env={**os.environ, "PYTHONPATH": str(ROOT / "src")},
        capture_output=True,
        text=True,
        check=True,
    )
    peak = int(done.stdout)
    print(f"{size / 1e6:.0f} MB in {len(files)} shards of {largest / 1e6:.0f} MB: peak {peak / 1e6:.0f} MB")
    assert peak <= 1.5 * largest + 300e6

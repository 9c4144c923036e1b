"""The kernels compile for GPUs that are not here as the report says: some of its rows, all by `make compile`."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from clearhead.kernels.triton import configs
from clearhead.kernels.triton.configs import Config, Key

ROOT = Path(__file__).parents[3]
REPORT = ROOT / "benchmarks" / "results" / "triton_compile.jsonl"


def rows() -> list[dict[str, Any]]:
    return [json.loads(line) for line in REPORT.read_text().splitlines()]


def test_the_report_is_of_the_table_and_has_no_spill_where_none_is_promised() -> None:
    """16 bits, keys of 64 and 128, every form, direction and GPU."""
    promised = 0
    for row in rows():
        key = Key(**{name: row[name] for name in Key.__dataclass_fields__})
        config = Config(**{name: row[name] for name in Config.__dataclass_fields__})
        own = configs.table()[key]
        assert config == (configs.for_held_keys(key, own) if row["masks"] == "compact" else own)
        if row["bits"] == 16 and row["width"] in (64, 128):
            assert row["spills"] == 0 and row["shared fits"] and row["mix"]["matrix"] > 0
            promised += 1
    # 144 of every direction, 24 with a row's ending, 24 with keys that are held at half their width.
    assert promised == 192


# One of each direction, on three GPUs: compiling takes seconds, all rows an hour.
SAMPLE = {"sm_90": "forward", "sm_80": "backward", "gfx942": "decode"}


@pytest.mark.parametrize("architecture", SAMPLE)
def test_a_row_compiles_as_reported(architecture: str) -> None:
    """In a process of its own: here the kernels are the interpreter's."""
    command = [sys.executable, str(ROOT / "benchmarks" / "gpu" / "compile_report.py"), "--check"]
    command += ["--bits", "16", "--widths", "64", "--architectures", architecture, "--processes", "1"]
    command += ["--directions", SAMPLE[architecture], "--sample", "1"]
    environment = {**os.environ, "TRITON_INTERPRET": "0", "PYTHONPATH": str(ROOT / "src")}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0 and done.stdout.endswith("1 of 1 as reported\n"), done.stdout + done.stderr

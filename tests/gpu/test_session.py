"""`benchmarks/gpu.sh`: its steps, its time and how it goes on, with processes and a clock that are stand-ins."""

import importlib.util
import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from clearhead.bench.cases import select
from clearhead.bench.gpu_cases import cases_on
from clearhead.kernels.triton import configs

GPU = Path(__file__).parents[2] / "benchmarks" / "gpu"


def script(name: str) -> ModuleType:
    """A file of benchmarks/gpu as a module; they import one another as scripts do."""
    sys.path.insert(0, str(GPU))
    try:
        spec = importlib.util.spec_from_file_location(f"benchmarks_gpu_{name}", GPU / f"{name}.py")
        assert spec is not None and spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules[spec.name] = module
        spec.loader.exec_module(module)
        return module
    finally:
        sys.path.remove(str(GPU))


session = script("session")


class Machine:
    """Processes that take what `takes` says, of a clock that nothing else moves."""

    def __init__(self, takes: dict[str, float], codes: dict[str, int] | None = None) -> None:
        self.now, self.takes, self.codes = 1000.0, takes, codes or {}
        self.ran: list[str] = []
        self.said: list[str] = []

    def launch(self, command: Sequence[str], log: Path, seconds: float) -> int | None:
        name = log.stem
        self.ran.append(name)
        self.now += min(self.takes.get(name, 5.0), seconds)
        return None if self.takes.get(name, 5.0) > seconds else self.codes.get(name, 0)

    def run(self, folder: Path, budget: float = 470.0) -> dict[str, str]:
        every = session.steps(folder, "python")
        options = {"budget": budget, "clock": lambda: self.now, "say": self.said.append}
        return {o.name: o.state for o in session.run(every, folder, self.launch, **options)}


NAMES = [step.name for step in session.steps(Path("x"))]


def test_all_of_it(tmp_path: Path) -> None:
    machine = Machine({})
    assert machine.run(tmp_path) == dict.fromkeys(NAMES, "done") and machine.ran == NAMES
    told = json.loads((tmp_path / "session.json").read_text())
    assert [entry["name"] for entry in told] == NAMES and told[0]["seconds"] == 5.0
    assert machine.said[0] == "[1/7] gate: at most 100 s of the 470 left"
    again = Machine({})
    assert again.run(tmp_path) == dict.fromkeys(NAMES, "done") and again.ran == []


def test_nothing_is_timed_where_the_gate_is_red(tmp_path: Path) -> None:
    machine = Machine({}, {"gate": 1})
    found = machine.run(tmp_path)
    assert found.pop("gate") == "failed" and set(found.values()) == {"not begun"} and machine.ran == ["gate"]
    mended = Machine({})
    assert set(mended.run(tmp_path).values()) == {"done"} and mended.ran == NAMES


@pytest.mark.parametrize("budget", [60.0, 200.0, 470.0])
def test_the_time_is_kept_whatever_hangs(budget: float, tmp_path: Path) -> None:
    machine = Machine(dict.fromkeys(NAMES, 10_000.0))
    found = machine.run(tmp_path, budget)
    assert machine.now - 1000.0 <= budget
    assert set(found.values()) <= {"out of time", "not begun"} and found["gate"] == "out of time"


def test_it_goes_on_with_what_is_missing(tmp_path: Path) -> None:
    first = Machine({"attention": 400.0, "tune": 400.0}, {"decode": 75, "train": 3})
    states = first.run(tmp_path)
    assert states["attention"] == states["decode"] == states["tune"] == "out of time"
    assert states["train"] == "failed" and states["rest"] == "done"
    second = Machine({})
    second.run(tmp_path)
    assert second.ran == ["attention", "decode", "train", "tune"]


def test_a_killed_session_loses_one_step(tmp_path: Path) -> None:
    class Killed(Machine):
        def launch(self, command: Sequence[str], log: Path, seconds: float) -> int | None:
            if log.stem == "decode":
                raise KeyboardInterrupt
            return super().launch(command, log, seconds)

    with pytest.raises(KeyboardInterrupt):
        Killed({}).run(tmp_path)
    second = Machine({})
    second.run(tmp_path)
    assert second.ran == NAMES[2:]
    (tmp_path / "session.json").write_text("[{")
    assert Machine({}).run(tmp_path) == dict.fromkeys(NAMES, "done")


def test_its_commands_exist() -> None:
    """Every bench names cases that there are, and all shares together fit the budget that they are begun under."""
    every = session.steps(Path("x"))
    for step in every:
        words = list(step.command)
        if "bench" in words:
            what = words[words.index("bench") + 1]
            patterns = [words[at + 1] for at, word in enumerate(words) if word == "--case"]
            assert select(what, patterns, cases_on("cuda"))
        else:
            assert Path(words[1]).is_file()
    assert session.BUDGET < 480 and all(step.least <= step.most for step in every)


def test_a_real_process(tmp_path: Path) -> None:
    log = tmp_path / "log"

    def run(code: str, seconds: float = 60.0) -> Any:
        return session.as_process([sys.executable, "-c", code], log, seconds)

    assert run("print('hello')") == 0 and run("raise SystemExit(75)") == 75
    assert run("import time; time.sleep(60)", 11.0) is None
    assert log.read_text().startswith("hello")


def _off_by_a_percent(function: Any) -> Any:
    def broken(*arguments: Any) -> Any:
        found = function(*arguments)
        return (found[0] * 1.01, *found[1:]) if isinstance(found, tuple) else found * 1.01

    return broken


def test_the_gate_asks_every_feature_and_finds_a_fault(monkeypatch: pytest.MonkeyPatch) -> None:
    """In the interpreter; what is wrong by a percent, or raises, is red."""
    pytest.importorskip("triton", reason="Triton is not installed")
    gate = script("gate")
    every = list(gate.problems())
    assert len({name for name, _ in every}) == len(every) == 65
    named = dict(every)
    for name, dtype in (
        ("window", torch.float16),
        ("documents", torch.bfloat16),
        ("one query", torch.float32),
        ("v1, padding, ended in the kernel", torch.float32),
        ("held keys, own keys, padded", torch.bfloat16),
    ):
        assert gate.wrong(named[name], dtype, "cpu") is None
    right = gate.differential_attention
    monkeypatch.setattr(gate, "differential_attention", lambda *x, **options: right(*x, **options) * 1.01)
    assert "roundings off" in (gate.wrong(named["one query"], torch.float32, "cpu") or "")
    from tests.kernels.triton import test_compact, test_endings

    for module, name, problem in (
        (test_endings, "attend", "one query, ended in the kernel"),
        (test_compact, "run", "held keys, one stream, causal"),
    ):
        with monkeypatch.context() as broken:
            broken.setattr(module, name, _off_by_a_percent(getattr(module, name)))
            assert "off, over" in (gate.wrong(named[problem], torch.float32, "cpu") or "")
    monkeypatch.setattr(gate, "problems", lambda: iter([("one query", named["one query"])]))
    assert gate.main([], "cpu") == 1
    monkeypatch.setattr(gate, "differential_attention", right)
    assert gate.main([], "cpu") == 0 and gate.main(["--seconds", "-1"], "cpu") == 0


def test_tuning_goes_on_where_it_stopped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Most asked for first; what its own table has is not measured again; rows that nothing beat stay as they were."""
    pytest.importorskip("triton", reason="Triton is not installed")
    tune = script("tune")
    table, out, asked = dict(configs.table()), tmp_path / "tuned.json", []
    moments = iter(range(0, 10_000, 10))
    faster = configs.Config(32, 32, 4, 1)

    def measured(key: Any, _: Any) -> Any:
        asked.append(key)
        return None if key.direction == "decode" else faster

    monkeypatch.setattr(tune.configs, "table", lambda: table)
    monkeypatch.setattr(tune, "tune", measured)
    monkeypatch.setattr(tune, "TABLE", tmp_path / "configs.json")
    monkeypatch.setattr(tune, "reason_against_cuda", lambda: None)
    monkeypatch.setattr(tune.configs, "architecture", lambda _: "sm_90")
    monkeypatch.setattr(tune.time, "monotonic", lambda: next(moments))
    monkeypatch.setattr(tune.torch, "empty", lambda *_, **__: None)
    monkeypatch.setattr(sys, "argv", ["tune", "--seconds", "35", "--out", str(out)])
    assert tune.main() == tune.UNFINISHED == session.UNFINISHED
    assert [(k.bits, k.width, k.streams, k.value_width) for k in asked] == [(16, 128, 2, 256)] * 3
    assert len(configs.read(out.read_text())) == 2
    assert table[asked[0]] == faster and configs.read((tmp_path / "configs.json").read_text()) == table
    monkeypatch.setattr(sys, "argv", ["tune", "--out", str(out)])
    before = len(asked)
    assert tune.main() == 0
    # The decoding row, for which nothing was found, is asked again.
    assert len(asked) - before == 54 - 2
    assert {key.direction for key in set(asked[:before]) - set(asked[before:])} == {"forward", "backward"}


def test_without_a_gpu_it_says_so() -> None:
    found = subprocess.run(
        ["sh", str(GPU.with_suffix(".sh"))], capture_output=True, text=True, env=_environment()
    )
    assert found.returncode == 1 and "PyTorch sees no GPU here" in found.stderr
    dry = subprocess.run(
        ["sh", str(GPU.with_suffix(".sh")), "--dry-run"], capture_output=True, text=True, env=_environment()
    )
    assert dry.returncode == 0 and [line.split()[0] for line in dry.stdout.splitlines()] == NAMES


def _environment() -> dict[str, str]:
    import os

    return {
        **os.environ,
        "PYTHON": sys.executable,
        "PYTHONPATH": str(GPU.parents[1] / "src"),
        "CUDA_VISIBLE_DEVICES": "",
    }

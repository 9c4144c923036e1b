"""`clearhead bench --device cuda`, on a stand-in for a GPU: what is timed how, what a line says, what is left out."""

import json
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from typer.testing import CliRunner, Result

from clearhead.bench import cuda, gpu_cases, machine, peers
from clearhead.bench.cases import AttentionCase, TrainCase, select
from clearhead.bench.gate import check
from clearhead.bench.gpu_cases import cases_on
from clearhead.bench.records import named
from clearhead.bench.training import ARMS
from clearhead.cli.main import app
from tests.gpu.device import gpu, on_cuda
from tests.oracles import softmax


class Card:
    """What `torch.cuda` says of a GPU, whose time passes by what is sent to it."""

    now, log = 0.0, []  # type: ignore[var-annotated]

    class Event:
        def __init__(self, enable_timing: bool) -> None:
            assert enable_timing

        def record(self) -> None:
            Card.now += 1.0
            self.at = Card.now
            Card.log.append("event")

        def synchronize(self) -> None:
            Card.log.append("synchronize")

        def elapsed_time(self, other: Any) -> float:
            return other.at - self.at


@pytest.fixture
def card(monkeypatch: pytest.MonkeyPatch) -> Iterator[type[Card]]:
    Card.now, Card.log = 0.0, []
    facts = SimpleNamespace(major=9, minor=0, multi_processor_count=132, total_memory=80 * 10**9)
    allocated = iter(range(100, 10**6, 100))
    said = {
        "is_available": lambda: True,
        "Event": Card.Event,
        "_sleep": lambda ticks: Card.log.append("sleep"),
        "synchronize": lambda: Card.log.append("synchronize"),
        "get_device_name": lambda: "Stand-in",
        "current_device": lambda: 0,
        "get_device_properties": lambda _: facts,
        "reset_peak_memory_stats": lambda: None,
        "memory_allocated": lambda: next(allocated),
        "max_memory_allocated": lambda: 5000,
        "empty_cache": lambda: None,
    }
    for name, value in said.items():
        monkeypatch.setattr(torch.cuda, name, value)
    monkeypatch.setattr("clearhead.core.capability._known", {})
    monkeypatch.setattr(cuda, "FLUSHED_BYTES", 8)
    monkeypatch.setattr(machine, "MATRIX_SIZE_ON_GPUS", 16)
    monkeypatch.setattr(machine, "YARDSTICK_ROUNDS", (1, 2))
    # A cast of a module replaces the numbers of a parameter, which here are in an object of its own.
    torch.__future__.set_swap_module_params_on_conversion(True)
    try:
        with gpu():
            yield Card
    finally:
        torch.__future__.set_swap_module_params_on_conversion(False)


def tiny(case: Any, **changes: Any) -> Any:
    sizes: dict[str, Any] = {"heads": 2, "groups": 2, "width": 8, "keys": 24, "batch": 1, "layers": 1}
    sizes["queries"] = 1 if case.queries == 1 else 24
    return replace(case, **{**sizes, **changes})


# Compiled for a GPU, or made for one, so that the stand-in cannot compute it.
NOT_HERE = {gpu_cases.FLEX, gpu_cases.FLEX_ONE}


def without_flex(case: Any) -> Any:
    return replace(case, peers=tuple(p for p in case.peers if p not in NOT_HERE and "flex" not in p))


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> dict[str, tuple[Any, ...]]:
    attention, decode, train = (cases_on("cuda")[verb] for verb in ("attention", "decode", "train"))
    memory = next(case for case in attention if isinstance(case, AttentionCase) and case.memory)
    first = train[0]
    assert isinstance(first, TrainCase)
    found: dict[str, tuple[Any, ...]] = {
        "attention": (tiny(attention[0], name="both"), tiny(memory, name="memory")),
        "decode": (tiny(decode[0], name="decode", groups=1),),
        "train": (
            replace(first, name="step", width=16, layers=1, heads=2, context=12, vocabulary=20, batch=1),
        ),
    }
    found = {verb: tuple(map(without_flex, cases)) for verb, cases in found.items()}
    for verb, cases in found.items():
        monkeypatch.setitem(gpu_cases.GPU_CASES, verb, cases)
    return found


def bench(*arguments: str) -> Result:
    return CliRunner().invoke(app, ["bench", *arguments])


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_without_a_gpu_one_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    done = bench("attention", "--device", "cuda")
    assert isinstance(done.exception, ValueError)
    assert str(done.exception).startswith("--device cuda: PyTorch sees no GPU here (")
    assert not list(tmp_path.iterdir())
    listed = bench("attention", "--device", "cuda", "--list").stdout.splitlines()
    assert listed[0].startswith("v1-d128-2048-both-bfloat16 ")


@pytest.mark.parametrize("verb", ["attention", "decode", "train"])
def test_a_run_from_end_to_end(
    verb: str, card: type[Card], small: dict[str, tuple[Any, ...]], tmp_path: Path
) -> None:
    out = tmp_path / "found.jsonl"
    done = bench(verb, "--device", "cuda", "--rounds", "2", "--out", str(out), "--chart")
    assert done.exit_code == 0, done.output
    entries = lines(out)
    assert [entry["peer"] for entry in entries] == [peer for case in small[verb] for peer in case.peers]
    reference = entries[0]
    assert reference["reason"] is None and reference["time_ms"]["median"] == 1.0
    assert reference["machine"]["device"] == "Stand-in" and reference["machine"]["capability"] == "sm_90"
    assert reference["case"]["device"] == "cuda" and reference["yardsticks"]["matrix_gflops"] > 0
    ran = {entry["peer"] for entry in entries if entry["reason"] is None}
    reasons = {entry["peer"]: entry["reason"] for entry in entries if entry["reason"]}
    if verb == "train":
        assert ran == {*small[verb][0].peers}
        assert "sleep" not in card.log
    else:
        assert {gpu_cases.TRITON, gpu_cases.TRITON_ONE, "FlashDiffAttn_1", "DiffLlama"} <= ran
        assert reasons["FlashDiffAttn_2 (flash_attention_2)"] == "transformers finds no package for it here"
        assert reasons[gpu_cases.TWIN_CUDNN] == "PyTorch's cudnn kernel does not take it here"
        assert reasons[gpu_cases.WIDE_3].startswith("flash_attn_interface.flash_attn_func cannot be imported")
        assert bool(reference["over_reading_kv"]) == (verb == "decode")
        # Each call: the cache is overwritten, the host gets ahead, and only then the first event.
        start = card.log.index("sleep")
        assert card.log[start : start + 4] == ["sleep", "event", "event", "synchronize"]
        assert "TFLOP/s" in done.stdout
    if verb == "attention":
        weighed = [
            entry["extra_bytes"] for entry in entries if entry["case"]["memory"] and not entry["reason"]
        ]
        assert weighed and all(isinstance(count, int) for count in weighed)
    assert out.with_suffix(".png").exists()


def test_going_on_and_running_out_of_time(
    card: type[Card], small: dict[str, tuple[Any, ...]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "found.jsonl"
    assert (
        bench("attention", "--device", "cuda", "--case", "both", "--rounds", "1", "--out", str(out)).exit_code
        == 0
    )
    assert named(out) == {"both"}
    with out.open("a") as file:
        file.write('{"case": {"name": "mem')
    done = bench("attention", "--device", "cuda", "--missing", "--rounds", "1", "--out", str(out))
    assert done.exit_code == 0 and named(out) == {"both", "memory"}
    moments = iter((0.0, 2.0))
    monkeypatch.setattr("clearhead.cli.bench.time", SimpleNamespace(monotonic=lambda: next(moments)))
    late = tmp_path / "late.jsonl"
    done = bench("decode", "--device", "cuda", "--seconds", "1", "--out", str(late))
    assert done.exit_code == 75 and not late.exists()


def test_peers_are_known_and_names_unique() -> None:
    for verb in ("attention", "decode", "train"):
        cases = cases_on("cuda")[verb]
        assert len({case.name for case in cases}) == len(cases)
        for case in cases:
            assert case.device == "cuda"
            assert set(case.peers) <= set(ARMS if isinstance(case, TrainCase) else peers.PEERS)
    assert len(select("attention", ["v1-d128-*-both-*"], cases_on("cuda"))) == 4


@pytest.mark.parametrize("gives_sums", [False, True])
def test_flash_attention_itself_with_wide_values(
    gives_sums: bool, card: type[Card], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two calls, tokens first, values twice as wide; what refuses the width is left out with its reason."""
    seen = []

    def flash(q: Any, k: Any, v: Any, softmax_scale: float, causal: bool) -> Any:
        seen.append((tuple(q.shape), tuple(k.shape), tuple(v.shape)))
        allowed = softmax.visible(q.shape[0], q.shape[1], k.shape[1], causal=causal)[:, None]
        parts = (x.numbers.transpose(1, 2).double() for x in (q, k, v))
        out = on_cuda(
            softmax.attention(*parts, allowed=allowed, scale=softmax_scale).transpose(1, 2).to(v.dtype)
        )
        return (out, None) if gives_sums else out

    module = ModuleType("flash_attn_interface")
    module.flash_attn_func = flash  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "flash_attn_interface", module)
    case = tiny(next(c for c in cases_on("cuda")["attention"] if c.name == "v1-d64-2048-forward-bfloat16"))
    peer = peers.build(gpu_cases.WIDE_3, case)
    verdicts = check({"found": peer}, case)["found"]
    assert verdicts and all(verdict.green for verdict in verdicts)
    assert seen[0] == ((1, 24, 2, 8), (1, 24, 2, 8), (1, 24, 2, 16))

    def narrow(*_: Any, **__: Any) -> Any:
        raise RuntimeError("head_size_v must be head_size")

    module.flash_attn_func = narrow  # type: ignore[attr-defined]
    with pytest.raises(peers.Unavailable, match="RuntimeError: head_size_v must be head_size"):
        peers.build(gpu_cases.WIDE_3, case)


def test_clocks_are_read_where_nvidia_smi_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert cuda.clocks() is None
    program = tmp_path / "nvidia-smi"
    program.write_text("#!/bin/sh\necho '1980, 2619, 1980, 41, 120.5, 700.00, 575.51'\n")
    program.chmod(0o755)
    found = cuda.clocks()
    assert found is not None and found["sm_mhz"] == "1980" and found["driver"] == "575.51"
    program.write_text("#!/bin/sh\nexit 9\n")
    assert cuda.clocks() is None


def test_memory_that_is_not_there(card: type[Card]) -> None:
    def full() -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9 GB")

    assert cuda.peak_memory(full) == (None, "it needs more memory than is free")
    assert cuda.peak_memory(lambda: None) == (4900, None)

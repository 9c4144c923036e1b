"""`clearhead bench` from the command line to its files, on cases small enough for a test."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import Cache, PreTrainedModel
from typer.testing import CliRunner, Result

from clearhead import registry
from clearhead.bench import cases, generate_run, generating, peers
from clearhead.cli.main import app
from clearhead.models import QuantisedCache
from tests.bench.tiny import TINY, V1

KEYS = {
    "verb": str,
    "case": dict,
    "peer": str,
    "reference": str,
    "reason": str | None,
    "rounds": int,
    "time_ms": dict | None,
    "ratio": dict | None,
    "gflops": float | None,
    "over_reading_kv": dict | None,
    "extra_bytes": int | None,
    "generation": dict | None,
    "yardsticks": dict,
    "machine": dict,
    "versions": dict,
    "date": str,
}


@pytest.fixture(autouse=True)
def tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    for verb, found in TINY.items():
        monkeypatch.setitem(cases.CASES, verb, found)
    monkeypatch.setattr("clearhead.bench.machine.MATRIX_SIZE", 64)
    monkeypatch.setattr("clearhead.bench.machine.YARDSTICK_ROUNDS", (1, 2))


def bench(*arguments: str) -> Result:
    return CliRunner().invoke(app, ["bench", *arguments])


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.mark.parametrize("verb", ["attention", "decode", "train"])
def test_a_run_from_end_to_end(verb: str, tmp_path: Path) -> None:
    out = tmp_path / "deep" / "found.jsonl"
    done = bench(verb, "--rounds", "2", "--out", str(out), "--chart")
    assert done.exit_code == 0, done.output
    entries = lines(out)
    assert [entry["peer"] for entry in entries] == [peer for case in TINY[verb] for peer in case.peers]
    for entry in entries:
        assert entry.keys() == KEYS.keys()
        for key, kind in KEYS.items():
            assert isinstance(entry[key], kind), key
        measured = entry["time_ms"] or entry["extra_bytes"] is not None
        assert bool(entry["reason"]) != bool(measured)
        assert entry["peer"] in done.stdout
        assert entry["machine"].keys() == {"processor", "instruction_set", "cores", "threads", "system"}
        if entry["time_ms"]:
            assert entry["time_ms"].keys() == entry["ratio"].keys() == {"median", "q1", "q3", "min"}
            assert entry["gflops"] > 0
            assert entry["yardsticks"]["matrix_gflops"] > 0
            assert bool(entry["over_reading_kv"]) == (verb == "decode")
    assert {entry["ratio"]["median"] for entry in entries if entry["peer"] == entry["reference"]} == {1.0}
    assert out.with_suffix(".png").read_bytes()[:4] == b"\x89PNG"
    assert "<svg" in out.with_suffix(".svg").read_text()


SPREADS = ("processor_ms", "processor_ratio", "first_ms", "first_ratio", "first_processor_ms")


def test_models_that_write(tmp_path: Path) -> None:
    out = tmp_path / "found.jsonl"
    done = bench("generate", "--rounds", "2", "--out", str(out), "--chart")
    assert done.exit_code == 0, done.output
    found = {entry["peer"]: entry for entry in lines(out)}
    # The one that has to be asked for by name is left out.
    assert list(found) == list(TINY["generate"][0].peers)
    for entry in found.values():
        assert entry.keys() == KEYS.keys() and entry["reason"] is None
        own = entry["generation"]
        assert {*SPREADS} < own.keys() and all(own[key]["median"] > 0 for key in SPREADS)
        assert own["tokens_a_second"] == pytest.approx(1e3 / entry["time_ms"]["median"])
    reference = found[cases.GENERATING]
    assert reference["ratio"]["median"] == reference["generation"]["first_ratio"]["median"] == 1.0
    held = {name: entry["generation"]["cache_bytes"] for name, entry in found.items()}
    # Of 192 tokens one block of 128 is codes, and the twins hold equally many numbers.
    whole = 192 * 2 * 32 * 4
    assert held[cases.GENERATING] == held["DIFF V1"] == held["CoCA exact"] == whole
    assert held["CoCA exact, compact"] == whole * 3 // 4
    assert held["DIFF V1, a quarter of the prompt"] == whole // 4
    assert whole / 3 < held["DIFF V1, int4"] < held["DIFF V1, int8"] < whole * 2 / 3
    assert held["DIFF V1, static"] == whole // 192 * (192 + 2 + 2 + 1)


def test_a_cache_that_is_read_wrongly_is_not_timed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    right = generating.forward

    def wrong(model: PreTrainedModel, cache: Cache, tokens: torch.Tensor) -> torch.Tensor:
        """Off by a thousandth where a model that is timed reads codes; the plain one it is held to is right."""
        logits = right(model, cache, tokens)
        codes = isinstance(cache, QuantisedCache) and model.config._attn_implementation == "clearhead"
        return logits * 1.001 if codes else logits

    monkeypatch.setattr(generating, "forward", wrong)
    out = tmp_path / "found.jsonl"
    done = bench("generate", "--rounds", "1", "--out", str(out))
    assert done.exit_code == 1 and not out.exists()
    red = {line.split(":")[0].strip() for line in done.stdout.splitlines() if "logits: off by" in line}
    assert red == {"Transformer, int8", "DIFF V1, int8"}


def test_an_interruption_keeps_the_peers_that_were_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    right = generate_run.Writer.step
    calls = 0

    def step(writer: generate_run.Writer) -> None:
        nonlocal calls
        calls += 1
        # Two to warm up each of three, three rounds beside the second one, and one beside the third.
        if calls == 2 + 2 + 6 + 2 + 3:
            raise KeyboardInterrupt
        right(writer)

    monkeypatch.setattr(generate_run.Writer, "step", step)
    peers = TINY["generate"][0].peers
    chosen = (peers[0], "DIFF V1", "DIFF V2", "CoCA exact")
    monkeypatch.setitem(cases.CASES, "generate", (replace(TINY["generate"][0], peers=chosen),))
    out = tmp_path / "found.jsonl"
    done = bench("generate", "--rounds", "3", "--out", str(out))
    assert done.exit_code != 0 and not out.exists()
    assert "interrupted" in done.stdout and "DIFF V1" in done.stdout
    assert "CoCA exact: interrupted before its turn was over" in done.stdout


def test_a_writer_goes_back_to_its_prompt() -> None:
    case, arm = TINY["generate"][0], generating.ARMS[cases.GENERATING]
    assert isinstance(case, cases.GenerateCase)
    model, ids = generating.build(arm, case), generating.prompt_of(case)
    cache = generating.new_cache(arm, model, 0)
    first = generating.forward(model, cache, ids).argmax(-1, keepdim=True)
    writer = generate_run.Writer(model, cache, first)

    def text() -> list[int]:
        found = []
        for _ in range(4):
            writer.step()
            found.append(int(writer.token))
        return found

    written = text()
    writer.cut_back()
    assert cache.get_seq_length() == case.context and text() == written
    expected = model.generate(ids, max_new_tokens=5, do_sample=False, eos_token_id=None)
    assert [int(first), *written] == expected[0, case.context :].tolist()


def test_memory_of_a_part_of_a_process() -> None:
    with generate_run.peak_of_process() as peak:
        kept = torch.ones(8 * 2**20)
    found = peak()
    if found is not None:
        assert 0.9 * kept.nbytes < found < 2 * kept.nbytes


def test_generation_has_no_cases_for_a_gpu() -> None:
    done = bench("generate", "--device", "cuda")
    assert isinstance(done.exception, ValueError) and "leave --device cuda out" in str(done.exception)


def test_results_are_added_to(tmp_path: Path) -> None:
    out = tmp_path / "found.jsonl"
    for _ in range(2):
        assert bench("decode", "--rounds", "1", "--out", str(out)).exit_code == 0
    assert len(lines(out)) == 2 * len(TINY["decode"][0].peers)


def test_a_wrong_peer_stops_its_case(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    right = peers.PEERS["FlashDiffAttn_2"]

    def wrong(case: cases.AttentionCase) -> peers.Peer:
        peer = right(case)
        return replace(peer, run=lambda inputs: peer.run(inputs) * 1.001)

    monkeypatch.setitem(peers.PEERS, "FlashDiffAttn_2", wrong)
    out = tmp_path / "found.jsonl"
    done = bench("attention", "--case", "tiny-v1", "--rounds", "1", "--out", str(out), "--chart")
    assert done.exit_code == 1
    assert "FlashDiffAttn_2: output at 24 keys: off by" in done.stdout
    assert "GFLOP" not in done.stdout
    assert list(tmp_path.glob("found.*")) == []


def test_without_the_kernel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(registry.KERNELS, "cpu", raising=False)
    out = tmp_path / "found.jsonl"
    done = bench("attention", "--case", "tiny-v1", "--rounds", "1", "--out", str(out))
    assert done.exit_code == 0, done.output
    reasons = {entry["peer"]: entry["reason"] for entry in lines(out) if entry["reason"]}
    assert reasons.keys() == {cases.KERNEL, cases.KERNEL_ONE}
    for peer, reason in reasons.items():
        assert f"{peer}: {reason}" in done.stdout


def test_an_interruption_shows_the_rounds_so_far(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    built = peers.PEERS["naive maps"](V1)
    calls = 0

    def run(inputs: peers.PeerInputs) -> Any:
        nonlocal calls
        calls += 1
        # One of the gate, two to warm up, two rounds.
        if calls == 6:
            raise KeyboardInterrupt
        return built.run(inputs)

    monkeypatch.setitem(peers.PEERS, "naive maps", lambda case: replace(built, run=run))
    out = tmp_path / "found.jsonl"
    done = bench("attention", "--rounds", "9", "--out", str(out))
    assert done.exit_code != 0
    assert "interrupted after 2 complete rounds" in done.stdout
    assert "FlashDiffAttn_1 padded" in done.stdout
    assert not out.exists()


def test_the_list_and_mistakes(tmp_path: Path) -> None:
    done = bench("attention", "--list")
    assert [line.split()[0] for line in done.stdout.splitlines()] == ["tiny-v1", "tiny-memory"]
    done = bench("attention", "--case", "tiny-v3")
    assert isinstance(done.exception, ValueError)
    assert "the nearest is 'tiny-v1'" in str(done.exception)
    assert bench("inference").exit_code == 2


def test_help() -> None:
    text = bench("--help").stdout
    for word in (
        "attention",
        "decode",
        "train",
        "generate",
        "--case",
        "--rounds",
        "--threads",
        "--out",
        "--chart",
        "--list",
    ):
        assert word in text

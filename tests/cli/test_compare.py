"""A whole comparison through the command line, killed and interrupted on the way."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from typer.testing import CliRunner

from clearhead.cli.main import app

ROOT = Path(__file__).parents[2]
RECIPE = """
name = "small"
[corpus]
source = "text"
validation_fraction = 0.3
[tokenizer]
vocab_size = 512
[data]
length = 32
needle_share = 0.3
pair_share = 0.3
[data.needles]
lengths = [24, 32]
needles = [1, 2]
questions = 1
[model]
hidden_size = 32
num_hidden_layers = 1
num_attention_heads = 2
[train]
tokens = 25_600
batch_tokens = 64
save_every = 20
log_every = 5
workers = 2
[evaluate]
suites = ["language_modelling"]
[[arms]]
name = "Transformer"
[[arms]]
name = "DIFF V1"
attention = "differential"
"""
JOBS = ("transformer/seed-0", "diff-v1/seed-0")
# Seconds until a test gives up on a step: a machine may be busy with other things.
PATIENCE = 300


@pytest.fixture
def project(tmp_path: Path) -> Path:
    text = tmp_path / "text"
    text.mkdir()
    for number in range(20):
        words = (
            "".join(chr(97 + (j * j + k) % 26) for k in range(j % 5 + 2)) for j in range(number, number + 300)
        )
        (text / f"{number}.txt").write_text(" ".join(words))
    (tmp_path / "small.toml").write_text(RECIPE)
    return tmp_path


@pytest.fixture(autouse=True)
def interruptible() -> Iterator[None]:
    """Children take Ctrl-C, even when whoever started the tests in the background had it ignored."""
    earlier = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, earlier)


def start(project: Path, *arguments: str) -> subprocess.Popen[str]:
    environment = {
        **os.environ,
        "PYTHONPATH": str(ROOT / "src"),
        "CLEARHEAD_CACHE": str(project / "cache"),
        "OMP_NUM_THREADS": "1",
    }
    return subprocess.Popen(
        [sys.executable, "-m", "clearhead", *arguments],
        cwd=project,
        env=environment,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )


def verb(*arguments: str) -> str:
    """Run a verb in this process, which has everything loaded; returns what it printed."""
    done = CliRunner().invoke(app, arguments, catch_exceptions=False)
    assert done.exit_code == 0
    return done.stdout


def states(run: Path) -> Iterator[dict[str, object]]:
    for job in JOBS:
        path = run / "arms" / job / "status.json"
        yield json.loads(path.read_text()) if path.exists() else {"state": "queued", "step": 0}


def checkpoint_steps(run: Path) -> list[int]:
    """Step of the last complete checkpoint of each job."""
    return [
        max(
            (int(m.parent.name.partition("-")[2]) for m in run.glob(f"arms/{job}/checkpoints/*/complete")),
            default=0,
        )
        for job in JOBS
    ]


def wait_for_checkpoints(process: subprocess.Popen[str], run: Path) -> None:
    """Until both jobs have a complete checkpoint beyond those they have now."""
    before = checkpoint_steps(run)
    deadline = time.monotonic() + PATIENCE
    while time.monotonic() < deadline:
        assert process.poll() is None, process.communicate()
        if all(new > old for new, old in zip(checkpoint_steps(run), before, strict=True)):
            return
        time.sleep(0.05)
    raise AssertionError(list(states(run)))


def workers_of(run: Path) -> list[str]:
    """Command lines of the processes that work on `run`."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            line = path.read_bytes().replace(b"\0", b" ").decode()
        except OSError:
            continue
        if "clearhead.train.worker" in line and str(run) in line:
            found.append(line)
    return found


@pytest.mark.skipif(not Path("/proc/self/cmdline").exists(), reason="looks for processes in /proc")
def test_killed_and_interrupted_it_ends_with_the_same_weights(
    project: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = project / "run"
    command = ("compare", "small.toml", "--out", str(run))

    process = start(project, *command)
    wait_for_checkpoints(process, run)
    second = start(project, *command)
    _, errors = second.communicate(timeout=PATIENCE)
    assert second.returncode == 2
    assert "in use by another clearhead process" in errors
    process.kill()
    process.communicate()
    deadline = time.monotonic() + 10
    while workers_of(run) and time.monotonic() < deadline:
        time.sleep(0.2)
    assert workers_of(run) == []

    process = start(project, *command)
    wait_for_checkpoints(process, run)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=PATIENCE)
    assert process.returncode == 130
    assert (
        errors.strip().splitlines()[-1] == "interrupted: the same command goes on from the last checkpoints"
    )
    assert workers_of(run) == []

    process = start(project, *command)
    output, errors = process.communicate(timeout=PATIENCE)
    assert process.returncode == 0, errors
    assert [(status["state"], status["step"]) for status in states(run)] == [("evaluated", 400)] * 2
    assert "All 2 runs trained and evaluated." in output
    assert (run / "report.html").exists()

    model = run / "arms" / JOBS[1]
    assert verb("generate", str(model), "word", "--max-new-tokens", "3").startswith("word")
    assert "FlashDiffAttn_1" in verb("explain", str(model))
    monkeypatch.setenv("CLEARHEAD_CACHE", str(project / "cache"))
    monkeypatch.chdir(project)
    verb("evaluate", str(model), "--suite", "loss_by_position")
    assert (model / "results" / "loss_by_position.json").exists()
    verb("report", str(run))

    other = project / "uninterrupted"
    process = start(project, "train", "small.toml", "--arm", "DIFF V1", "--out", str(other))
    process.communicate(timeout=PATIENCE)
    weights = Path("arms") / JOBS[1] / "model" / "model.safetensors"
    assert (run / weights).read_bytes() == (other / weights).read_bytes()


def test_a_failing_job_is_reported_and_the_rest_is_finished(project: Path) -> None:
    run = project / "run"
    command = (
        "compare",
        "small.toml",
        "--out",
        str(run),
        "train.tokens=640",
        "arms.1.train.learning_rate=1e30",
    )
    process = start(project, *command)
    output, errors = process.communicate(timeout=PATIENCE)
    assert process.returncode == 1
    last = errors.strip().splitlines()[-1]
    assert last.startswith("1 of 2 jobs failed; DIFF V1, seed 0: the loss is")
    assert last.endswith("arms/diff-v1/seed-0/log.txt")
    assert [status["state"] for status in states(run)] == ["evaluated", "failed"]
    assert "Transformer" in output
